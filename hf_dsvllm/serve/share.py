"""Several vLLM servers on the GPUs of a host: which one runs where, and how much memory each may take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_dsvllm.errors import DsvllmError, EngineError
from hf_dsvllm.hardware import Gpu
from hf_dsvllm.model_shape import ModelShape, load_shape

__all__ = ["Need", "Share", "need_of", "share_gpus"]

GIB = 1 << 30
USABLE = 0.92  # vLLM's own default of --gpu-memory-utilization
# CUDA context and graphs (0.9 to 2.0 GiB measured with vLLM 0.26 on an H200) and the activations of its profiling run.
RESERVE_BYTES = 4 * GIB
FEWEST_TOKENS = 8192  # of cache: below it a server answers hardly more than one long prompt at a time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one server must hold: its weights, and the cache of one token.  `heads` bounds tensor parallelism."""

    name: str
    weights_bytes: int
    kv_bytes_per_token: int
    heads: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Where one server runs: GPUs by number, and its part of each (None: alone there, vLLM's default)."""

    gpus: tuple[int, ...]
    utilization: float | None


def need_of(model: str, name: str, revision: str | None = None) -> Need:
    """From the model's files and config.json, in 16 bit."""
    try:
        shape = load_shape(model, revision=revision)
    except DsvllmError as error:
        raise EngineError(f"The memory of {name} cannot be planned beside other models: {error}") from error
    files = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    return Need(
        name=name,
        weights_bytes=files or _parameters(shape) * 2,
        kv_bytes_per_token=2 * shape.layers * shape.kv_heads * shape.head_dim * 2,
        heads=shape.heads,
    )


def share_gpus(needs: Sequence[Need], gpus: Sequence[Gpu]) -> tuple[Share, ...]:
    """A share for each server, in the order of `needs`.

    Each gets GPUs of its own while there are enough (several, where its weights need them).  Otherwise those that need
    several get them, and the others share what is left: the largest first, each on the GPU with the most memory left.
    Those that meet on one GPU divide it: their weights, a reserve, and the rest so that all can cache as many tokens.
    EngineError if they do not fit.
    """
    widths = dict(enumerate(_width(need, gpus) for need in needs))
    crowded = sum(widths.values()) > len(gpus)
    apart = [position for position, width in widths.items() if width > 1 or not crowded]
    others = [position for position in widths if position not in apart]
    left = list(gpus)
    shares: dict[int, Share] = {}
    for position in apart:
        taken, left = left[: widths[position]], left[widths[position] :]
        shares[position] = Share(gpus=tuple(gpu.index for gpu in taken), utilization=None)
    if sum(widths[position] for position in apart) > len(gpus) or (others and not left):
        raise EngineError(_too_few(needs, widths, len(gpus)))
    places = _placed({position: needs[position] for position in others}, left)
    for gpu in left:
        here = [position for position in others if places[position] == gpu.index]
        parts = _divided([needs[position] for position in here], gpu)
        for position, part in zip(here, parts, strict=True):
            shares[position] = Share(gpus=(gpu.index,), utilization=part if len(here) > 1 else None)
    return tuple(shares[position] for position in widths)


def _too_few(needs: Sequence[Need], widths: Mapping[int, int], count: int) -> str:
    wide = [f"{needs[position].name} needs {width}" for position, width in widths.items() if width > 1]
    others = [needs[position].name for position, width in widths.items() if width == 1]
    beside = f", and {', '.join(others)} another" if others else ""
    return f"{', '.join(wide)} GPUs of its own{beside}; there are {count}. Serve fewer models, or use more GPUs."


def _width(need: Need, gpus: Sequence[Gpu]) -> int:
    """GPUs one model needs: the fewest, a power of two that divides its heads, that hold its weights and a cache."""
    room = min(gpu.memory_bytes for gpu in gpus) * USABLE - RESERVE_BYTES
    width = 1
    while need.weights_bytes + FEWEST_TOKENS * need.kv_bytes_per_token > width * room:
        width *= 2
        if width > len(gpus) or need.heads % width:
            raise EngineError(
                f"{need.name} has {need.weights_bytes / GIB:.1f} GiB of weights, more than {len(gpus)} GPUs of "
                f"{min(gpu.memory_bytes for gpu in gpus) / GIB:.0f} GiB can hold (it can be cut into parts that divide "
                f"its {need.heads} heads); serve it on a larger machine."
            )
    return width


def _placed(needs: Mapping[int, Need], gpus: Sequence[Gpu]) -> dict[int, int]:
    """Position of a server -> index of its GPU; the largest first, each where the most memory is left."""
    left = {gpu.index: gpu.memory_bytes for gpu in gpus}
    places: dict[int, int] = {}
    for position in sorted(needs, key=lambda each: -needs[each].weights_bytes):
        index = max(left, key=lambda each: left[each])
        places[position] = index
        left[index] -= needs[position].weights_bytes + RESERVE_BYTES
    return places


def _divided(needs: Sequence[Need], gpu: Gpu) -> list[float]:
    """`share = (weights + reserve + tokens * kv_bytes_per_token) / memory`, with the same tokens for all."""
    if not needs:
        return []
    fixed = sum(need.weights_bytes + RESERVE_BYTES for need in needs)
    tokens = (USABLE * gpu.memory_bytes - fixed) / sum(need.kv_bytes_per_token for need in needs)
    if tokens < FEWEST_TOKENS:
        listed = ", ".join(f"{need.name} {need.weights_bytes / GIB:.1f} GiB" for need in needs)
        raise EngineError(
            f"{listed} of weights do not fit one GPU of {gpu.memory_bytes / GIB:.0f} GiB together: with "
            f"{RESERVE_BYTES / GIB:.0f} GiB for each server there is room for {max(0, int(tokens))} tokens of cache, "
            f"and {FEWEST_TOKENS} are needed. Serve fewer models, adapters of one base, or use more GPUs."
        )
    shares = [need.weights_bytes + RESERVE_BYTES + tokens * need.kv_bytes_per_token for need in needs]
    return [math.floor(share / gpu.memory_bytes * 1000) / 1000 for share in shares]


def _parameters(shape: ModelShape) -> int:
    return int(sum(linear.inputs * linear.outputs * linear.count for linear in shape.linears)
               + shape.embedding_parameters + shape.norm_parameters + shape.expert_parameters)  # fmt: skip
