"""Weights, gradients, optimizer states and communication buffers on one GPU, by phase; arithmetic only.

Notation and sources as in `footprint`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hf_dsvllm.features import PIECE, REDUCED_AT_ONCE, SLOT, SLOTS
from hf_dsvllm.memory import NF4_BYTES, SUB_GROUP
from hf_dsvllm.planner.setup import Setup
from hf_dsvllm.presets import Preset

__all__ = ["States", "bucket_elements"]

DEFAULT_BUCKET = 500_000_000  # elements, DeepSpeed's own
# The allocator hands out a cached block whole if at most 1 MiB of it would be left over: half of that, on average, for
# each 4-bit tensor (c10/cuda/CUDACachingAllocator.cpp, kSmallSize).
BLOCK_WASTE_BYTES = 2**19
# Bytes a parameter: states beyond Adam's; most in a step, beyond states and gradients; most in the empty first step.
# benchmarks/results/2026-11-28-training-speed-offload-2xH200.json, phases `optimizer` and `init`
ONEBIT_STEP = {"onebit_adam": (0, 10, 12), "zero_one_adam": (4, 14, 12), "onebit_lamb": (4, 16, 14)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Weights, gradients, optimizer states and communication buffers at the moments that matter."""

    loaded: float
    init: Mapping[str, float]
    resident: Mapping[str, float]
    gradients: Mapping[str, float]
    earlier: Mapping[str, float]
    buffer: Mapping[str, float]
    at_reduction: Mapping[str, float]
    buckets: Mapping[str, float]
    waiting: Mapping[str, float]
    tail: Mapping[str, float]
    step: Mapping[str, float]

    @classmethod
    def of(cls, setup: Setup) -> States:
        stage = setup.preset.zero_stage
        if setup.preset.needs_onebit:
            return onebit_states(setup)
        if stage is None or stage == 0:
            return plain_states(setup)
        return zero3_states(setup) if stage == 3 else zero12_states(setup)


def frozen(setup: Setup) -> float:
    """Frozen weights of one process: bf16 2F, under ZeRO-3 2F/N; 4-bit as `memory.NF4_BYTES` and 2 for the rest."""
    shape = setup.shape
    if setup.method == "full":
        return 0.0
    if setup.method == "qlora":
        quantised = sum(linear.count for linear in shape.linears if linear.kind != "lm_head")
        return (
            NF4_BYTES * shape.linear_parameters
            + 2 * (shape.parameters - shape.linear_parameters)
            + BLOCK_WASTE_BYTES * quantised
        )
    if setup.preset.offload_param != "none":
        return 0.0
    whole = float(setup.numerics.weight_bytes * shape.parameters)
    return whole / setup.world if setup.preset.zero_stage == 3 else whole


def plain_states(setup: Setup) -> States:
    """Without ZeRO: weights, moments, gradients that come and go; DistributedDataParallel's buckets twice.

    tail: the embedding's gradient beside the output head's, if they are tied.
    """
    numerics, trainable = setup.numerics, setup.trainable
    e = numerics.weight_bytes if setup.method == "full" else numerics.adapter_bytes
    base = frozen(setup)
    weights = e * trainable + base
    ddp = float(e * trainable if setup.world > 1 else 0)
    return States(
        loaded=weights if setup.method == "full" else base,
        init={"weights": weights, "DDP buckets": ddp},
        resident={"weights": weights, "optimizer": moments(setup, e) * trainable, "DDP buckets": ddp},
        gradients={"gradients": float(e * trainable)},
        earlier={"gradients": float(e * trainable)},
        buffer={},
        at_reduction={},
        buckets={},
        waiting={"tied gradient": float(e * largest_gradient(setup) if setup.shape.tied else 0)},
        tail={"large gradients": float((2 if tied_sum_is_new(setup) else 1) * e * largest_gradient(setup))},
        step={},
    )


def onebit_states(setup: Setup) -> States:
    """DeepSpeed's 1-bit optimizers: nothing sharded, fp32 master weights, errors of the compression.

    resident: weights 2P, master weights 4P, moments 8P (LAMB a second variance, 0/1 Adam an accumulator: 4P more),
    errors 4P + 4P/N.  step: the fp32 gradient and what packing and unpacking signs takes, as `ONEBIT_STEP` measured.
    init: a first step with empty gradients, packing and all.  Counted with 1.7e9 parameters on 2 H200s.
    """
    e, trainable = setup.numerics.weight_bytes, setup.trainable
    more, step, packing = ONEBIT_STEP[setup.preset.name]
    weights, errors = float(e * trainable), (4 + 4 / setup.world) * trainable
    optimizer = (12.0 + more) * trainable
    return States(
        loaded=weights,
        init={"weights": weights, "optimizer": optimizer, "errors": errors, "optimizer step": packing * trainable},
        resident={"weights": weights, "optimizer": optimizer, "errors": errors},
        gradients={"gradients": weights},
        earlier={"gradients": weights},
        buffer={},
        at_reduction={},
        buckets={},
        waiting={},
        tail={"large gradients": float(e * largest_gradient(setup))},
        step={"optimizer step": step * trainable},
    )


def moments(setup: Setup, stepped: int) -> float:
    """Bytes of optimizer state for each parameter of `stepped` bytes: moments are of its dtype, 8 bits stay 8 bits."""
    return setup.optimizer_bytes * (stepped / 4 if setup.optimizer_bytes >= 4 else 1)


def tied_sum_is_new(setup: Setup) -> bool:
    """On CPUs the sum of a tied gradient's two halves is a third tensor (aten.add, counted with torch 2.13)."""
    return setup.device == "cpu" and setup.shape.tied


def zero12_states(setup: Setup) -> States:
    """ZeRO-1 and 2.

    init: the weights and their flat copy (Z12:449-510), then fp32 master weights 4P/N and a dummy gradient 4P/N.
    gradients, fp32 accumulation: one buffer of 4P/N, made at the first reduction (Z12, compact partition buffer).
    bf16 accumulation: 2P/N, and at the step flattened 2P/N and as fp32 4P/N  (Z12:3117).
    ZeRO-1 keeps what it steps, 2P/N, in a buffer that the rank makes when the first gradient of its share is reduced
    (Z12:2184, copy_grads_in_partition): the rank of the last share makes it before any layer is gone.  Before the last
    micro-batch nothing is reduced, and whole gradients 2P wait (Z12, reduce_ready_partitions_and_remove_grads).
    Buckets: two of bf16 elements (overlap), made whole at the first gradient, however few are trained (Z12,
    setup_buckets); on CPUs one, whose untouched pages are no memory.
    at_reduction and tail: gradients larger than a bucket (output head, embedding) are reduced on their own; the rank
    that owns them adds them to its buffer, under ZeRO-2 as fp32: e [+ 4] bytes.  A tied head's waits in autograd for
    the embedding's.
    step: the norm is taken in fp64 of one gradient at a time (get_norm_dtype): 8 bytes of the largest.
    offload: a buffer of the largest gradient stays (Z12:659); with `gpu_gradients` the sum of gradients, 2P/N.
    """
    preset, shape, world = setup.preset, setup.shape, setup.world
    trainable = setup.trainable
    share = trainable / world
    low = has(preset, "bf16.bf16_optimizer_states", True)
    fp32 = has(preset, "data_types.grad_accum_dtype", "fp32")
    offload = preset.offload_optimizer != "none"
    e = setup.numerics.weight_bytes
    base = frozen(setup)
    weights = e * trainable + base
    bucket = bucket_elements(preset)
    ipg = {"buckets": float(2 * bucket * e if setup.device == "cuda" else min(bucket, trainable) * e)}
    master = 2 if low else 4
    largest = largest_gradient(setup)
    alone = largest if largest > bucket else 0
    stepped = (master + moments(setup, master)) * share
    resident = {"weights": weights, "optimizer": 0.0 if offload else stepped}
    if offload:
        resident["offload buffer"] = float(e * largest) + passing(setup, share)
        kept, step = (e * share if setup.sums_on_gpu else 0.0), 0.0
    elif preset.zero_stage == 1:
        kept, step = e * share, (2.0 + 4.0) * share
    elif fp32:
        kept, step = 4 * share, 0.0
    else:
        kept, step = 2 * share, (2 if low else 6) * share
    norm = 8.0 * min(largest, share) if setup.device == "cuda" and not offload else 0.0
    added = float(e * alone + (4 * min(alone, share) if preset.zero_stage == 2 and fp32 else 0))
    tied = float(e * largest) if shape.tied else 0.0
    whole = {"earlier gradients": float(e * trainable)}
    return States(
        loaded=weights if setup.method == "full" else base,
        init={"weights": weights, "flat copy": 0.0 if offload else max(float(e * trainable), 2 * master * share)},
        resident=resident,
        gradients={"gradients": kept},
        earlier=whole if preset.zero_stage == 1 else {"gradients": kept},
        buffer={"gradients": kept},
        at_reduction={"gradients": kept, "large gradients": added} if alone and not shape.tied else {},
        buckets=ipg,
        waiting={"tied gradient": tied},
        tail={"large gradients": added + tied},
        step={"optimizer step": max(step, norm)},
    )


def passing(setup: Setup, share: float) -> float:
    """With `overlap_offload`: gradients on their way to the host, and weights on theirs back, in fp32."""
    on_gpu = setup.overlaps_offload and setup.device == "cuda"
    return 4.0 * (SLOTS * min(SLOT, share) + min(PIECE, share)) if on_gpu else 0.0


def has(preset: Preset, key: str, value: object) -> bool:
    """Whether a preset sets a DeepSpeed key to this value."""
    return any(setting.key == key and setting.value == value for setting in preset.deepspeed)


def largest_gradient(setup: Setup) -> int:
    """Elements of the largest single gradient: the embedding's, and of the same size the output head's."""
    return setup.shape.vocab * setup.shape.hidden if setup.method == "full" else 0


def bucket_elements(preset: Preset) -> int:
    """`reduce_bucket_size` of the preset, DeepSpeed's default without; "auto" is hidden_size squared (ZeRO-3 only)."""
    found = next((s.value for s in preset.deepspeed if s.key == "zero_optimization.reduce_bucket_size"), DEFAULT_BUCKET)
    return found if isinstance(found, int) else DEFAULT_BUCKET


def zero3_states(setup: Setup) -> States:
    """ZeRO-3: everything in shards.

    gradients: a flat buffer of 2P/N that stays; bucket: hidden squared in bf16, one, with `whole_layers` its own size.
    init: no Adam moments yet.
    step: for one sub-group of at most 1e9 elements at a time, the gradient as fp32 and flattened: 6 bytes (Z3:2686).
    A layer that is gathered whole (`whole_layers`) keeps its gradients until its backward pass ends.
    """
    preset, world, shape = setup.preset, setup.world, setup.shape
    trainable = setup.trainable
    share = trainable / world
    e = setup.numerics.weight_bytes
    base = frozen(setup)
    weights = (0.0 if preset.offload_param != "none" else e * share) + base
    bucket = {"buckets": float(e * (min(REDUCED_AT_ONCE, trainable) if setup.whole_layers else shape.hidden**2))}
    if preset.offload_optimizer != "none":
        optimizer = master = step = 0.0
        kept = e * share if setup.sums_on_gpu else 0.0
    else:
        optimizer, master, kept = (4 + moments(setup, 4)) * share, 4 * share, e * share
        step = (6 if e == 2 else 4) * min(share, SUB_GROUP)
    buffer = {"offload buffer": passing(setup, share)} if setup.overlaps_offload else {}
    largest = float(e * shape.largest_matrix) if setup.method == "full" else 0.0
    layer = float(e * setup.layer_parameters) if setup.method == "full" and setup.whole_layers else 0.0
    return States(
        loaded=(weights if setup.method == "full" else base) + largest,
        init={"weights": weights, "optimizer": master, "gradients": kept, "flat copy": largest},
        resident={"weights": weights, "optimizer": optimizer, "gradients": kept, **bucket, **buffer},
        gradients={},
        earlier={},
        buffer={},
        at_reduction={"a layer's gradients": layer},
        buckets={},
        waiting={"tied gradient": largest if shape.tied else 0.0, "a layer's gradients": layer},
        tail={"large gradients": largest},
        step={"optimizer step": step},
    )
