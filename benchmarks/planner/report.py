"""Predicted against measured: the accuracy table of the planner, with the estimators of DeepSpeed and accelerate.

    python benchmarks/planner/report.py [--results FOLDER] [--out FILE]

Reads cells.json and rates.json as `measure.py` wrote them, of FOLDER and of the folders in it: one for each host that
cells were measured on.  Half of the cells, by a hash of their names, were never
used to fit a constant (`matrix.held_out`); errors are given for both halves.  Rows that ran out of memory stay in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import choices
from matrix import HEAD_DIM, SHAPES, VOCAB, Cell, held_out
from rows import shared

from hf_dsvllm.hardware import CARDS_MIB
from hf_dsvllm.model_shape import ModelShape, shape_from_config
from hf_dsvllm.planner.allocator import cannot_give_back, held_bytes, outside_bytes, reserved_bytes
from hf_dsvllm.planner.cards import Rates, from_record, rates_of
from hf_dsvllm.planner.footprint import Footprint, Setup, gpu_footprint
from hf_dsvllm.planner.host import HostFootprint, host_footprint
from hf_dsvllm.planner.search import usable_bytes
from hf_dsvllm.planner.speed import StepTime, step_time
from hf_dsvllm.presets import get_preset

GIB = 2**30
CARD_BYTES = CARDS_MIB["H200-141GB"] * 2**20
HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell: what was measured (None where it ended before), what was predicted."""

    cell: Cell
    status: str
    phase: str | None
    message: str
    allocated: float | None
    reserved: float | None
    host: float | None
    seconds: float | None
    device_total: float | None
    phases: dict[str, dict[str, float]]
    footprint: Footprint
    host_footprint: HostFootprint
    step: StepTime
    setup: Setup
    rates: Rates
    source: str

    @property
    def held_out(self) -> bool:
        return held_out(self.cell.name)

    @property
    def predicted_fit(self) -> bool:
        room = CARD_BYTES - outside_bytes(self.setup)
        split = cannot_give_back(self.setup) and held_bytes(self.setup, self.footprint) > room
        return self.footprint.peak <= usable_bytes(CARD_BYTES, self.setup) and not split


def load_rows(results: Path) -> list[Row]:
    """Rows of a folder and of those in it, each with the rates of its own host."""
    rows = []
    for folder in (results, *sorted(file.parent for file in results.glob("*/cells.json"))):
        cells = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
        rates = machine_rates(folder)
        rows += [row_of(record, rates, "" if folder == results else folder.name) for record in cells.values()]
    return rows


def machine_rates(results: Path) -> Rates:
    """Rates measured on the host of the cells, the catalogue's H200 where they are missing."""
    path = results / "rates.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    one = record.get("one") or {}
    if "matmul_flops" not in one:
        return rates_of("H200")
    links = {name: found for name, found in record.items() if name.startswith("collectives") and "world" in found}
    return from_record({**one, "collectives": links})


def row_of(record: dict[str, Any], rates: Rates, source: str) -> Row:
    cell = Cell(**record["cell"])
    setup = setup_of(cell)
    ranks = record["ranks"]
    done = record["status"] == "ok"
    trained = [steady_phases(rank["phases"]) for rank in ranks]
    later = [step["seconds"] for step in ranks[0]["steps"][2:]] if done and not shared(ranks) else []
    return Row(
        cell=cell,
        status=record["status"],
        phase=record.get("phase"),
        message=record.get("message", ""),
        allocated=max(peak(phases, "allocated_peak") for phases in trained) if done else None,
        reserved=max(peak(phases, "reserved_peak") for phases in trained) if done else None,
        host=sum(peak(phases, "rss_peak") for phases in trained) if done else None,
        seconds=statistics.median(later) if later else None,
        device_total=ranks[0].get("device_total") if ranks else None,
        phases=ranks[0]["phases"] if ranks else {},
        footprint=gpu_footprint(setup),
        host_footprint=host_footprint(setup),
        step=step_time(setup, rates),
        setup=setup,
        rates=rates,
        source=source,
    )


def steady_phases(phases: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    return list(phases.values())


def peak(phases: Iterable[dict[str, float]], name: str) -> float:
    return max((phase[name] for phase in phases if name in phase), default=0.0)


def shape_of(name: str) -> ModelShape:
    hidden, inner, layers, heads, kv_heads, tied = SHAPES[name]
    return shape_from_config(
        {
            "model_type": "qwen3",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB,
            "tie_word_embeddings": tied,
        }
    )


def setup_of(cell: Cell) -> Setup:
    return Setup(
        shape=shape_of(cell.shape),
        preset=get_preset(cell.preset),
        world=cell.world,
        micro=cell.micro,
        accumulation=cell.accumulation,
        length=cell.length,
        recompute=cell.recompute,
        loss=cell.loss,
    )


# -- the estimators that users have today


def deepspeed_estimate(setup: Setup) -> float | None:
    """Bytes on a GPU by DeepSpeed's own estimator; None where it has none (no ZeRO)."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    preset, shape = setup.preset, setup.shape
    if preset.zero_stage not in (1, 2, 3):
        return None
    offload = preset.offload_optimizer != "none"
    if preset.zero_stage == 3:
        found = estimate_zero3_model_states_mem_needs(
            setup.trainable,
            shape.largest_matrix,
            num_gpus_per_node=setup.world,
            cpu_offload=offload,
            cpu_offload_params=preset.offload_param != "none",
        )
        return float(found[1])
    return float(
        estimate_zero2_model_states_mem_needs(setup.trainable, num_gpus_per_node=setup.world, cpu_offload=offload)[1]
    )


def accelerate_estimate(setup: Setup) -> float:
    """Bytes by `accelerate estimate-memory`: Adam, bf16 mixed precision, one GPU's batch of 1; it knows no sharding."""
    from accelerate.commands.estimate import estimate_training_usage

    return float(max(estimate_training_usage(4 * setup.shape.parameters, "bfloat16").values()))


# -- tables


def errors(rows: Sequence[Row], predicted: str) -> list[float]:
    """Relative errors (signed) of the rows where it was measured."""
    found = []
    for row in rows:
        pairs = {
            "allocated": (row.footprint.peak, row.allocated),
            "reserved": (reserved_bytes(row.setup, row.footprint, CARD_BYTES), row.reserved),
            "host": (row.host_footprint.measured_peak, row.host),
            "seconds": (row.step.seconds, row.seconds),
        }
        said, actual = pairs[predicted]
        if actual:
            found.append(said / actual - 1)
    return found


def summary(rows: Sequence[Row]) -> str:
    lines = [
        "| quantity | cells | mean error | worst | mean, held out | worst, held out |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    test = [row for row in rows if row.held_out]
    for name, words in (
        ("allocated", "GPU allocated"),
        ("reserved", "GPU reserved"),
        ("host", "host RAM"),
        ("seconds", "step time"),
    ):
        every, unseen = errors(rows, name), errors(test, name)
        if every:
            lines.append(
                f"| {words} | {len(every)} | {mean(every)} | {worst(every)} | {mean(unseen)} | {worst(unseen)} |"
            )
    return "\n".join(lines)


def mean(values: Sequence[float]) -> str:
    return f"{100 * statistics.mean(map(abs, values)):.1f} %" if values else "–"


def worst(values: Sequence[float]) -> str:
    return f"{100 * max(values, key=abs):+.1f} %" if values else "–"


def fit_verdicts(rows: Sequence[Row]) -> list[str]:
    """Cells whose verdict was wrong: said to fit and did not, or the other way with more than 8 % to spare."""
    wrong = []
    for row in rows:
        if row.status == "oom" and row.predicted_fit:
            wrong.append(f"{row.cell.name} was said to fit ({row.footprint.peak / GIB:.1f} GiB) and ran out of memory")
        if row.status == "ok" and not row.predicted_fit and row.reserved and row.device_total:
            spare = 1 - row.reserved / row.device_total
            if spare > 0.08:
                wrong.append(f"{row.cell.name} was said not to fit and ran with {100 * spare:.0f} % to spare")
    return wrong


def table(rows: Sequence[Row]) -> str:
    names = (
        "cell", "held out", "result", "allocated", "predicted", "", "reserved", "predicted", "host", "predicted",
        "step s", "predicted", "", "DeepSpeed's estimator", "accelerate's",
    )  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * 15]
    for row in rows:
        name = f"{row.cell.name} ({row.source})" if row.source else row.cell.name
        found = deepspeed_estimate(row.setup)
        host = row.host_footprint.measured_peak
        result = row.status if row.status == "ok" else f"{row.status} ({row.phase or row.message[:60]})"
        lines.append(
            f"| {name} | {'yes' if row.held_out else ''} | {result} | {size(row.allocated)} | "
            f"{size(row.footprint.peak)} | {off(row.footprint.peak, row.allocated)} | {size(row.reserved)} | "
            f"{size(reserved_bytes(row.setup, row.footprint, CARD_BYTES))} | {size(row.host)} | {size(host)} | "
            f"{f'{row.seconds:.3f}' if row.seconds else '–'} | {row.step.seconds:.3f} | "
            f"{off(row.step.seconds, row.seconds)} | "
            f"{size(found)} | {size(accelerate_estimate(row.setup))} |"
        )
    return "\n".join(lines)


def size(value: float | None) -> str:
    return "–" if value is None else f"{value / GIB:.1f}"


def off(said: float, actual: float | None) -> str:
    return f"{100 * (said / actual - 1):+.1f} %" if actual else ""


def about(rows: Sequence[Row], rates: dict[str, Any]) -> str:
    """Hardware, versions and what the numbers are."""
    host = rates["host"]
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    count = max(row.cell.world for row in rows)
    return (
        f"1 to {count} x {rates['one']['device_name']}, {host['cpus']} CPUs, {host['date']}; {versions}. Qwen3 shapes "
        "with random weights and random tokens; GiB of one GPU, host GiB of all processes; no step time: another "
        "program used the GPU, or the cell ended early. Written by `python benchmarks/planner/report.py`."
    )


def others(rows: Sequence[Row], results: Path) -> list[str]:
    """The same of each further host."""
    found = []
    for source in sorted({row.source for row in rows if row.source}):
        rates = json.loads((results / source / "rates.json").read_text(encoding="utf-8"))
        found += [f"{source}: {about([row for row in rows if row.source == source], rates)}", *rates.get("notes", ())]
    return found


def page(results: Path) -> str:
    rows = load_rows(results)
    rates = json.loads((results / "rates.json").read_text(encoding="utf-8"))
    wrong = fit_verdicts(rows)
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "oom", "failed", "timeout")}
    return "\n\n".join(
        [
            "# The planner against measurements",
            about([row for row in rows if not row.source], rates),
            *rates.get("notes", ()),
            *others(rows, results),
            f"{len(rows)} cells: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count) + ".",
            summary(rows),
            "## Fits or not",
            "\n".join(f"* {line}" for line in wrong) or "Every verdict was right.",
            "## The choice against the best measured alternative",
            choices.table(rows),
            "## All cells",
            table(rows),
        ]
    ) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    text = page(options.results)
    (options.out or options.results / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
