"""Seconds of one optimizer step from the rates of a card; arithmetic only.

seconds = accumulation * (forward + backward [+ the forward pass again] + loss) + communication + optimizer.

Each pass is the larger of what the GPU needs (products, attention, memory traffic of everything in between) and what
Python needs to start the kernels.  Notation: t tokens of a micro-batch, h hidden, V vocabulary, P trainable
parameters, N processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hf_dsvllm.model_shape import Linear, ModelShape
from hf_dsvllm.planner.cards import Rates
from hf_dsvllm.planner.footprint import Setup

__all__ = ["OVERHEADS", "Overheads", "StepTime", "step_time"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What formulas cannot know; fitted to the cells of benchmarks/planner that are not held out (docs/planner.md).

    `narrow`: inputs + outputs at which a product reaches half of the best rate.  `traffic` multiplies the bytes counted
    for operations between products.  Seconds of Python: of a decoder layer forward and backward, of an adapter, of
    ZeRO-3's hooks around one module, of ZeRO-1/2's hook of one gradient.  `hidden`: share of communication behind the
    backward pass.
    """

    narrow: float = 2500.0
    traffic: float = 1.33
    layer_forward_s: float = 0.9e-3
    layer_backward_s: float = 0.9e-3
    adapter_s: float = 60e-6
    four_bit_s: float = 40e-6
    zero3_module_s: float = 0.5e-3
    gradient_hook_s: float = 0.1e-3
    hidden: float = 0.9
    step_s: float = 30e-3
    optimizer_bytes: float = 36.0


OVERHEADS = Overheads()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step by part; `tokens` are those of all processes."""

    parts: Mapping[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def step_time(setup: Setup, rates: Rates, overheads: Overheads = OVERHEADS) -> StepTime:
    """Seconds of one optimizer step of all processes together."""
    forward, backward = layers_seconds(setup, rates, overheads)
    head_forward, head_backward = loss_seconds(setup, rates)
    count = setup.accumulation
    parts = {
        "forward": count * (forward + head_forward),
        "recompute": count * forward if setup.recompute else 0.0,
        "backward": count * (backward + head_backward),
    }
    parts["communication"] = communication_seconds(setup, rates, overheads, parts["backward"])
    parts["optimizer"] = optimizer_seconds(setup, rates, overheads) + overheads.step_s
    parts["hooks"] = hook_seconds(setup, overheads)
    return StepTime(parts={name: value for name, value in parts.items() if value}, tokens=setup.step_tokens)


def layers_seconds(setup: Setup, rates: Rates, overheads: Overheads) -> tuple[float, float]:
    """Forward and backward of all decoder layers; each the larger of the GPU's and Python's time."""
    shape, tokens = setup.shape, setup.tokens
    inner = [linear for linear in shape.linears if linear.kind != "lm_head"]
    products = sum(product_seconds(linear, tokens, rates, overheads) for linear in inner)
    products += 2 * tokens * active_expert_weights(shape) / rates.product_flops
    attention = 2 * setup.micro * shape.heads * shape.head_dim * setup.length**2 * shape.layers
    between = overheads.traffic * between_bytes(shape) * tokens * shape.layers / rates.memory_bytes_per_s
    extra, modules = adapter_traffic(setup), len_modules(shape)
    dequantise = 2.6 * shape.linear_parameters / rates.memory_bytes_per_s if setup.method == "qlora" else 0.0
    adapters = extra * tokens / rates.memory_bytes_per_s
    gpu_forward = products + attention / rates.attention_forward_flops + between + adapters + dequantise
    weight_gradients = 2 if setup.method == "full" else 1
    gpu_backward = weight_gradients * products + 2.5 * attention / rates.attention_backward_flops
    gpu_backward += 2 * (between + adapters) + dequantise
    python = shape.layers * overheads.layer_forward_s
    python_back = shape.layers * overheads.layer_backward_s
    if setup.method != "full":
        python += modules * overheads.adapter_s
        python_back += modules * overheads.adapter_s
    if setup.method == "qlora":
        python += modules * overheads.four_bit_s
    return max(gpu_forward, python), max(gpu_backward, python_back)


def product_seconds(linear: Linear, tokens: int, rates: Rates, overheads: Overheads) -> float:
    """2 * tokens * weights / rate; narrow matrices reach less of the rate."""
    widths = linear.inputs + linear.outputs
    return 2 * tokens * linear.weights / (rates.product_flops * widths / (widths + overheads.narrow))


def active_expert_weights(shape: ModelShape) -> int:
    """Weights of the experts a token passes through."""
    if not shape.experts:
        return 0
    return shape.expert_parameters * shape.experts_per_token // shape.experts


def between_bytes(shape: ModelShape) -> float:
    """Bytes read and written per token and layer between products, forward.

    RMSNorm, in eager PyTorch six kernels over h (to fp32 2+4, square 4+4, mean 4, times root 4+4, to bf16 4+2, times
    scale 2+2) = 36h, twice; residual sums 6h, twice; norms on queries and keys 36(q+k); rotation 20(q+k); attention
    reads and writes 2q+2k+2k+2q; silu 4i, product 6i.
    """
    h, q, k = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = shape.intermediate if not shape.experts else shape.experts_per_token * shape.expert_intermediate
    moved = 84 * h + 20 * (q + k) + 4 * (q + k) + 10 * inner
    return moved + (36 * (q + k) if shape.qk_norm else 0)


def adapter_traffic(setup: Setup) -> float:
    """Bytes per token that adapters move in all layers, forward: dropout 2+2+1 of the input, scale and sum 10 of the
    output; fp32 adapters read the input in fp32 first (6 more), and 4-bit layers clone their output (4 more).
    """
    if setup.method == "full":
        return 0.0
    reads = (5 if setup.lora_dropout else 0) + (10 if setup.numerics.adapter_bytes == 4 else 0)
    writes = 10 + (4 if setup.method == "qlora" else 0)
    return float(
        sum(
            linear.count * (reads * linear.inputs + writes * linear.outputs)
            for linear in setup.shape.linears
            if linear.kind != "lm_head"
        )
    )


def len_modules(shape: ModelShape) -> int:
    """Linear layers inside decoder layers."""
    return sum(linear.count for linear in shape.linears if linear.kind != "lm_head")


def loss_seconds(setup: Setup, rates: Rates) -> tuple[float, float]:
    """Output head and loss.  TRL's backward computes the logits again; a frozen head needs no weight gradient."""
    shape, tokens = setup.shape, setup.tokens
    product = 2 * tokens * shape.hidden * shape.vocab / rates.product_flops
    wide = tokens * shape.vocab / rates.memory_bytes_per_s
    trained = 1 if setup.method == "full" else 0
    if setup.loss == "trl":
        # the tile is written by the product and read once; backward writes it too
        return product + 4 * wide, product * (2 + trained) + 8 * wide
    return product + 22 * wide, product * (1 + trained) + 30 * wide


def communication_seconds(setup: Setup, rates: Rates, overheads: Overheads, backward: float) -> float:
    """Exposed seconds: what does not hide behind the backward pass, and the all-gather after the step.

    ZeRO-1/2: gradients 2 bytes, updated weights 2; ZeRO-3: weights gathered forward and backward, gradients scattered;
    each times (N-1)/N.  Replicas average gradients: twice (N-1)/N of them.
    """
    world, stage = setup.world, setup.preset.zero_stage
    if world == 1:
        return 0.0
    share = (world - 1) / world
    e = setup.numerics.weight_bytes if setup.method == "full" else setup.numerics.adapter_bytes
    one_pass = share * e * setup.trainable / rates.link_bytes_per_s
    if stage == 3:
        weights = share * 2 * setup.shape.parameters / rates.link_bytes_per_s
        moved = setup.accumulation * ((3 if setup.recompute else 2) * weights + one_pass)
        return max(moved * (1 - overheads.hidden), moved - overheads.hidden * 3 * backward)
    reduced = setup.accumulation * 2 * one_pass if stage in (1, 2) else 2 * one_pass
    exposed = max(reduced * (1 - overheads.hidden), reduced - overheads.hidden * backward)
    return exposed + (one_pass if stage in (1, 2) else 0.0)


def optimizer_seconds(setup: Setup, rates: Rates, overheads: Overheads) -> float:
    """On the GPU: Adam reads 16 and writes 12 bytes of each parameter, the rest is clipping, casts and flat copies.

    Offloaded: DeepSpeedCPUAdam, and over the host link updated weights 2P and gradients 2P; with accumulation each
    micro-batch fetches what is there, adds on the GPU and sends it back, 6P (stage_1_and_2.py,
    async_accumulate_grad_in_cpu_via_gpu).
    """
    share = setup.trainable / (setup.world if setup.preset.zero_stage else 1)
    if setup.preset.offload_optimizer == "none":
        return overheads.optimizer_bytes * share / rates.memory_bytes_per_s
    gradients = 2 if setup.accumulation == 1 else 6 * setup.accumulation
    moved = (2 + gradients) * share / rates.host_bytes_per_s
    if setup.preset.offload_param != "none":
        moved += 2 * 3 * setup.accumulation * setup.shape.parameters / setup.world / rates.host_bytes_per_s
    return share / rates.adam_parameters_per_s + moved


def hook_seconds(setup: Setup, overheads: Overheads) -> float:
    """Python of DeepSpeed's hooks: ZeRO-3 fetches and releases around every module, ZeRO-1/2 reduces every gradient."""
    stage = setup.preset.zero_stage
    modules = len_modules(setup.shape) + 4 * setup.shape.layers
    if stage == 3:
        return setup.accumulation * (3 if setup.recompute else 2) * modules * overheads.zero3_module_s
    tensors = modules if setup.method == "full" else 2 * len_modules(setup.shape)
    return setup.accumulation * tensors * overheads.gradient_hook_s if stage in (1, 2) else 0.0
