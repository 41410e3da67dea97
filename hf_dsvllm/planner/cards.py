"""How fast a card is: data-sheet numbers made realistic, or the rates measured on this machine.

Each row of `CARDS` is the vendor's data sheet (dense bf16 tensor FLOP/s without sparsity, memory bandwidth, one
direction of the link between cards and of the host link).  What a program reaches of it is a share (`REACHED`), and
those shares were measured on one card only, an H200: 785 of 989 TFLOP/s in large products, 4.27 of 4.8 TB/s copying,
55 of 64 GB/s to the host.  For other cards they are an assumption; `hf-dsvllm doctor --calibrate` replaces it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import HardwareError
from hf_dsvllm.files import write_text
from hf_dsvllm.hardware import CARDS_MIB, MIB, Gpu, Machine, find_card, squeeze

__all__ = [
    "CARDS",
    "CPU_RATES",
    "NVME_BYTES_PER_S",
    "Card",
    "Rates",
    "calibration_file",
    "lacks_bf16",
    "learn",
    "machine_rates",
    "rates_of",
    "stored_rates",
]

TERA, GIGA = 1e12, 1e9
RUNS_NEEDED, RUNS_KEPT = 3, 50


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Data-sheet numbers in TFLOP/s, GB/s.  `nvlink`: whether `link` is NVLink; otherwise cards talk over PCIe."""

    tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    host_gb_per_s: float
    nvlink: bool = False
    bf16: bool = True


PCIE3, PCIE4, PCIE5 = 16.0, 32.0, 64.0
# NVIDIA's data sheets; V100 and T4 have no bf16 (their number is fp16).
CARDS: Mapping[str, Card] = {
    "A10-24GB": Card(tflops=125, memory_gb_per_s=600, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "A100-40GB": Card(tflops=312, memory_gb_per_s=1555, link_gb_per_s=300, host_gb_per_s=PCIE4, nvlink=True),
    "A100-80GB": Card(tflops=312, memory_gb_per_s=2039, link_gb_per_s=300, host_gb_per_s=PCIE4, nvlink=True),
    "A10G-24GB": Card(tflops=70, memory_gb_per_s=600, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "A40-48GB": Card(tflops=149.7, memory_gb_per_s=696, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "B200-180GB": Card(tflops=2250, memory_gb_per_s=8000, link_gb_per_s=900, host_gb_per_s=PCIE5, nvlink=True),
    "H100-80GB": Card(tflops=989, memory_gb_per_s=3350, link_gb_per_s=450, host_gb_per_s=PCIE5, nvlink=True),
    "H200-141GB": Card(tflops=989, memory_gb_per_s=4800, link_gb_per_s=450, host_gb_per_s=PCIE5, nvlink=True),
    "L4-24GB": Card(tflops=121, memory_gb_per_s=300, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "L40S-48GB": Card(tflops=362, memory_gb_per_s=864, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "RTX3090-24GB": Card(tflops=71, memory_gb_per_s=936, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "RTX4090-24GB": Card(tflops=165, memory_gb_per_s=1008, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "RTX5090-32GB": Card(tflops=210, memory_gb_per_s=1792, link_gb_per_s=PCIE5, host_gb_per_s=PCIE5),
    "RTX6000Ada-48GB": Card(tflops=364, memory_gb_per_s=960, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "RTXA6000-48GB": Card(tflops=155, memory_gb_per_s=768, link_gb_per_s=PCIE4, host_gb_per_s=PCIE4),
    "T4-16GB": Card(tflops=65, memory_gb_per_s=320, link_gb_per_s=PCIE3, host_gb_per_s=PCIE3, bf16=False),
    "V100-16GB": Card(tflops=125, memory_gb_per_s=900, link_gb_per_s=150, host_gb_per_s=PCIE3, nvlink=True, bf16=False),
    "V100-32GB": Card(tflops=125, memory_gb_per_s=900, link_gb_per_s=150, host_gb_per_s=PCIE3, nvlink=True, bf16=False),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What an H200 reached of its data sheet (torch 2.11, CUDA 13; benchmarks/planner/results/rates.json)."""

    product: float = 0.794  # 785 of 989 TFLOP/s, 8192 x 8192 x 8192
    attention_forward: float = 0.586  # 580 TFLOP/s, sdpa as it comes (cuDNN), causal, head_dim 128
    attention_backward: float = 0.43  # 425 TFLOP/s
    memory: float = 0.89  # 4.27 of 4.8 TB/s
    link: float = 0.75  # of NVLink: large collectives
    pcie_link: float = 0.45  # cards without NVLink send through the host: an assumption
    host: float = 0.86  # 55 of 64 GB/s


REACHED = Reached()


# Of a host, shared by its processes.  Assumed: two sockets of eight channels each; one PCIe 4 drive, reads and writes.
HOST_MEMORY_BYTES_PER_S = 3e11
NVME_BYTES_PER_S = 3e9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the speed model computes with: FLOP/s, bytes/s, seconds; `source` says where it is from."""

    product_flops: float
    attention_forward_flops: float
    attention_backward_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float
    adam_parameters_per_s: float
    launch_s: float
    source: str
    host_memory_bytes_per_s: float = HOST_MEMORY_BYTES_PER_S
    nvme_bytes_per_s: float = NVME_BYTES_PER_S
    correction: float = 1.0  # measured over predicted seconds of a step, from runs of this machine


# Measured on the host of an H200: one small operation from Python, DeepSpeedCPUAdam with 16 threads.
LAUNCH_S = 1.7e-5
ADAM_PARAMETERS_PER_S = 3.7e9
CPU_RATES = Rates(
    product_flops=8e10,
    attention_forward_flops=4e10,
    attention_backward_flops=4e10,
    memory_bytes_per_s=1.2e10,
    link_bytes_per_s=1e9,
    host_bytes_per_s=1e10,
    adam_parameters_per_s=2e8,
    launch_s=LAUNCH_S,
    host_memory_bytes_per_s=1.2e10,
    source="an assumption for one CPU core and its neighbour",
)


def rates_of(card: str) -> Rates:
    """The catalogue's rates of a card, by any spelling `hardware.find_card` takes; HardwareError for an unknown one."""
    name = find_card(card)
    found = CARDS[name]
    reached = REACHED.link if found.nvlink else REACHED.pcie_link
    return Rates(
        product_flops=found.tflops * TERA * REACHED.product,
        attention_forward_flops=found.tflops * TERA * REACHED.attention_forward,
        attention_backward_flops=found.tflops * TERA * REACHED.attention_backward,
        memory_bytes_per_s=found.memory_gb_per_s * GIGA * REACHED.memory,
        link_bytes_per_s=found.link_gb_per_s * GIGA * reached,
        host_bytes_per_s=found.host_gb_per_s * GIGA * REACHED.host,
        adam_parameters_per_s=ADAM_PARAMETERS_PER_S,
        launch_s=LAUNCH_S,
        source="measured on an H200" if name.startswith("H200") else f"data sheet of {name}, derated as an H200 is",
    )


def calibration_file() -> Path:
    """Where `hf-dsvllm doctor --calibrate` keeps this machine's rates: beside the engine registry."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "hf-dsvllm" / "calibration.json"


def stored_rates(file: Path | None = None) -> Mapping[str, Any] | None:
    """This machine's measured rates as a record, None where it was never calibrated."""
    path = file or calibration_file()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def from_record(record: Mapping[str, Any], base: Rates | None = None) -> Rates:
    """A record of `hf_dsvllm.calibrate` → rates: the best product, attention at the middle length.

    `base` gives what was not measured (links of a single GPU), the catalogue's H200 by default.  KeyError, TypeError,
    ValueError or AttributeError for a record that is not whole.
    """
    base = base or (rates_of("H200") if record["device"] == "cuda" else CPU_RATES)
    links = [max(found["all_gather"].values()) for found in record.get("collectives", {}).values()]

    def middle(name: str, default: float) -> float:
        values = sorted(record.get(name, {}).values())
        return values[len(values) // 2] if values else default

    return Rates(
        product_flops=max(record["matmul_flops"].values()),
        attention_forward_flops=middle("attention_forward_flops", base.attention_forward_flops),
        attention_backward_flops=middle("attention_backward_flops", base.attention_backward_flops),
        memory_bytes_per_s=record["copy_bytes_per_s"],
        link_bytes_per_s=min(links, default=base.link_bytes_per_s),
        host_bytes_per_s=record.get("host_to_device_bytes_per_s", base.host_bytes_per_s),
        adam_parameters_per_s=record.get("adam_parameters_per_s") or base.adam_parameters_per_s,
        launch_s=record.get("launch_s", base.launch_s),
        host_memory_bytes_per_s=record.get("host_copy_bytes_per_s", base.host_memory_bytes_per_s),
        nvme_bytes_per_s=record.get("nvme_bytes_per_s", base.nvme_bytes_per_s),
        source=f"measured on this machine ({record['device_name']})",
    )


def runs_file() -> Path:
    """Where this machine's runs are kept, beside its calibration: one JSON line each."""
    return calibration_file().with_name("runs.jsonl")


def learn(card: str, rates: Rates, ratio: float, file: Path | None = None) -> None:
    """Keep how much longer a run's steps took than `rates` said without any correction; the last `RUNS_KEPT` stay."""
    path = file or runs_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines.append(json.dumps({"card": card, "rates": fingerprint(rates), "ratio": round(ratio, 4)}))
    write_text(path, "\n".join(lines[-RUNS_KEPT:]) + "\n")


def fingerprint(rates: Rates) -> str:
    """A short name of the rates themselves: a ratio means nothing beside others, such as a new calibration's."""
    plain = dataclasses.replace(rates, correction=1.0, source="")
    return hashlib.sha256(repr(dataclasses.astuple(plain)).encode()).hexdigest()[:12]


def corrected(rates: Rates, card: str, file: Path | None = None) -> Rates:
    """`rates` with the median ratio of the runs on that card that were held against them, from `RUNS_NEEDED` on."""
    basis = fingerprint(rates)
    try:
        lines = (file or runs_file()).read_text(encoding="utf-8").splitlines()
        runs = [json.loads(line) for line in lines]
        ratios = [run["ratio"] for run in runs if run["card"] == card and run.get("rates") == basis]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return rates
    if len(ratios) < RUNS_NEEDED:
        return rates
    ratio = statistics.median(ratios)
    source = f"{rates.source}, corrected x{ratio:.2f} by {len(ratios)} runs of this machine"
    return dataclasses.replace(rates, correction=ratio, source=source)


def machine_rates(machine: Machine | None) -> Rates:
    """The measured rates where `doctor --calibrate` was run with these cards, else the catalogue's; None is on CPUs.

    Raises HardwareError for a card that was neither measured nor is in the catalogue.
    """
    gpu = machine.gpus[0] if machine is not None and machine.gpus else None
    record = stored_rates()
    if gpu is None:
        return CPU_RATES if record is None else measured_rates(record, "cpu", CPU_RATES)
    try:
        listed: Rates | None = rates_of(catalogue_name(gpu))
    except HardwareError:
        listed = None
        if record is None or not same_card(record, gpu):
            raise
    if record is not None and record.get("device") == "cuda":
        if same_card(record, gpu):
            rates = measured_rates(record, "cuda", listed)
        else:
            assert listed is not None
            other = f"the calibration kept here is that of {record.get('device_name')}"
            rates = dataclasses.replace(listed, source=f"{listed.source}; {other}")
    else:
        assert listed is not None
        rates = listed
    return corrected(rates, gpu.name)


def measured_rates(record: Mapping[str, Any], device: str, listed: Rates | None) -> Rates:
    """The record's rates, or `listed` with the reason where the record is of another device or not whole."""
    if record.get("device") != device and listed is not None:
        return listed
    try:
        return from_record(record, listed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{calibration_file()} is not whole ({type(error).__name__}: {error})"
        if listed is None:
            raise HardwareError(f"{why}; measure again: hf-dsvllm doctor --calibrate") from error
        return dataclasses.replace(listed, source=f"{listed.source}; {why}: hf-dsvllm doctor --calibrate")


def same_card(record: Mapping[str, Any], gpu: Gpu) -> bool:
    """Whether a calibration was made with this card: by its name, or as the same row of the catalogue."""
    name = str(record.get("device_name", ""))
    if squeeze(name) == squeeze(gpu.name):
        return True
    try:
        measured = Gpu(name=name, memory_bytes=int(record.get("device_bytes") or gpu.memory_bytes), index=0)
        return catalogue_name(measured) == catalogue_name(gpu)
    except (HardwareError, TypeError, ValueError):
        return False


def catalogue_name(gpu: Gpu) -> str:
    """The card of the catalogue that a detected one is: by whole words of its name, of several sizes the nearest.

    `NVIDIA RTX A6000` is RTXA6000; `NVIDIA L40` is not L4.  Slices of a card and laptops' cards are none of them.
    """
    if gpu.name in CARDS:
        return gpu.name
    words = re.findall(r"[a-z0-9.]+", gpu.name.lower())
    runs = {"".join(words[start:end]) for start in range(len(words)) for end in range(start + 1, len(words) + 1)}
    same = [card for card in CARDS if squeeze(card.rpartition("-")[0]) in runs]
    if not same or {"mig", "laptop"} & set(words):
        raise HardwareError(
            f"the card {gpu.name} is not in the catalogue, so its speed is not known. Measure it: "
            "hf-dsvllm doctor --calibrate"
        )
    longest = max(len(card.rpartition("-")[0]) for card in same)
    same = [card for card in same if len(card.rpartition("-")[0]) == longest]
    return min(same, key=lambda card: abs(CARDS_MIB[card] * MIB - gpu.memory_bytes))


def lacks_bf16(gpu: Gpu) -> bool:
    """Whether the catalogue says that a card has no bf16; one that it does not know is taken to have it."""
    try:
        return not CARDS[catalogue_name(gpu)].bf16
    except HardwareError:
        return False
