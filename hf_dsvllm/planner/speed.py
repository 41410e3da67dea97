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
from hf_dsvllm.planner.setup import NODE_GPUS, Setup

__all__ = ["OVERHEADS", "Overheads", "StepTime", "step_time"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What formulas cannot know; fitted to the cells of benchmarks/planner that are not held out.

    `narrow`: inputs + outputs at which a product reaches half of the best rate.  `traffic` multiplies the bytes counted
    for operations between products.  Launches (each of `Rates.launch_s`) that Python makes: for a decoder layer, for an
    adapter, for ZeRO-3's hooks around a layer, for one gradient under DeepSpeed.  `hidden`: share of communication
    behind the backward pass.  Bytes an optimizer moves per parameter: PyTorch's fused AdamW on its own, and under
    DeepSpeed with the norm, the copies and the flat buffers.
    """

    narrow: float = 3000.0
    traffic: float = 1.25
    forward_launches: float = 108.0
    backward_launches: float = 231.0
    adapter_launches: float = 28.0
    zero3_forward_launches: float = 428.0
    zero3_backward_launches: float = 686.0
    gradient_launches: float = 3.7
    hidden: float = 0.31
    step_s: float = 0.03
    optimizer_bytes: float = 45.0
    deepspeed_bytes: float = 83.0


OVERHEADS = Overheads()
ADAM_BYTES = 28  # a parameter: weight, gradient and two moments read, all but the gradient written


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
    gpu_forward, gpu_backward = gpu_seconds(setup, rates, overheads)
    python_forward, python_backward = python_seconds(setup, rates, overheads)
    head_forward, head_backward = loss_seconds(setup, rates)
    if setup.recompute:
        gpu_backward += gpu_forward
        python_backward += python_forward
    count = setup.accumulation
    backward = max(gpu_backward + head_backward, python_backward)
    parts = {
        "forward": count * max(gpu_forward + head_forward, python_forward),
        "backward": count * backward,
        "communication": communication_seconds(setup, rates, overheads, count * backward),
        "optimizer": optimizer_seconds(setup, rates, overheads) + overheads.step_s,
    }
    corrected = {name: value * rates.correction for name, value in parts.items() if value}
    return StepTime(parts=corrected, tokens=setup.step_tokens)


def gpu_seconds(setup: Setup, rates: Rates, overheads: Overheads) -> tuple[float, float]:
    """Forward and backward of all decoder layers on the GPU: products, attention, and the memory traffic between."""
    shape, tokens = setup.shape, setup.tokens
    inner = [linear for linear in shape.linears if linear.kind != "lm_head"]
    products = sum(product_seconds(linear, tokens, rates, overheads) for linear in inner)
    products += 2 * tokens * active_expert_weights(shape) / rates.product_flops
    attention = 2 * setup.micro * shape.heads * shape.head_dim * setup.length**2 * shape.layers
    moved = (between_bytes(shape) * shape.layers + adapter_traffic(setup)) * tokens
    between = overheads.traffic * moved / rates.memory_bytes_per_s
    dequantise = 2.6 * shape.linear_parameters / rates.memory_bytes_per_s if setup.method == "qlora" else 0.0
    forward = products + attention / rates.attention_forward_flops + between + dequantise
    backward = (2 if setup.method == "full" else 1) * products
    backward += 2.5 * attention / rates.attention_backward_flops + 2 * between + dequantise
    return forward, backward


def python_seconds(setup: Setup, rates: Rates, overheads: Overheads) -> tuple[float, float]:
    """What Python needs to start the kernels of a forward and a backward pass, hooks included."""
    layers, modules = setup.shape.layers, len_modules(setup.shape)
    forward, backward = layers * overheads.forward_launches, layers * overheads.backward_launches
    if setup.method != "full":
        forward += modules * overheads.adapter_launches
        backward += 2 * modules * overheads.adapter_launches
    if setup.preset.zero_stage == 3:
        forward += layers * overheads.zero3_forward_launches
        backward += layers * overheads.zero3_backward_launches
    return forward * rates.launch_s, backward * rates.launch_s


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
    """On the GPU: Adam reads 16 and writes 12 bytes of each parameter, the rest is clipping, casts and flat copies."""
    stage = setup.preset.zero_stage
    share = setup.trainable / (setup.world if stage else 1)
    tensors = (
        len_modules(setup.shape) + 4 * setup.shape.layers if setup.method == "full" else 2 * len_modules(setup.shape)
    )
    norms = tensors * overheads.gradient_launches * rates.launch_s if stage else 0.0
    if setup.preset.offload_optimizer == "none":
        moved_bytes = overheads.deepspeed_bytes if stage else overheads.optimizer_bytes
        return moved_bytes * share / rates.memory_bytes_per_s + norms
    return offloaded_seconds(setup, rates, share) + nvme_seconds(setup, rates, share) + norms


def offloaded_seconds(setup: Setup, rates: Rates, share: float) -> float:
    """DeepSpeedCPUAdam, and over the host link updated weights 2P and gradients 2P.

    With accumulation each micro-batch fetches what is there, adds on the GPU and sends it back, 6P
    (stage_1_and_2.py, async_accumulate_grad_in_cpu_via_gpu).  Adam moves 28 bytes a parameter (4 arrays in, 3 out);
    the processes of a host share its memory: seconds = max(share / rate, 28 * local * share / host memory).
    """
    gradients = 2 if setup.accumulation == 1 else 6 * setup.accumulation
    moved = (2 + gradients) * share / rates.host_bytes_per_s
    if setup.preset.offload_param != "none":
        moved += 2 * 3 * setup.accumulation * setup.shape.parameters / setup.world / rates.host_bytes_per_s
    local = min(setup.world, NODE_GPUS)
    adam = max(share / rates.adam_parameters_per_s, ADAM_BYTES * local * share / rates.host_memory_bytes_per_s)
    return adam + moved


def nvme_seconds(setup: Setup, rates: Rates, share: float) -> float:
    """What goes to and from the drive of a host, which its processes share; nothing of it is taken to overlap.

    optimizer: fp32 weights, gradients and two moments read, 16P, and written, 16P.  Parameters: 2 bytes read in each
    pass of each micro-batch, and written once.
    """
    local = min(setup.world, NODE_GPUS)
    moved = 32 * share if setup.preset.offload_optimizer == "nvme" else 0.0
    if setup.preset.offload_param == "nvme":
        passes = setup.accumulation * (3 if setup.recompute else 2)
        moved += 2 * (passes + 1) * setup.shape.parameters / setup.world
    return local * moved / rates.nvme_bytes_per_s
