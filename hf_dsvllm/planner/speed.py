"""Seconds of one optimizer step from the rates of a card; arithmetic only.

seconds = accumulation * (forward + backward [+ the forward pass again] + loss + gradients) + communication + optimizer.

Each pass is the larger of what the GPU needs (products, attention, memory traffic of everything in between) and what
Python needs to start the kernels.  Notation: t tokens of a micro-batch, h hidden, V vocabulary, P trainable
parameters, N processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hf_dsvllm.model_shape import Linear, ModelShape
from hf_dsvllm.planner.activations import Numerics
from hf_dsvllm.planner.cards import Rates
from hf_dsvllm.planner.setup import NODE_GPUS, Setup

__all__ = ["OVERHEADS", "Overheads", "StepTime", "step_time"]
# Bytes a parameter that take as long to move as signs take to be packed, sent and unpacked: 1.7e9 parameters on 2 H200s
# took 0.136, 0.196 and 0.282 s more than an ordinary step (2026-11-28-training-speed-offload-2xH200, a result).
ONEBIT_BYTES = {"onebit_adam": 330, "zero_one_adam": 475, "onebit_lamb": 684}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What formulas cannot know; fitted to the cells of benchmarks/planner that are not held out, of hosts whose
    launches were measured (cases A to D of the first cells were timed elsewhere).

    `narrow`: inputs + outputs at which a product reaches half of the best rate; `short`: tokens at which it does.
    `traffic` multiplies the bytes counted for operations between products.  Launches (each of `Rates.launch_s`) that
    Python makes: for a decoder layer, for an adapter.  Python that starts no kernels is in seconds: it took the same on
    hosts whose launches take 7 and 17 microseconds.  `hook`: ZeRO-3's around one module, measured on a CPU (AMD EPYC,
    DeepSpeed 0.19.8, one process, a tiny Qwen3 of 12 layers with and without: 0.218 ms a module for all weights, 0.213
    with adapters; backward 0.13, solved from both with reductions counted apart, so less sure); `gather`: one
    matrix between several processes; `reduce`: its gradient; `norm`: of one gradient.
    `hidden`: share of the gradients' reduction that goes on behind the backward pass, `gather_hidden` of ZeRO-3's
    gathers.  Bytes an optimizer moves per parameter: PyTorch's fused AdamW and clipping, and DeepSpeed's, by its code
    70 (norm 20, clipping 8, Adam 28, back to bf16 10, zeroing 4).
    """

    narrow: float = 1750.0
    short: float = 520.0
    traffic: float = 1.165
    forward_launches: float = 108.0
    backward_launches: float = 231.0
    adapter_launches: float = 28.0
    hook_forward_s: float = 2.15e-4
    hook_backward_s: float = 1.3e-4
    gather_s: float = 7.7e-4
    reduce_s: float = 6.3e-4
    norm_s: float = 1.25e-4
    hidden: float = 0.5
    gather_hidden: float = 0.2
    step_s: float = 0.031
    optimizer_bytes: float = 46.0
    deepspeed_bytes: float = 68.0


OVERHEADS = Overheads()
TILE_TOKENS = 4096  # trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE
LAYER_MODULES = 6  # beside its linear layers and norms of queries and keys
ADAPTER_MODULES = 4  # called around a linear layer that has one: PEFT's wrapper, dropout, A and B
ONE_OPERATION_BYTES = 5.5  # read and written for an element of a layer's output, see `adapter_traffic`
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
    head_backward += gradient_bytes(setup) / rates.memory_bytes_per_s
    if setup.recompute:
        gpu_backward += gpu_forward
        python_backward += python_forward
    forward, backward = (gpu_forward + head_forward, python_forward), (gpu_backward + head_backward, python_backward)
    parts = {
        "forward": setup.accumulation * max(forward),
        "backward": setup.accumulation * max(backward),
        "communication": communication_seconds(setup, rates, overheads, forward, backward),
        "optimizer": optimizer_seconds(setup, rates, overheads) + overheads.step_s,
    }
    corrected = {name: value * rates.correction for name, value in parts.items() if value}
    return StepTime(parts=corrected, tokens=setup.step_tokens)


def gpu_seconds(setup: Setup, rates: Rates, overheads: Overheads) -> tuple[float, float]:
    """Forward and backward of all decoder layers on the GPU: products, attention, and the memory traffic between.

    Processes that share sequences (Ulysses) have all tokens of their share of the heads in attention.
    """
    shape, tokens = setup.shape, setup.tokens
    inner = [linear for linear in shape.linears if linear.kind != "lm_head"]
    products = sum(product_seconds(linear, tokens, rates, overheads) for linear in inner)
    products += 2 * tokens * active_expert_weights(shape) / rates.product_flops
    heads = shape.heads / (setup.world if setup.preset.sequence_parallel else 1)
    attention = 2 * setup.micro * heads * shape.head_dim * setup.length**2 * shape.layers
    moved = (between_bytes(shape, setup.numerics) * shape.layers + adapter_traffic(setup)) * tokens
    between = overheads.traffic * moved / rates.memory_bytes_per_s
    dequantise = 2.6 * shape.linear_parameters / rates.memory_bytes_per_s if setup.method == "qlora" else 0.0
    casts = 6.0 * shape.linear_parameters / rates.memory_bytes_per_s if setup.numerics.mixed else 0.0
    forward = products + attention / rates.attention_forward_flops + between + dequantise + casts
    backward = (2 if setup.method == "full" else 1) * products
    backward += 2.5 * attention / rates.attention_backward_flops + 2 * between + dequantise
    return forward, backward


def gradient_bytes(setup: Setup) -> float:
    """Bytes that gradients move on the GPU in one micro-batch's backward pass, beside the products that make them.

    Each trained parameter, without DeepSpeed: from bf16 to fp32 6, added to those of earlier micro-batches 12 (8 in, 4
    out), and copied to a replica's bucket, divided, and back 16 once a step.  ZeRO-1 and 2: copied to the bucket 4,
    divided 4; of the own share flattened 4, to fp32 6 and added 12 (ZeRO-2; stage_1_and_2.py, average_tensor and
    _add_to_grad_partition_buffer), or copied to its buffer 4 (ZeRO-1, only at the last micro-batch, before which they
    are added in bf16: 6).  ZeRO-3: bucket 4, divided 4, own share added 6.  The head under TRL's loss: fp32 sums set to
    zero 4Vh, read and written once for each 4,096 tokens 8Vh, and cast (4 + e)Vh; the embedding's gradient eVh, and if
    they are tied their sum 3eVh.
    """
    shape, world, count = setup.shape, setup.world, setup.accumulation
    trainable = setup.trainable
    stage, e = setup.preset.zero_stage, setup.numerics.weight_bytes
    if stage in (None, 0):
        moved = (6.0 if setup.numerics.mixed else 0.0) + 12.0 * (count - 1) / count + (16.0 / count if world > 1 else 0)
    elif stage == 1:
        moved = (8.0 + 4.0 / world + 6.0 * (count - 1)) / count
    else:
        moved = 8.0 + (22.0 if stage == 2 else 6.0) / world
    if setup.method != "full":
        return moved * trainable
    head = 12.0 + e + 8.0 * -(-setup.tokens // TILE_TOKENS) if setup.loss == "trl" else 0.0
    return moved * trainable + shape.vocab * shape.hidden * (head + (4 if shape.tied else 1) * e)


def python_seconds(setup: Setup, rates: Rates, overheads: Overheads) -> tuple[float, float]:
    """What Python needs to start the kernels of a forward and a backward pass, hooks included.

    ZeRO-3 hooks every module (parameter_offload.py, _register_deepspeed_module): those of a layer, and for each adapter
    PEFT's wrapper, dropout, A and B.  Matrices are larger than the prefetch bucket of 0.9 hidden squared, so that each
    is gathered by itself, while adapters' are coalesced; one process that offloads nothing has nothing to gather.
    A layer that is gathered whole is one module, gathered at once and reduced by the bucket.
    """
    layers, modules = setup.shape.layers, len_modules(setup.shape)
    forward, backward = layers * overheads.forward_launches, layers * overheads.backward_launches
    if setup.method != "full":
        forward += modules * overheads.adapter_launches
        backward += 2 * modules * overheads.adapter_launches
    forward, backward = forward * rates.launch_s, backward * rates.launch_s
    if setup.preset.zero_stage != 3:
        return forward, backward
    hooked = layers * (LAYER_MODULES + (2 if setup.shape.qk_norm else 0)) + modules
    if setup.method != "full":
        hooked += modules * ADAPTER_MODULES
    units = modules
    if setup.whole_layers:
        hooked = units = layers
    split = setup.world > 1 or setup.preset.offload_param != "none"
    gathers = units * overheads.gather_s if split else 0.0
    forward += hooked * overheads.hook_forward_s + gathers
    backward += hooked * overheads.hook_backward_s + gathers
    if setup.method == "full":
        backward += units * overheads.reduce_s
    return forward, backward


def product_seconds(linear: Linear, tokens: int, rates: Rates, overheads: Overheads) -> float:
    """2 * tokens * weights / rate; narrow matrices and few tokens reach less of the rate."""
    widths = linear.inputs + linear.outputs
    reached = widths / (widths + overheads.narrow) * tokens / (tokens + overheads.short)
    return 2 * tokens * linear.weights / (rates.product_flops * reached)


def active_expert_weights(shape: ModelShape) -> int:
    """Weights of the experts a token passes through."""
    if not shape.experts:
        return 0
    return shape.expert_parameters * shape.experts_per_token // shape.experts


def between_bytes(shape: ModelShape, numerics: Numerics) -> float:
    """Bytes read and written per token and layer between products, forward.

    RMSNorm, in eager PyTorch six kernels over h (to fp32 2+4, square 4+4, mean 4, times root 4+4, to bf16 4+2, times
    scale 2+2) = 36h, twice; residual sums 6h, twice; norms on queries and keys 36(q+k); rotation 20(q+k); attention
    reads and writes 2q+2k+2k+2q; silu 4i, product 6i.  Mixed, the residual stream in fp32 under autocast: RMSNorm has
    no casts (square 4+4, mean 4, times root 4+4, times scale 4+4 = 28h, twice), the sums take 10h, twice, and each of
    q, k, v, gate and up casts its input anew, 6h.  Fused kernels read and write once: norms 4h, twice, and 4(q+k),
    rotation 4(q+k), silu and product 6i.
    """
    h, q, k = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = shape.intermediate if not shape.experts else shape.experts_per_token * shape.expert_intermediate
    if numerics.fused:
        return 20 * h + 4 * (q + k) + 4 * (q + k) + 6 * inner + (4 * (q + k) if shape.qk_norm else 0)
    moved = (106 if numerics.mixed else 84) * h + 20 * (q + k) + 4 * (q + k) + 10 * inner
    return moved + (36 * (q + k) if shape.qk_norm else 0)


def adapter_traffic(setup: Setup) -> float:
    """Bytes per token that adapters move in all layers, forward: dropout 2+2+1 of the input, scale and sum 10 of the
    output; fp32 adapters read the input (10 with its copy to fp32 and back), and 4-bit layers clone their output (4).

    As one operation a layer reads and writes its output once more, 4 by count and 5.5 by measurement (8B LoRA, H200:
    products of rank 16 do not reach the memory's rate).
    """
    if setup.method == "full":
        return 0.0
    numerics = setup.numerics
    reads = (5 if setup.lora_dropout else 0) + (10 if numerics.casts or setup.device == "cpu" else 0)
    writes = ONE_OPERATION_BYTES if numerics.one_operation else 10 + (4 if setup.method == "qlora" else 0)
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


def communication_seconds(
    setup: Setup, rates: Rates, overheads: Overheads, forward: tuple[float, float], backward: tuple[float, float]
) -> float:
    """Exposed seconds: what does not hide behind the passes, each given as (GPU, Python), and the all-gather after the
    step.

    ZeRO-1/2: gradients 2 bytes, updated weights 2; ZeRO-3: weights gathered forward and backward, gradients scattered;
    each times (N-1)/N.  ZeRO-1 and replicas reduce once a step, ZeRO-2 each micro-batch (stage_1_and_2.py,
    reduce_ready_partitions_and_remove_grads; counted).  Replicas average gradients: twice (N-1)/N of them.  ZeRO-3's
    GPU waits for a gather while Python goes on: where Python is slower anyway, that costs nothing.
    """
    world, stage, count = setup.world, setup.preset.zero_stage, setup.accumulation
    if world == 1:
        return 0.0
    share = (world - 1) / world
    e = setup.numerics.weight_bytes if setup.method == "full" else setup.numerics.adapter_bytes
    one_pass = share * e * setup.trainable / rates.link_bytes_per_s
    if stage == 3:
        weights = share * 2 * setup.shape.parameters / rates.link_bytes_per_s
        gathers = overheads.gather_hidden
        waits = (
            shown(weights, forward[0], gathers),
            shown((2 if setup.recompute else 1) * weights, backward[0], gathers)
            + shown(one_pass, backward[0], overheads.hidden),
        )
        passes = zip((forward, backward), waits, strict=True)
        return count * sum(max(gpu + wait, python) - max(gpu, python) for (gpu, python), wait in passes)
    times = count if stage == 2 else 1
    exposed = times * shown(2 * one_pass, max(backward), overheads.hidden)
    return exposed + (one_pass if stage in (1, 2) else 0.0)


def shown(moved: float, behind: float, hidden: float) -> float:
    """Seconds of `moved` that remain: its share `hidden` goes on behind other work, but no longer than that share of
    the work takes.
    """
    return max(moved * (1 - hidden), moved - hidden * behind)


def optimizer_seconds(setup: Setup, rates: Rates, overheads: Overheads) -> float:
    """On the GPU: Adam reads 16 and writes 12 bytes of each parameter, the rest is clipping, casts and flat copies.

    Other optimizers read and write more or fewer bytes of state than Adam's 8; 1-bit ones pack and unpack signs.

    DeepSpeed takes the norm of each gradient in fp64, one after the other (get_grad_norm_direct): under ZeRO-1 and 2 of
    those in its share, under ZeRO-3, where each process holds a piece of every gradient, of all.
    """
    stage = setup.preset.zero_stage
    share = setup.trainable / (setup.world if stage else 1)
    tensors = (
        len_modules(setup.shape) + 4 * setup.shape.layers if setup.method == "full" else 2 * len_modules(setup.shape)
    )
    norms = tensors / (1 if stage == 3 else setup.world) * overheads.norm_s if stage else 0.0
    if setup.preset.offload_optimizer == "none":
        moved_bytes = overheads.deepspeed_bytes if stage else overheads.optimizer_bytes
        moved_bytes += 2 * (setup.optimizer_bytes - 8) + ONEBIT_BYTES.get(setup.preset.name, 0)
        return moved_bytes * share / rates.memory_bytes_per_s + norms
    return offloaded_seconds(setup, rates, share) + nvme_seconds(setup, rates, share) + norms


def offloaded_seconds(setup: Setup, rates: Rates, share: float) -> float:
    """DeepSpeedCPUAdam, and over the host link updated weights 2P and gradients 2P.

    With accumulation each micro-batch fetches what is there, adds on the GPU and sends it back, 6P
    (stage_1_and_2.py, async_accumulate_grad_in_cpu_via_gpu), but with the feature `gpu_gradients`.  Adam moves 28 bytes
    a parameter (4 arrays in, 3 out); the processes of a host share its memory:
    seconds = max(share / rate, 28 * local * share / host memory).  With `overlap_offload` weights return as fp32 behind
    Adam, and gradients leave behind the backward pass of the last micro-batch.
    """
    once = 0 if setup.overlaps_offload else 2
    gradients = once if setup.accumulation == 1 or setup.sums_on_gpu else 6 * setup.accumulation
    moved = (once + gradients) * share / rates.host_bytes_per_s
    if setup.preset.offload_param != "none":
        moved += 2 * 3 * setup.accumulation * setup.shape.parameters / setup.world / rates.host_bytes_per_s
    local = min(setup.world, NODE_GPUS)
    adam = max(share / rates.adam_parameters_per_s, ADAM_BYTES * local * share / rates.host_memory_bytes_per_s)
    if setup.overlaps_offload:
        adam = max(adam, 4 * share / rates.host_bytes_per_s)
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
