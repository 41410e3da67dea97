"""What the records of an arm say: tokens per second, share of the measured matmul rate, memory, and the prediction."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from arms import Arm
from matrix import HEAD_DIM, SHAPES, VOCAB

from hf_dsvllm.errors import DsvllmError
from hf_dsvllm.model_shape import ModelShape, shape_from_config
from hf_dsvllm.planner.cards import Rates, from_record, rates_of
from hf_dsvllm.planner.footprint import Setup, gpu_footprint
from hf_dsvllm.planner.speed import step_time
from hf_dsvllm.presets import get_preset

__all__ = ["Figures", "figures", "flops_per_token", "rates_from", "shape_of"]

GIB = 2**30
WARM_UP, WARM_UP_COMPILED = 2, 4  # steps that load kernels, or compile them
PLAIN_PRESETS = {"z2": "zero2", "z3": "zero3", "z2o": "zero2_offload", "z3o": "zero3_offload"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One arm; None where it ended before, or where nothing predicts it.  Tokens are those of one GPU."""

    arm: Arm
    status: str
    message: str
    step_seconds: float | None = None
    real_tokens_per_second: float | None = None
    padded_tokens_per_second: float | None = None
    real_share: float | None = None
    mfu: float | None = None
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    host_gib: float | None = None
    last_loss: float | None = None
    predicted_seconds: float | None = None
    predicted_gib: float | None = None
    retries: int = 0


def flops_per_token(shape: ModelShape, length: float, adapter: str | None) -> float:
    """flops = (6 or 4) * N_matmul + 6 * layers * heads * head_dim * length

    N_matmul: parameters that multiply every token, so without the input embedding (a lookup) but with the output head.
    6 = 2 forward + 4 backward; a frozen weight has no gradient of its own, so 4 with adapters, whose own products are
    left out.  The second term is causal attention, forward and backward: half of 12 (PaLM, appendix B).  For sequences
    of several lengths `length` is sum(l^2) / sum(l).  Recomputation is not counted as work.
    """
    parameters = shape.parameters - (0 if shape.tied else shape.embedding_parameters)
    return (4 if adapter else 6) * parameters + 6 * shape.layers * shape.heads * shape.head_dim * length


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
            "head_dim": 32 if name == "tiny" else HEAD_DIM,
            "vocab_size": 1024 if name == "tiny" else VOCAB,
            "tie_word_embeddings": tied,
        }
    )


def rates_from(record: Mapping[str, Any]) -> Rates:
    """The rates of the host of the arms; the catalogue's H200 where they are missing."""
    one = record.get("one") or {}
    if "matmul_flops" not in one:
        return rates_of("H200")
    links = {name: found for name, found in record.items() if name.startswith("collectives") and "world" in found}
    return from_record({**one, "collectives": links})


def figures(record: Mapping[str, Any], rates: Rates) -> Figures:
    """A row of cells.json → what the table shows.

    Speed is that of the steps after the warm-up: all their tokens over all their seconds, so that a mix of lengths
    counts as it is.
    """
    fields = dict(record["cell"])
    for name in ("words", "features"):
        fields[name] = tuple(fields[name])
    arm = Arm(**{**fields, "deepspeed": tuple(map(tuple, fields["deepspeed"]))})
    ranks: Sequence[Mapping[str, Any]] = record["ranks"]
    predicted, memory = prediction(arm, rates)
    base = Figures(
        arm=arm,
        status=record["status"],
        message=record.get("message", ""),
        predicted_seconds=predicted,
        predicted_gib=memory,
    )
    skip = 0 if arm.ladder else WARM_UP_COMPILED if arm.compile else WARM_UP
    if record["status"] != "ok" or not ranks or len(ranks[0]["steps"]) <= skip:
        return base
    steps = [[step for step in rank["steps"][skip:] if "real" in step] for rank in ranks]
    seconds = sum(step["seconds"] for step in steps[0])
    real, padded, squares = (sum(step[key] for rank in steps for step in rank) for key in ("real", "padded", "squares"))
    per_gpu = real / seconds / arm.world
    if "long_context" in arm.preset:  # every process counts its slice of the sequence
        squares = real * arm.length
    flops = flops_per_token(shape_of(arm.shape), squares / real, arm.adapter)
    losses = ranks[0].get("losses") or [None]
    return dataclasses.replace(
        base,
        step_seconds=statistics.median(step["seconds"] for step in steps[0]),
        real_tokens_per_second=per_gpu,
        padded_tokens_per_second=padded / seconds / arm.world,
        real_share=real / padded,
        mfu=per_gpu * flops / rates.product_flops,
        allocated_gib=peak(ranks, "allocated_peak"),
        reserved_gib=peak(ranks, "reserved_peak"),
        host_gib=sum(max(phase["rss_peak"] for phase in rank["phases"].values()) for rank in ranks) / GIB,
        last_loss=losses[-1],
        retries=max(int(rank.get("retries", 0)) for rank in ranks),
    )


def peak(ranks: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The highest of all ranks and phases from the first step on, in GiB; None on CPUs."""
    found = [
        phase[name]
        for rank in ranks
        for kind, phase in rank["phases"].items()
        if name in phase and kind not in ("load", "init")
    ]
    return max(found) / GIB if found else None


def prediction(arm: Arm, rates: Rates) -> tuple[float | None, float | None]:
    """Seconds of a step and GiB of a GPU by the planner; None for a mix, compiled code and what it lacks."""
    if arm.mix or arm.compile or arm.recompute == "selective":
        return None, None
    try:
        preset = get_preset(PLAIN_PRESETS.get(arm.preset, arm.preset))
    except DsvllmError:
        return None, None
    shape = shape_of(arm.shape)
    setup = Setup(
        shape=shape,
        preset=preset,
        world=arm.world,
        micro=arm.micro,
        accumulation=arm.accumulation,
        length=arm.length,
        recompute=arm.recompute == "full",
        lora_dropout=False,
        device="cuda",
        features=frozenset(arm.features),
    )
    return step_time(setup, rates).seconds, gpu_footprint(setup).peak / GIB
