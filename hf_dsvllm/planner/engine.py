"""The vLLM process of a run: where it may be, and what it takes there; arithmetic only.

As `hf_dsvllm.placement`, `engine_size` and `engine_start` do it; `tests/unit/test_plan_engine.py` holds the constants
against theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from hf_dsvllm.model_shape import ModelShape

__all__ = ["Engine", "EnginePlace", "engine_footprint", "places"]

GIB = 2**30
Kind = Literal["none", "shared", "spare"]
# vLLM 0.26 on an H200, 8B: left on the card at sleep level 2, and what it takes beside weights and KV cache when awake.
ASLEEP_BYTES = int(2.0 * GIB)
WORK_BYTES = int(3.0 * GIB)
CONCURRENT_SEQUENCES = 64  # engine_size: what a run reserves its cache for; further answers wait for their turn
LEAST_KV_BYTES, MOST_KV_BYTES = GIB, 8 * GIB  # engine_size
WEIGHTS_SHARE = {"spare": 0.8, "shared": 0.4}  # engine_size: of a GPU, what the weights may take
SIZES = (1, 2, 4, 8)  # of tensor parallel, and of copies


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlace:
    """Where vLLM answers: nowhere, beside the trainer, or on GPUs of its own; and whether it sleeps.

    `gpus` are those of one copy of the engine (tensor parallel); `copies` share the prompts (data parallel).

    Only a shared engine that is sent its weights from GPU to GPU sleeps between evaluations; else it keeps its memory.
    """

    kind: Kind = "none"
    gpus: int = 1
    copies: int = 1
    sleeps: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Bytes on each of its GPUs while it answers and while it sleeps; of the first, weights and KV cache."""

    awake: int
    asleep: int
    weights: int
    kv_bytes: int
    allowed_weights: int

    @property
    def starts(self) -> bool:
        """Whether the run would start it: it refuses weights beyond a share of the card."""
        return self.weights <= self.allowed_weights


def engine_footprint(shape: ModelShape, place: EnginePlace, *, length: int, card_bytes: int) -> Engine:
    """awake = 2 * all parameters / GPUs + kv + workspace;  kv = 64 * length * 4 * layers * kv_heads * head_dim.

    Between 1 and 8 GiB of cache on each GPU (vLLM's --kv-cache-memory-bytes); asleep at level 2 the process's own.
    """
    kv = CONCURRENT_SEQUENCES * length * 4 * shape.layers * shape.kv_heads * shape.head_dim
    kv = min(max(kv, LEAST_KV_BYTES), MOST_KV_BYTES)
    weights = 2 * shape.parameters // place.gpus
    return Engine(
        awake=weights + kv + WORK_BYTES,
        asleep=ASLEEP_BYTES if place.sleeps else weights + kv + WORK_BYTES,
        weights=weights,
        kv_bytes=kv,
        allowed_weights=int(WEIGHTS_SHARE.get(place.kind, 1.0) * card_bytes),
    )


def places(shape: ModelShape, gpus: int, card_bytes: int, *, streams: bool | None) -> Iterator[tuple[int, EnginePlace]]:
    """Processes that train and where vLLM is: beside them, awake or asleep, or in 1 to 8 copies on cards taken off.

    `streams` as asked for, None where it may be chosen.
    """
    beside = tensor_parallel(shape, "shared", gpus, card_bytes)
    for sleeps in (False, True) if streams is None else (streams,):
        yield gpus, EnginePlace(kind="shared", gpus=beside, sleeps=sleeps)
    least = tensor_parallel(shape, "spare", gpus - 1, card_bytes)
    for copies in SIZES:
        if copies * least < gpus:
            yield gpus - copies * least, EnginePlace(kind="spare", gpus=least, copies=copies)


def settled_place(shape: ModelShape, kind: Kind, gpus: int, card_bytes: int, *, streams: bool) -> EnginePlace:
    """The place of a run whose processes are settled: as many of `gpus` as its weights need, all of them if spare."""
    of_one = tensor_parallel(shape, kind, gpus, card_bytes)
    return EnginePlace(
        kind=kind,
        gpus=of_one,
        copies=gpus // of_one if kind == "spare" else 1,
        sleeps=streams and kind == "shared",
    )


def tensor_parallel(shape: ModelShape, kind: Kind, gpus: int, card_bytes: int) -> int:
    """The fewest GPUs that hold the weights (engine_size.gpus_needed); the most there are where none is enough."""
    sizes = possible_sizes(shape, gpus)
    enough = (size for size in sizes if 2 * shape.parameters / size <= WEIGHTS_SHARE[kind] * card_bytes)
    return next(enough, max(sizes, default=1))


def possible_sizes(shape: ModelShape, gpus: int) -> list[int]:
    """Tensor parallel sizes that divide the attention heads."""
    return [size for size in SIZES if size <= gpus and shape.heads % size == 0]
