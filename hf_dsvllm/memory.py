"""Bytes that a training run needs at the least; arithmetic only.

Every number is a lower bound, so that `fits` never refuses what would run: no CUDA context, allocator fragmentation,
communication buckets, logits or kernel workspaces are counted.  Notation of the formulas: P trainable parameters,
N data-parallel processes, e bytes of a weight (2 for bfloat16, 4 for float32).

Sources: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py and runtime/bf16_optimizer.py; the
ZeRO-2 rows were measured on an H200 with a Qwen3-4B shape (tests/unit/test_memory.py holds the numbers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from hf_dsvllm.errors import Problem
from hf_dsvllm.hardware import Machine
from hf_dsvllm.model_shape import ModelShape

__all__ = ["TrainingMemory", "estimate", "fits"]

Offload = Literal["none", "cpu", "nvme"]
GIB = 2**30
NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # nf4, one uint8 scale per 64 weights, one fp32 per 256 scales (double quant.)
SUB_GROUP = 1_000_000_000  # parameters stepped at once by ZeRO-3: DeepSpeed's default `sub_group_size`
MASTER_BYTES = 4  # fp32 copy of a trainable parameter
ADAM_BYTES = 8.0  # two fp32 moments


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Lower bounds in bytes.  GPU numbers are for one GPU, `host_bytes` and `nvme_bytes` are summed over all processes.

    `gpu_resident_bytes` is held all the time; `gpu_step_peak_bytes` adds what the optimizer step or one gathered layer
    needs on top.  On device "cpu" both are 0 and `host_bytes` holds the step peak of all processes.  `by_part` splits
    one process's share on its device (weights, gradients, optimizer, frozen_weights; the transient optimizer_step,
    gathered, activations).
    """

    gpu_resident_bytes: int
    gpu_step_peak_bytes: int
    host_bytes: int
    nvme_bytes: int
    by_part: Mapping[str, int]
    world_size: int
    device: Literal["cuda", "cpu"]

    @property
    def peak_bytes(self) -> int:
        """peak = max(step peak, resident + gathered + activations), for one GPU or, on CPU, for the whole host.

        Activations are the least a common implementation keeps; offloading them keeps less, so `fits` leaves them out.
        """
        resident = sum(self.by_part[name] for name in RESIDENT)
        step = resident + max(self.by_part["optimizer_step"], self.by_part["gathered"])
        one_process = max(step, resident + self.by_part["gathered"] + self.by_part["activations"])
        if self.device == "cuda":
            return one_process
        return self.host_bytes + (one_process - step) * self.world_size


RESIDENT = ("weights", "gradients", "optimizer", "frozen_weights")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the states of a run live; one row of the table in `state_parts`."""

    zero_stage: int | None
    offload_optimizer: Offload
    offload_param: Offload
    world_size: int
    weight_bytes: int
    fp32_accumulation: bool
    optimizer_state_bytes: float

    def __post_init__(self) -> None:
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise ValueError(f"zero_stage={self.zero_stage} must be None, 0, 1, 2 or 3")
        if self.offload_optimizer != "none" and self.zero_stage in (None, 0):
            raise ValueError(f"offload_optimizer={self.offload_optimizer!r} needs ZeRO-1, 2 or 3")
        if self.offload_param != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_param={self.offload_param!r} needs ZeRO-3")
        if self.world_size < 1:
            raise ValueError(f"world_size={self.world_size} must be at least 1")


def estimate(
    shape: ModelShape,
    *,
    zero_stage: int | None,
    offload_optimizer: Offload = "none",
    offload_param: Offload = "none",
    adapter: Literal["lora", "qlora"] | None = None,
    lora_r: int = 16,
    world_size: int,
    micro_batch_size: int,
    seq_len: int,
    gradient_checkpointing: bool,
    device: Literal["cuda", "cpu"] = "cuda",
    weight_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    fp32_accumulation: bool = True,
    optimizer_state_bytes: float = ADAM_BYTES,
) -> TrainingMemory:
    """Least memory of a training run.

    `zero_stage` None is training without DeepSpeed.  `optimizer_state_bytes` per fp32 parameter: 8 for Adam, 2 for its
    8-bit form, 4 for momentum SGD; offload always means 8 (DeepSpeedCPUAdam).  Raises ValueError for a layout that
    DeepSpeed does not have, ModelShapeError for lora_r < 1.
    """
    weight_bytes = 2 if weight_dtype == "bfloat16" else 4
    layout = Layout(
        zero_stage=zero_stage,
        offload_optimizer=offload_optimizer,
        offload_param=offload_param,
        world_size=world_size,
        weight_bytes=weight_bytes,
        fp32_accumulation=fp32_accumulation,
        optimizer_state_bytes=optimizer_state_bytes,
    )
    trainable = shape.parameters if adapter is None else shape.lora_parameters(lora_r)
    parts = state_parts(layout, trainable)
    parts["frozen_weights"] = frozen_bytes(shape, layout, adapter)
    parts["gathered"] = gathered_bytes(shape, layout, adapter)
    tokens = micro_batch_size * seq_len
    parts["activations"] = activation_bytes(shape, tokens, weight_bytes, checkpointed=gradient_checkpointing)
    by_part = {name: round(size) for name, size in parts.items()}
    resident = sum(by_part[name] for name in RESIDENT)
    step_peak = resident + max(by_part["optimizer_step"], by_part["gathered"])
    host, nvme = offloaded_bytes(shape, layout, trainable, adapter)
    on_gpu = device == "cuda"
    return TrainingMemory(
        gpu_resident_bytes=resident if on_gpu else 0,
        gpu_step_peak_bytes=step_peak if on_gpu else 0,
        host_bytes=host if on_gpu else host + world_size * step_peak,
        nvme_bytes=nvme,
        by_part=by_part,
        world_size=world_size,
        device=device,
    )


def state_parts(layout: Layout, trainable: int) -> dict[str, float]:
    """Bytes of one process for P trainable parameters.

    |                         | weights | gradients  | optimizer      | optimizer step, on top          |
    | ----------------------- | ------- | ---------- | -------------- | ------------------------------- |
    | no DeepSpeed            | eP      | eP         | 2eP            | 0                               |
    | ZeRO-0, e = 2           | 2P      | 2P         | 12P            | 0                               |
    | ZeRO-0, e = 4           | 4P      | 4P         | 8P             | 0                               |
    | ZeRO-1, e accumulation  | eP      | eP/N       | 12P/N          | 6P/N if e = 2                   |
    | ZeRO-1, fp32            | eP      | 4P         | 12P/N          | 0                               |
    | ZeRO-2, e accumulation  | eP      | eP/N       | 12P/N          | 6P/N if e = 2                   |
    | ZeRO-2, fp32            | eP      | 4P/N       | 12P/N          | 0                               |
    | ZeRO-3, e accumulation  | eP/N    | eP/N       | 12P/N          | 6 min(P/N, sub-group) if e = 2  |
    | ZeRO-3, fp32            | eP/N    | 4P/N       | 12P/N          | 4 min(P/N, sub-group)           |

    12 = fp32 copy 4 + Adam 8.  ZeRO-1 holds 2P of gradients more until the last micro-batch of a step.  With the
    optimizer offloaded, gradients, optimizer and step leave the device.
    """
    stage, e, share = layout.zero_stage, layout.weight_bytes, trainable / layout.world_size
    optimizer = layout.optimizer_state_bytes
    if stage is None:
        return parts(trainable, weights=e, gradients=e, optimizer=min(optimizer, 2 * e))
    if stage == 0:
        return parts(trainable, weights=e, gradients=e, optimizer=optimizer + (MASTER_BYTES if e == 2 else 0))
    accumulation = 4 if layout.fp32_accumulation else e
    step_bytes = {
        1: 6 if accumulation == 2 else 0,
        2: 6 if accumulation == 2 else 0,
        3: 6 if accumulation == 2 else 4,
    }[stage]
    stepped = min(share, SUB_GROUP) if stage == 3 else share
    weights = 0 if layout.offload_param != "none" else e * (share if stage == 3 else trainable)
    if layout.offload_optimizer != "none":
        return parts(1, weights=weights, gradients=0, optimizer=0)
    return parts(
        1,
        weights=weights,
        gradients=accumulation * (trainable if stage == 1 and layout.fp32_accumulation else share),
        optimizer=(MASTER_BYTES + optimizer) * share,
        step=step_bytes * stepped,
    )


def parts(count: float, *, weights: float, gradients: float, optimizer: float, step: float = 0) -> dict[str, float]:
    """Bytes per item times `count` items."""
    return {
        "weights": weights * count,
        "gradients": gradients * count,
        "optimizer": optimizer * count,
        "optimizer_step": step * count,
    }


def frozen_bytes(shape: ModelShape, layout: Layout, adapter: str | None) -> float:
    """LoRA: e per base parameter, /N under ZeRO-3, 0 on the device if parameters are offloaded.

    QLoRA: NF4_BYTES per weight of an inner linear and 2 for the rest.  Every process loads all of it, ZeRO-3 or not.
    """
    if adapter is None:
        return 0.0
    if adapter == "qlora":
        return NF4_BYTES * shape.linear_parameters + 2 * (shape.parameters - shape.linear_parameters)
    if layout.offload_param != "none":
        return 0.0
    base = layout.weight_bytes * shape.parameters
    return base / layout.world_size if layout.zero_stage == 3 else base


def gathered_bytes(shape: ModelShape, layout: Layout, adapter: str | None) -> float:
    """ZeRO-3 gathers at least the largest matrix whole; QLoRA dequantises the largest inner linear (2 bytes each)."""
    if adapter == "qlora":
        return 2.0 * max(linear.inputs * linear.outputs for linear in shape.linears if linear.kind != "lm_head")
    split = layout.world_size > 1 or layout.offload_param != "none"
    return float(layout.weight_bytes * shape.largest_matrix) if layout.zero_stage == 3 and split else 0.0


def activation_bytes(shape: ModelShape, tokens: int, weight_bytes: int, *, checkpointed: bool) -> float:
    """layer = e * tokens * (2h + 2q + 2kv + i): the inputs of matrix products and of attention alone.

    full = L * layer;  checkpointed = L * e * tokens * h + layer.  q and kv are the widths of queries and of keys; i is
    left out for mixtures of experts, whose share per token depends on routing.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = 0 if shape.experts else shape.intermediate
    layer = weight_bytes * tokens * (2 * shape.hidden + 2 * query + 2 * key + inner)
    if checkpointed:
        return float(shape.layers * weight_bytes * tokens * shape.hidden + layer)
    return float(shape.layers * layer)


def offloaded_bytes(shape: ModelShape, layout: Layout, trainable: int, adapter: str | None) -> tuple[int, int]:
    """Bytes in host memory and on NVMe, summed over processes.

    optimizer = (4 fp32 copy + 8 Adam + 4 fp32 gradients) P, and eP staging in host memory (18P for bfloat16);
    parameters = e * all of them (with QLoRA only the adapters: 4-bit weights stay on the device).
    With the optimizer on NVMe the sum of a step's gradients, eP, stays in host memory; buffers are not counted.
    """
    e = layout.weight_bytes
    moved = trainable if adapter == "qlora" else shape.parameters
    host = nvme = 0
    if layout.offload_optimizer == "cpu":
        host += (16 + e) * trainable
    elif layout.offload_optimizer == "nvme":
        host += e * trainable
        nvme += 16 * trainable
    if layout.offload_param == "cpu":
        host += e * moved
    elif layout.offload_param == "nvme":
        nvme += e * moved
    return host, nvme


def fits(memory: TrainingMemory, machine: Machine) -> list[Problem]:
    """What certainly does not fit; an empty list promises nothing.

    Activations are left out (they can be offloaded, or made smaller by a smaller batch).  Of several nodes, the host
    carries the share of its own GPUs.  A size that is not known (RAM of a named machine) is not checked.
    """
    problems: list[Problem] = []
    if machine.gpus and memory.gpu_step_peak_bytes:
        smallest = min(machine.gpus, key=lambda gpu: gpu.memory_bytes)
        if memory.gpu_step_peak_bytes > smallest.memory_bytes:
            problems.append(
                Problem(
                    what=f"training needs at least {gib(memory.gpu_step_peak_bytes)} on each GPU before any activation "
                    f"({describe_parts(memory.by_part)}), but {smallest.name} has {gib(smallest.memory_bytes)}",
                    fix="shard or offload more (zero3, zero3_offload), train adapters (lora, qlora), use more GPUs, "
                    "or take a smaller model",
                )
            )
    local = min(1.0, len(machine.gpus) / memory.world_size) if memory.device == "cuda" and machine.gpus else 1.0
    if machine.ram_bytes is not None and memory.host_bytes * local > machine.ram_bytes:
        detail = (
            f" ({describe_parts(memory.by_part)}, in each of {memory.world_size})" if memory.device == "cpu" else ""
        )
        problems.append(
            Problem(
                what=f"training needs at least {gib(memory.host_bytes * local)} of host memory{detail}, "
                f"but this process may use {gib(machine.ram_bytes)}",
                fix="offload less or to NVMe (zero3_nvme), train adapters (lora, qlora), start fewer processes, "
                "or take a smaller model",
            )
        )
    return problems


def describe_parts(by_part: Mapping[str, int]) -> str:
    """The parts that count, largest first: `optimizer 45.0 GiB, weights 7.5 GiB`."""
    names = sorted((name for name in by_part if name != "activations"), key=lambda name: -by_part[name])
    return ", ".join(f"{name.replace('_', ' ')} {gib(by_part[name])}" for name in names if by_part[name])


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
