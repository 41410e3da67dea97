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
from typing import Literal

from hf_dsvllm.memory import NF4_BYTES, SUB_GROUP
from hf_dsvllm.model_shape import ModelShape
from hf_dsvllm.planner.activations import Method, Numerics, Traced, checkpoint_bytes, layer_bytes, working_bytes
from hf_dsvllm.presets import Preset

__all__ = ["PHASES", "Footprint", "Setup", "Traced", "gpu_footprint"]

Loss = Literal["trl", "plain"]
PHASES = ("load", "init", "forward", "backward", "optimizer")
TILE_BYTES = 4096 * 32768 * 2  # trl/kernels/chunked_logprob.py: TOKEN_CHUNK_SIZE x _CHUNKED_LOGPROB_CHUNK_SIZE in bf16
MAX_REUSE = 1_000_000_000  # elements; DeepSpeed's default `stage3_max_reuse_distance`: what is used again soon stays
DEFAULT_BUCKET = 500_000_000
# The allocator hands out a cached block whole if at most 1 MiB of it would be left over: half of that, on average, for
# each 4-bit tensor (c10/cuda/CUDACachingAllocator.cpp, kSmallSize).
BLOCK_WASTE_BYTES = 2**19


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run: a model under a preset.  `micro` sequences of `length` tokens a process, `accumulation` times a step."""

    shape: ModelShape
    preset: Preset
    world: int
    micro: int
    accumulation: int = 1
    length: int
    recompute: bool
    loss: Loss = "trl"
    lora_r: int = 16
    lora_dropout: bool = True  # TRL's ModelConfig: 0.05
    device: Literal["cuda", "cpu"] = "cuda"
    traced: Traced | None = None

    @property
    def layer_bytes(self) -> int:
        """Bytes one layer saves for a token: counted where the model was traced, else computed."""
        return self.traced.of(self.numerics) if self.traced else layer_bytes(self.shape, self.numerics)

    @property
    def tokens(self) -> int:
        """Tokens of one process in one forward pass."""
        length = -(-self.length // self.world) if self.preset.sequence_parallel else self.length
        return self.micro * length

    @property
    def step_tokens(self) -> int:
        """Tokens of all processes in one optimizer step."""
        replicas = 1 if self.preset.sequence_parallel else self.world
        return replicas * self.micro * self.accumulation * self.length

    @property
    def method(self) -> Method:
        return self.preset.adapter or "full"

    @property
    def trainable(self) -> int:
        return self.shape.parameters if self.method == "full" else self.shape.lora_parameters(self.lora_r)

    @property
    def numerics(self) -> Numerics:
        """How `hf_dsvllm.adapters` and the Trainer set this preset up."""
        adapted = self.method != "full"
        if self.device == "cpu":
            return Numerics(
                method=self.method,
                weight_bytes=4,
                lora_r=self.lora_r if adapted else 0,
                dropout=adapted and self.lora_dropout,
                adapter_bytes=4,
            )
        plain = not self.preset.uses_deepspeed
        return Numerics(
            method=self.method,
            weight_bytes=4 if plain and not adapted else 2,
            autocast=plain,
            lora_r=self.lora_r if adapted else 0,
            dropout=adapted and self.lora_dropout,
            adapter_bytes=4 if plain and self.method == "lora" else 2,
        )


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


def gpu_footprint(setup: Setup) -> Footprint:
    """Bytes allocated by phase.  On CPUs the same sums are those of the process's tensors in host memory.

    The backward pass has six moments: the output head's gradients; the first layer; the reduction of an output head
    larger than a bucket; the first layer after the first reduction, which makes the buffer for gradients; the last
    layer, when only its own activations are left; and the embedding's gradient at the very end.  With accumulation the
    gradients of earlier micro-batches are there from the beginning.
    """
    states = States.of(setup)
    live = activation_parts(setup)
    earlier = states.gradients if setup.accumulation > 1 else {}
    parts: dict[str, dict[str, float]] = {
        "load": {"weights": states.loaded},
        "init": dict(states.init),
        "forward": {**states.resident, **earlier, **live.forward},
        "backward": highest(
            {**states.resident, **earlier, **live.head},
            {**states.resident, **earlier, **states.buckets, **states.waiting, **live.layer},
            {**states.resident, **states.at_reduction, **states.buckets, **live.reduction},
            {**states.resident, **states.buffer, **states.buckets, **states.waiting, **live.reduced},
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
        last={"activations": kept, "gathered": gathered, **one},
    )


def layers_before_reduction(setup: Setup) -> float:
    """Layers whose gradients fill the first bucket; an output head larger than a bucket is reduced before any."""
    shape = setup.shape
    head = 0 if shape.tied else shape.vocab * shape.hidden
    bucket = bucket_elements(setup.preset)
    if setup.preset.zero_stage not in (1, 2) or setup.method != "full" or head > bucket:
        return 0.0
    return (bucket - head) / (shape.linear_parameters / shape.layers)


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
    return max(linear.inputs * linear.outputs for linear in shape.linears if linear.kind != "lm_head")


def gathered_bytes(setup: Setup) -> float:
    """ZeRO-3: whole weights alive at once; QLoRA: the largest matrix dequantised.

    Weights that are used again within 1e9 elements are not released (Z3, `stage3_max_reuse_distance`), so a window of
    up to 1e9 elements stays, and one more matrix is fetched.  One process that offloads nothing has nothing to gather.
    """
    shape = setup.shape
    split = setup.world > 1 or setup.preset.offload_param != "none"
    if setup.preset.zero_stage == 3 and setup.method != "qlora":
        whole = setup.numerics.weight_bytes
        return float(whole * min(shape.parameters, MAX_REUSE + largest_inner(shape))) if split else 0.0
    return 2.0 * largest_inner(shape) if setup.method == "qlora" else 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Weights, gradients, optimizer states and communication buffers at the moments that matter."""

    loaded: float
    init: Mapping[str, float]
    resident: Mapping[str, float]
    gradients: Mapping[str, float]
    buffer: Mapping[str, float]
    at_reduction: Mapping[str, float]
    buckets: Mapping[str, float]
    waiting: Mapping[str, float]
    tail: Mapping[str, float]
    step: Mapping[str, float]

    @classmethod
    def of(cls, setup: Setup) -> States:
        stage = setup.preset.zero_stage
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
    """Without ZeRO: weights, Adam's moments, gradients that come and go; DistributedDataParallel's buckets twice.

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
        resident={"weights": weights, "optimizer": 2.0 * e * trainable, "DDP buckets": ddp},
        gradients={"gradients": float(e * trainable)},
        buffer={},
        at_reduction={},
        buckets={},
        waiting={"tied gradient": float(e * largest_gradient(setup) if setup.shape.tied else 0)},
        tail={"large gradients": float((2 if tied_sum_is_new(setup) else 1) * e * largest_gradient(setup))},
        step={},
    )


def tied_sum_is_new(setup: Setup) -> bool:
    """On CPUs the sum of a tied gradient's two halves is a third tensor (aten.add, counted with torch 2.13)."""
    return setup.device == "cpu" and setup.shape.tied


def zero12_states(setup: Setup) -> States:
    """ZeRO-1 and 2.

    init: the weights and their flat copy (Z12:449-510), then fp32 master weights 4P/N and a dummy gradient 4P/N.
    gradients, fp32 accumulation: one buffer of 4P/N, made at the first reduction (Z12, compact partition buffer).
    bf16 accumulation: 2P/N, and at the step flattened 2P/N and as fp32 4P/N  (Z12:3117).
    ZeRO-1 keeps whole gradients 2P.  Buckets: two of bf16 elements (overlap).
    at_reduction and tail: gradients larger than a bucket (output head, embedding) are reduced on their own; the rank
    that owns them adds them to its buffer as fp32: e + 4 bytes.  A tied head's waits in autograd for the embedding's.
    step: the norm is taken in fp64 of one gradient at a time (get_norm_dtype): 8 bytes of the largest.
    offload: a buffer of the largest gradient stays (Z12:659).
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
    ipg = {"buckets": float(min(bucket, trainable) * e * (2 if setup.device == "cuda" else 1))}
    master = 2 if low else 4
    largest = largest_gradient(setup)
    alone = largest if largest > bucket else 0
    resident = {"weights": weights, "optimizer": 0.0 if offload else (master + (4 if low else 8)) * share}
    if offload:
        resident["offload buffer"] = float(e * largest)
        kept, step = 0.0, 0.0
    elif preset.zero_stage == 1:
        kept, step = float(e * trainable), (2.0 + 4.0) * share
    elif fp32:
        kept, step = 4 * share, 0.0
    else:
        kept, step = 2 * share, (2 if low else 6) * share
    norm = 8.0 * min(largest, share) if setup.device == "cuda" and not offload else 0.0
    added = float(e * alone + (4 * min(alone, share) if preset.zero_stage == 2 and fp32 else 0))
    tied = float(e * largest) if shape.tied else 0.0
    return States(
        loaded=weights if setup.method == "full" else base,
        init={"weights": weights, "flat copy": 0.0 if offload else max(float(e * trainable), 2 * master * share)},
        resident=resident,
        gradients={"gradients": kept},
        buffer={"gradients": kept} if preset.zero_stage == 2 else {},
        at_reduction={"gradients": kept, "large gradients": added} if fp32 and alone and not shape.tied else {},
        buckets=ipg,
        waiting={"tied gradient": tied},
        tail={"large gradients": added + tied},
        step={"optimizer step": max(step, norm)},
    )


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

    gradients: a flat buffer of 2P/N that stays; bucket: hidden squared in bf16, one.  init: no Adam moments yet.
    step: for one sub-group of at most 1e9 elements at a time, the gradient as fp32 and flattened: 6 bytes (Z3:2686).
    """
    preset, world, shape = setup.preset, setup.world, setup.shape
    trainable = setup.trainable
    share = trainable / world
    e = setup.numerics.weight_bytes
    base = frozen(setup)
    weights = (0.0 if preset.offload_param != "none" else e * share) + base
    bucket = {"buckets": float(e * shape.hidden**2)}
    if preset.offload_optimizer != "none":
        optimizer = master = kept = step = 0.0
    else:
        optimizer, master, kept = 12 * share, 4 * share, e * share
        step = (6 if e == 2 else 4) * min(share, SUB_GROUP)
    largest = float(e * shape.largest_matrix) if setup.method == "full" else 0.0
    return States(
        loaded=(weights if setup.method == "full" else base) + largest,
        init={"weights": weights, "optimizer": master, "gradients": kept, "flat copy": largest},
        resident={"weights": weights, "optimizer": optimizer, "gradients": kept, **bucket},
        gradients={},
        buffer={},
        at_reduction={},
        buckets={},
        waiting={"tied gradient": largest if shape.tied else 0.0},
        tail={"large gradients": largest},
        step={"optimizer step": step},
    )
