"""What the forward pass leaves for the backward pass, in bytes per token; arithmetic only.

The operations of a decoder layer as transformers 5 runs them (Qwen3, Llama and their kin), each with what autograd
saves of it.  Notation: h hidden, q and k widths of queries and keys, i width of the feed-forward block, H and K heads,
r rank. `tests/unit/test_planner_activations.py` holds these sums against the real model, traced with fake tensors.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from hf_dsvllm.model_shape import ModelShape

__all__ = ["Numerics", "Traced", "checkpoint_bytes", "frozen_input_bytes", "layer_bytes", "working_bytes"]

Method = Literal["full", "lora", "qlora"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How a run computes.

    `weight_bytes` of the model as loaded (2 or 4); `autocast` where the Trainer wraps the forward pass (no DeepSpeed);
    `lora_r` and `dropout` of the adapters, 0 without; `adapter_bytes` 4 where they are kept in fp32, `casts` where
    their inputs are copied to fp32 and back for that; `keeps_inputs` where frozen linear layers save their inputs
    (ZeRO-3); `fused` where norms and activation are one kernel each, `one_operation` where an adapted layer is
    (hf_dsvllm.features).
    """

    method: Method
    weight_bytes: int = 2
    autocast: bool = False
    lora_r: int = 0
    dropout: bool = False
    adapter_bytes: int = 2
    casts: bool = False
    keeps_inputs: bool = False
    fused: bool = False
    one_operation: bool = False

    @property
    def mixed(self) -> bool:
        """fp32 weights under autocast: the residual stream is fp32, products see bf16 copies."""
        return self.autocast and self.weight_bytes == 4

    @property
    def pure_fp32(self) -> bool:
        """Everything in fp32, as on CPUs."""
        return self.weight_bytes == 4 and not self.autocast


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Bytes one layer saves for a token, counted on the real model (`hf_dsvllm.trace`) instead of computed."""

    full: int
    full_mixed: int
    full_fp32: int
    adapters: int
    adapters_fp32: int

    def of(self, numerics: Numerics) -> int:
        """The count that belongs to a way of computing."""
        if numerics.method != "full":
            return self.adapters_fp32 if numerics.casts or numerics.pure_fp32 else self.adapters
        if numerics.mixed:
            return self.full_mixed
        return self.full_fp32 if numerics.pure_fp32 else self.full


def layer_bytes(shape: ModelShape, numerics: Numerics) -> int:
    """Bytes that one decoder layer saves for one token.

    bf16, all weights trained, with norms on queries and keys (Qwen3): 16h + 10q + 10k + 8i + 8 + 8H + 4K; with fused
    kernels 8h + 6q + 6k + 6i + 8 + 8H + 4K.
    """
    trained = numerics.method == "full"
    wide = 4 if numerics.mixed or numerics.pure_fp32 else 2  # of the residual stream
    e = 4 if numerics.pure_fp32 else 2  # of what products read
    h, q, k = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    saved = 2 * norm_bytes(h, trained, wide, fused=numerics.fused)
    saved += linear_inputs(shape, numerics, readers=("q_proj", "k_proj", "v_proj"), width=h, stream=wide, e=e)
    if shape.qk_norm:
        saved += norm_bytes(q, trained, e, shape.heads, fused=numerics.fused)
        saved += norm_bytes(k, trained, e, shape.kv_heads, fused=numerics.fused)
    saved += e * (q + 2 * k)  # rotated queries and keys, values: saved by attention
    saved += e * q + 4 * shape.heads  # its output and the logarithm of the softmax's sum
    saved += linear_inputs(shape, numerics, readers=("o_proj",), width=q, stream=e, e=e, kept=True)
    saved += linear_inputs(shape, numerics, readers=("gate_proj", "up_proj"), width=h, stream=wide, e=e)
    saved += feed_forward_bytes(shape, numerics, e)
    return saved + frozen_input_bytes(shape, numerics)


def norm_bytes(width: int, trained: bool, e: int, rows: int = 1, *, fused: bool = False) -> int:
    """RMSNorm: its input in fp32 and the root; the normalised value where the scale is trained.  4w + 4 [+ e w].

    One kernel keeps its input as it came, and the root: e w + 4 (liger-kernel 0.8, ops/rms_norm.py).
    """
    if fused:
        return e * width + 4 * rows
    return 4 * width + 4 * rows + (e * width if trained else 0)


def linear_inputs(
    shape: ModelShape,
    numerics: Numerics,
    *,
    readers: tuple[str, ...],
    width: int,
    stream: int,
    e: int,
    kept: bool = False,
) -> int:
    """What `readers`, linear layers that read the same tensor of `width`, save of it.

    Trained: the tensor once (a bf16 copy each under autocast from fp32).  Adapters: with dropout each saves its own
    dropped copy and a mask of one byte, without it a cast copy each (fp32 adapters) or the tensor once; and the product
    with A (r values).  `kept`: the tensor is saved anyway by what made it.
    """
    if numerics.method == "full":
        if kept:
            return 0
        return e * width * (len(readers) if stream != e else 1)
    # Without autocast autograd keeps the product with A twice (counted on fake tensors, torch 2.13).
    rank = len(readers) * e * numerics.lora_r * (1 if numerics.autocast else 2)
    if numerics.dropout:
        return len(readers) * (e + 1) * width + rank
    if numerics.casts:
        return len(readers) * e * width + rank
    return rank + (0 if kept else e * width)


def frozen_input_bytes(shape: ModelShape, numerics: Numerics) -> int:
    """Inputs of frozen linear layers that are saved although no gradient needs them: e (2h + i), under ZeRO-3.

    DeepSpeed puts its own function in the place of torch.nn.functional.linear (zero/linear.py,
    LinearFunctionForZeroStage3), which saves input and weight of every layer; PyTorch's saves a frozen layer's weight
    alone.  q, k and v read one tensor, gate and up another, down a third; o's is saved by attention anyway.  Without
    dropout the adapter saves the same tensor.  Weights saved that way hold no memory: released, they are empty.
    """
    if not numerics.keeps_inputs or not numerics.dropout:
        return 0
    e = 4 if numerics.pure_fp32 else 2
    return e * (2 * shape.hidden + (0 if shape.experts else shape.intermediate))


def feed_forward_bytes(shape: ModelShape, numerics: Numerics, e: int) -> int:
    """silu(gate) * up, then down: gate, silu(gate), up and, for down's weight or adapter, their product.

    One kernel computes silu(gate) again (liger-kernel 0.8, ops/swiglu.py).  A mixture of experts does this for
    `experts_per_token` copies of each token, and gathers the tokens first.
    """
    dense = (2 if numerics.fused else 3) * e * shape.intermediate + linear_inputs(
        shape, numerics, readers=("down_proj",), width=shape.intermediate, stream=e, e=e
    )
    if not shape.experts:
        return dense
    width = shape.expert_intermediate
    trained = numerics.method == "full"
    copies = e * (4 if trained else 3) * width + e * shape.hidden * (2 if trained else 1)
    return shape.experts_per_token * copies + 4 * shape.experts


def checkpoint_bytes(shape: ModelShape, numerics: Numerics) -> int:
    """Recompute keeps each layer's input: h values of the residual stream per token and layer."""
    return shape.hidden * (4 if numerics.weight_bytes == 4 else 2)


def working_bytes(shape: ModelShape, numerics: Numerics) -> int:
    """What is alive beside the saved tensors in one layer's backward pass, per token: around its feed-forward block.

    All weights trained: gradients of the layer's output (h) and, of width i, of the product, of silu(gate) and of up,
    less the product that is free by then.  Adapters without casts: the same.  With them: the moment before, when the
    recomputed product stands beside its fp32 cast and, with dropout, that one's dropped copy, and the hidden states
    that nobody saves.
    """
    e = 4 if numerics.pure_fp32 else 2
    width = shape.intermediate if not shape.experts else shape.experts_per_token * shape.expert_intermediate
    if numerics.method == "full" or numerics.pure_fp32:
        return 2 * e * shape.hidden + 2 * e * width
    if numerics.casts:
        return 4 * shape.hidden + (10 if numerics.dropout else 6) * width
    return 2 * shape.hidden + 4 * width
