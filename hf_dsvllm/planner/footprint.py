"""Bytes of one training run by phase, on one GPU; arithmetic only.

States follow the table of `hf_dsvllm.memory.state_parts`; activations come from `activations`; what is transient
(buckets, gathered layers, the output head's gradients) is named and derived here, each with its source in
deepspeed 0.19.8 (Z12 = runtime/zero/stage_1_and_2.py, Z3 = runtime/zero/stage3.py), trl 1.16
(kernels/chunked_logprob.py) or PyTorch.
Notation: P trainable parameters, F frozen ones, N processes, V vocabulary, h hidden, t tokens of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hf_dsvllm.features import LAYERS_AT_ONCE
from hf_dsvllm.model_shape import ModelShape
from hf_dsvllm.planner.activations import Traced, checkpoint_bytes, working_bytes
from hf_dsvllm.planner.setup import Loss, Setup
from hf_dsvllm.planner.states import States, bucket_elements

__all__ = ["PHASES", "Footprint", "Loss", "Setup", "Traced", "between_steps", "gpu_footprint"]

PHASES = ("load", "init", "forward", "backward", "optimizer")
TILE_BYTES = 4096 * 32768 * 2  # trl/kernels/chunked_logprob.py: TOKEN_CHUNK_SIZE x _CHUNKED_LOGPROB_CHUNK_SIZE in bf16
MAX_REUSE = 1_000_000_000  # elements; DeepSpeed's default `stage3_max_reuse_distance`: what is used again soon stays


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Peak bytes on one GPU by phase, and what the highest phase is made of."""

    allocated: Mapping[str, int]
    parts: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> int:
        return max(self.allocated.values())

    @property
    def peak_phase(self) -> str:
        return max(self.allocated, key=lambda phase: self.allocated[phase])


def between_steps(setup: Setup, found: Footprint) -> int:
    """Bytes that stay between two steps: of gradients only ZeRO-3's buffer.

    8B on H200s under ZeRO-2: 45.96 GiB with one GPU and SGD, the same with three and Adam, weights and optimizer alone.
    """
    gone = {"optimizer step"} if setup.preset.zero_stage == 3 else {"optimizer step", "gradients"}
    return sum(size for name, size in found.parts["optimizer"].items() if name not in gone)


def gpu_footprint(setup: Setup) -> Footprint:
    """Bytes allocated by phase.  On CPUs the same sums are those of the process's tensors in host memory.

    The backward pass has six moments: the output head's gradients; the first layer; the reduction of an output head
    larger than a bucket; the first layer after the first reduction, which makes the buffer for gradients; the last
    layer, when only its own activations are left; and the embedding's gradient at the very end.  With accumulation the
    gradients of earlier micro-batches are there from the beginning.
    """
    states = States.of(setup)
    live = activation_parts(setup)
    earlier = states.earlier if setup.accumulation > 1 else {}
    parts: dict[str, dict[str, float]] = {
        "load": {"weights": states.loaded},
        "init": dict(states.init),
        "forward": {**states.resident, **earlier, **live.forward},
        "backward": highest(
            {**states.resident, **earlier, **live.head},
            {**states.resident, **earlier, **states.buckets, **states.waiting, **live.layer},
            {**states.resident, **earlier, **states.at_reduction, **states.buckets, **live.reduction},
            {**states.resident, **earlier, **states.buffer, **states.buckets, **states.waiting, **live.reduced},
            {**states.resident, **states.gradients, **states.buckets, **live.last},
            {**states.resident, **states.gradients, **states.buckets, **states.tail},
        ),
        "optimizer": {**states.resident, **states.gradients, **states.step},
    }
    rounded = {phase: {name: round(size) for name, size in found.items() if size} for phase, found in parts.items()}
    return Footprint(allocated={phase: sum(found.values()) for phase, found in rounded.items()}, parts=rounded)


def highest(*moments: Mapping[str, float]) -> dict[str, float]:
    """The moment with the largest sum."""
    return dict(max(moments, key=lambda moment: sum(moment.values())))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """Activations at the moments of `gpu_footprint`."""

    forward: Mapping[str, float]
    head: Mapping[str, float]
    layer: Mapping[str, float]
    reduction: Mapping[str, float]
    reduced: Mapping[str, float]
    last: Mapping[str, float]


def activation_parts(setup: Setup) -> Live:
    """Saved tensors and what is transient on top.

    saved = t * (L * layer + final norm and hidden states), with recompute L * checkpoint instead of L * layer.  On top:
    forward and head the loss's transients; a layer's backward its working set, with recompute its own saved
    tensors too.
    At the first reduction `layers_before_reduction` layers are gone.
    """
    shape, numerics, tokens = setup.shape, setup.numerics, setup.tokens
    layer = float(setup.layer_bytes * tokens)
    kept = float(checkpoint_bytes(shape, numerics) * tokens) if setup.recompute else layer
    wide = 4 if numerics.weight_bytes == 4 else 2
    final = float(tokens * shape.hidden * ((4 if numerics.method != "full" else 4 + wide) + 2 * wide))
    casts = 2.0 * shape.linear_parameters if numerics.mixed else 0.0  # bf16 copies live as long as the forward pass
    gathered = gathered_bytes(setup)
    loss_forward, loss_backward, plain_saved = loss_bytes(setup)
    everything = {"activations": shape.layers * kept + final, "autocast copies": casts, "gathered": gathered}
    working = float(working_bytes(shape, numerics) * tokens)
    one = {"one layer": layer + working} if setup.recompute else {"one layer": working}
    own = 1 if setup.recompute else 0
    gone = min(layers_before_reduction(setup), shape.layers - 1)
    after = {"autocast copies": casts, "gathered": gathered}
    return Live(
        forward={**everything, "logits": loss_forward},
        head={**everything, "logits": loss_backward + plain_saved},
        layer={"activations": (shape.layers - own) * kept, **after, **one},
        reduction={"activations": shape.layers * kept, **after},
        reduced={"activations": (shape.layers - gone - own) * kept, **after, **one},
        last={"activations": kept, "gathered": last_gathered_bytes(setup), **one},
    )


def layers_before_reduction(setup: Setup) -> float:
    """Layers whose gradients fill the first bucket; an output head larger than a bucket is reduced before any."""
    shape = setup.shape
    head = 0 if shape.tied else shape.vocab * shape.hidden
    bucket = bucket_elements(setup.preset)
    if setup.preset.zero_stage not in (1, 2) or setup.method != "full" or head > bucket:
        return 0.0
    return (bucket - head) / max(1.0, shape.linear_parameters / shape.layers)


def loss_bytes(setup: Setup) -> tuple[float, float, float]:
    """Bytes of the output head and the loss: in the forward pass, in its backward pass, of its weight's gradient.

    TRL: tiles of 4096 x 32768 logits in bf16; backward fp32 gradients of the hidden states 4th and in the weights'
    dtype eth and, if the head is trained, of its weight 4Vh, which is then copied to the weight's dtype eVh.
    Plain: logits in bf16 2tV, in fp32 4tV, their log-softmax 4tV; backward two fp32 gradients and the log-softmax 12tV.
    """
    shape, tokens, numerics = setup.shape, setup.tokens, setup.numerics
    e = 4 if numerics.weight_bytes == 4 else 2
    head = shape.vocab * shape.hidden if numerics.method == "full" else 0
    wide = tokens * shape.vocab
    if setup.loss == "trl":
        tile = TILE_BYTES * min(1.0, tokens / 4096) * (2 if numerics.pure_fp32 else 1)
        return tile, (4 + e) * tokens * shape.hidden + tile, float((4 + e) * head)
    return (8.0 if numerics.pure_fp32 else 10.0) * wide, 12.0 * wide, 0.0


def largest_inner(shape: ModelShape) -> int:
    return max((linear.inputs * linear.outputs for linear in shape.linears if linear.kind != "lm_head"), default=0)


def gathered_bytes(setup: Setup) -> float:
    """ZeRO-3: whole weights alive at once; QLoRA: the largest matrix dequantised.

    Weights that are used again within 1e9 elements are not released (Z3, `stage3_max_reuse_distance`), so a window of
    up to 1e9 elements stays, and one more matrix is fetched.  Layers gathered whole: as many as `LAYERS_AT_ONCE`, the
    output head, which TRL's loss holds on to, one more matrix, and toward the end of the backward pass the embedding
    (`last_gathered_bytes`).  One process that offloads nothing has nothing to gather.
    """
    shape = setup.shape
    split = setup.world > 1 or setup.preset.offload_param != "none"
    if setup.preset.zero_stage == 3 and setup.method != "qlora":
        at_once = LAYERS_AT_ONCE * setup.layer_parameters + shape.embedding_parameters
        window = (at_once if setup.whole_layers else MAX_REUSE) + largest_inner(shape)
        return float(setup.numerics.weight_bytes * min(shape.parameters, window)) if split else 0.0
    return 2.0 * largest_inner(shape) if setup.method == "qlora" else 0.0


def last_gathered_bytes(setup: Setup) -> float:
    """The same in the backward pass of the first layers: untied, the embedding was fetched ahead; frozen weights of
    recomputed layers that are not gathered whole are all there still (`hf_dsvllm.whole_layers`).
    """
    gathered, shape, e = gathered_bytes(setup), setup.shape, setup.numerics.weight_bytes
    if setup.preset.zero_stage != 3 or setup.method == "qlora" or not gathered:
        return gathered
    if setup.whole_layers:
        return min(float(e * shape.parameters), gathered + (0 if shape.tied else e * shape.embedding_parameters))
    return float(e * shape.parameters) if setup.method == "lora" and setup.recompute else gathered
