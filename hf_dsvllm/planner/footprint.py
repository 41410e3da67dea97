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

from hf_dsvllm.ds_config import get_key
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
    """Bytes allocated by phase.  On CPUs the same sums are those of the process's tensors in host memory."""
    states = States.of(setup)
    live = activation_parts(setup)
    parts: dict[str, dict[str, float]] = {
        "load": {"weights": states.loaded},
        "init": states.init,
        "forward": {**states.resident, **live.forward},
        "backward": highest(
            {**states.resident, **states.gradients_at_head, **live.head},
            {**states.resident, **states.gradients, **live.layer},
            {**states.resident, **states.gradients, **states.tail},
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
    """Activations at three moments: the end of the forward pass, the loss's backward, the first layer's backward."""

    forward: Mapping[str, float]
    head: Mapping[str, float]
    layer: Mapping[str, float]


def activation_parts(setup: Setup) -> Live:
    """Saved tensors and what is transient on top.

    saved = t * (L * layer + final norm), with recompute L * checkpoint instead of L * layer; then, on top of what is
    saved: forward and head add the loss's transients, the layer's backward its working set (with recompute its own
    saved tensors too).
    """
    shape, numerics, tokens = setup.shape, setup.numerics, setup.tokens
    layer = setup.layer_bytes * tokens
    kept = checkpoint_bytes(shape, numerics) * tokens if setup.recompute else layer
    wide = 4 if numerics.weight_bytes == 4 else 2
    final = tokens * shape.hidden * ((4 if numerics.method != "full" else 4 + wide) + 2 * wide)
    casts = 2 * shape.linear_parameters if numerics.mixed else 0  # autocast's bf16 copies live as long as the forward
    saved = {"activations": float(shape.layers * kept + final), "autocast copies": float(casts)}
    loss_forward, loss_backward, logits = loss_bytes(setup)
    working = working_bytes(shape, numerics) * tokens
    weight_gradient = largest_inner(shape) * (2 if numerics.method == "full" else 0)
    gathered = gathered_bytes(setup)
    layer_parts = {
        "activations": saved["activations"] - (kept if setup.recompute else 0),
        "autocast copies": 0.0 if setup.recompute else float(casts),
        "one layer": layer + working if setup.recompute else working,
        "weight gradient": float(weight_gradient),
        "gathered": gathered,
    }
    return Live(
        forward={**saved, "logits": loss_forward, "gathered": gathered},
        head={**saved, "logits": loss_backward + logits, "gathered": gathered},
        layer=layer_parts,
    )


def loss_bytes(setup: Setup) -> tuple[float, float, float]:
    """Bytes of the output head and the loss: in the forward pass, in its backward pass, gradients of the head's weight.

    TRL: tiles of 4096 x 32768 logits in bf16; the compacted hidden states 2th; backward fp32 gradients of the hidden
    states 4th and, if the head is trained, of its weight 4Vh, which is then copied to the weight's dtype eVh.
    Plain: logits in bf16 2tV, in fp32 4tV, their log-softmax 4tV; backward two fp32 gradients and the log-softmax 12tV.
    """
    shape, tokens, numerics = setup.shape, setup.tokens, setup.numerics
    e = 4 if numerics.weight_bytes == 4 else 2
    head = shape.vocab * shape.hidden if numerics.method == "full" else 0
    wide = tokens * shape.vocab
    if setup.loss == "trl":
        tile = TILE_BYTES * min(1.0, tokens / 4096) * (2 if numerics.pure_fp32 else 1)
        hidden = tokens * shape.hidden
        return e * hidden + tile, (e + 4 + e) * hidden + tile, (4 + e) * head
    low = 4 if numerics.pure_fp32 else 2
    forward = (low + 4 + 4) * wide if low == 2 else 2 * 4 * wide
    return forward, 12.0 * wide, float(e * head)


def largest_inner(shape: ModelShape) -> int:
    return max(linear.inputs * linear.outputs for linear in shape.linears if linear.kind != "lm_head")


def gathered_bytes(setup: Setup) -> float:
    """ZeRO-3: whole weights alive at once; QLoRA: the largest matrix dequantised.

    Weights that are used again within 1e9 elements are not released (Z3, `stage3_max_reuse_distance`), so a window of
    up to 1e9 elements stays, and the output head or the largest matrix is gathered beside it.
    """
    shape = setup.shape
    if setup.preset.zero_stage == 3 and setup.method != "qlora":
        whole = setup.numerics.weight_bytes
        return float(whole * min(shape.parameters, MAX_REUSE + shape.largest_matrix))
    return 2.0 * largest_inner(shape) if setup.method == "qlora" else 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Weights, gradients, optimizer states and communication buffers at the moments that matter."""

    loaded: float
    init: Mapping[str, float]
    resident: Mapping[str, float]
    gradients_at_head: Mapping[str, float]
    gradients: Mapping[str, float]
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
        return NF4_BYTES * shape.linear_parameters + 2 * (shape.parameters - shape.linear_parameters)
    if setup.preset.offload_param != "none":
        return 0.0
    whole = float(setup.numerics.weight_bytes * shape.parameters)
    return whole / setup.world if setup.preset.zero_stage == 3 else whole


def plain_states(setup: Setup) -> States:
    """Without ZeRO: weights, Adam's moments, gradients that come and go; DistributedDataParallel's buckets twice."""
    numerics, trainable = setup.numerics, setup.trainable
    e = numerics.weight_bytes if setup.method == "full" else numerics.adapter_bytes
    base = frozen(setup)
    weights = e * trainable + base
    buckets = e * trainable if setup.world > 1 else 0
    resident = {"weights": weights, "optimizer": 2.0 * e * trainable, "buckets": float(buckets)}
    gradients = {"gradients": float(e * trainable)}
    return States(
        loaded=weights if setup.method == "full" else base,
        init={"weights": weights, "buckets": float(buckets)},
        resident=resident,
        gradients_at_head={},
        gradients=gradients,
        tail={},
        step={},
    )


def zero12_states(setup: Setup) -> States:
    """ZeRO-1 and 2.

    init: the weights and their flat copy (Z12:449-510), then fp32 master weights 4P/N and a dummy gradient 4P/N.
    gradients, fp32 accumulation: one buffer of 4P/N, made at the first bucket (Z12, compact partition buffer).
    bf16 accumulation: 2P/N, and at the step flattened 2P/N and as fp32 4P/N  (Z12:3117).
    ZeRO-1 keeps whole gradients 2P.  Buckets: two of bf16 elements (overlap).
    tail: gradients larger than a bucket (embedding, output head) are reduced on their own and added as fp32.
    """
    preset, shape, world = setup.preset, setup.shape, setup.world
    trainable = setup.trainable
    share = trainable / world
    low = any(setting.key == "bf16.bf16_optimizer_states" for setting in preset.deepspeed)
    fp32 = any(setting.key == "data_types.grad_accum_dtype" and setting.value == "fp32" for setting in preset.deepspeed)
    offload = preset.offload_optimizer != "none"
    e = setup.numerics.weight_bytes
    base = frozen(setup)
    weights = e * trainable + base
    bucket = bucket_elements(preset)
    ipg = float(min(bucket, trainable) * e * (2 if setup.device == "cuda" else 1))
    master = 2 if low else 4
    resident = {"weights": weights, "optimizer": 0.0 if offload else (master + (4 if low else 8)) * share}
    if offload:
        kept, step = 0.0, 0.0
    elif preset.zero_stage == 1:
        kept, step = float(e * trainable), (2.0 + 4.0) * share
    elif fp32:
        kept, step = 4 * share, 0.0
    elif low:
        kept, step = 2 * share, 2 * share
    else:
        kept, step = 2 * share, 6 * share
    gradients = {"gradients": kept, "buckets": ipg}
    large = sum(size for size in large_gradients(setup) if size > bucket)
    return States(
        loaded=weights if setup.method == "full" else base,
        init={"weights": weights, "flat copy": max(float(e * trainable), 0.0 if offload else 2 * master * share)},
        resident=resident,
        gradients_at_head={"buckets": ipg},
        gradients=gradients | ({"tied gradient": float(e * shape.vocab * shape.hidden)} if tied_grows(setup) else {}),
        tail={"large gradients": float((e + 4 / world) * large)},
        step={"optimizer step": step},
    )


def tied_grows(setup: Setup) -> bool:
    """A tied output head's gradient waits in autograd for the embedding's, until the end of the backward pass."""
    return setup.shape.tied and setup.method == "full"


def large_gradients(setup: Setup) -> list[int]:
    """Elements of the single gradients that may exceed a bucket: embedding and output head."""
    if setup.method != "full":
        return []
    matrix = setup.shape.vocab * setup.shape.hidden
    return [matrix] if setup.shape.tied else [matrix, matrix]


def bucket_elements(preset: Preset) -> int:
    """`reduce_bucket_size` of the preset, DeepSpeed's default without; "auto" is hidden_size squared (ZeRO-3 only)."""
    found = next((s.value for s in preset.deepspeed if s.key == "zero_optimization.reduce_bucket_size"), DEFAULT_BUCKET)
    return found if isinstance(found, int) else DEFAULT_BUCKET


def zero3_states(setup: Setup) -> States:
    """ZeRO-3: everything in shards.

    gradients: a flat buffer of 2P/N (4 with fp32 accumulation) that stays; bucket: hidden squared in bf16, one.
    step: for one sub-group of at most 1e9 elements at a time, the gradient as fp32 and flattened: 6 bytes (Z3:2686).
    """
    preset, world, shape = setup.preset, setup.world, setup.shape
    trainable = setup.trainable
    share = trainable / world
    e = setup.numerics.weight_bytes
    base = frozen(setup)
    offload_weights = preset.offload_param != "none"
    weights = (0.0 if offload_weights else e * share) + base
    bucket = 2.0 * shape.hidden**2 * (e / 2)
    if preset.offload_optimizer != "none":
        optimizer = kept = step = 0.0
    else:
        optimizer, kept = 12 * share, e * share
        step = (6 if e == 2 else 4) * min(share, SUB_GROUP)
    resident = {"weights": weights, "optimizer": optimizer, "gradients": kept, "buckets": bucket}
    largest = float(e * shape.largest_matrix) if setup.method == "full" else 0.0
    return States(
        loaded=(weights if setup.method == "full" else base) + largest,
        init={"weights": weights, "optimizer": optimizer, "gradients": kept, "init": 4 * min(share, SUB_GROUP)},
        resident=resident,
        gradients_at_head={},
        gradients={},
        tail={"large gradients": largest},
        step={"optimizer step": step},
    )


def accumulates_in_fp32(config: Mapping[str, object] | None) -> bool:
    """Whether a DeepSpeed dictionary asks for fp32 gradient accumulation."""
    return get_key(dict(config or {}), "data_types.grad_accum_dtype") == "fp32"
