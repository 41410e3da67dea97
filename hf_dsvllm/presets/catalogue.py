"""The presets: each is a function that returns a frozen `Preset`, every value with the reason for it.

Byte counts in the comments are for P trainable parameters on N ranks with bf16 weights and Adam; their derivation is in
docs/presets.md.
"""

from __future__ import annotations

import dataclasses

from hf_dsvllm.presets.preset import Preset, Setting

# Read from the releases: 0.19.6 holds runtime/fp16/onebit, 0.19.7 does not.
LAST_DEEPSPEED_WITH_ONEBIT = "0.19.6"

# -- settings shared by several presets

_FP32_ACCUMULATION = Setting(
    "data_types.grad_accum_dtype",
    "fp32",
    "step peak 2P+16P/N instead of 2P+20P/N with bf16 accumulation; 71.9 against 82.5 GiB for 4B on one H200",
)
_OVERLAP = Setting("zero_optimization.overlap_comm", True, "reduce gradients while the backward pass still runs")
_CONTIGUOUS = Setting(
    "zero_optimization.contiguous_gradients", True, "copy gradients to one buffer: no fragmentation in backward"
)
_BUCKET = Setting(
    "zero_optimization.reduce_bucket_size",
    200_000_000,
    "elements: 0.4 GB a bucket in bf16, 0.8 in fp32, twice with overlap; the default 5e8 takes 2.5 times that",
)
_STAGE3 = (
    _OVERLAP,
    _CONTIGUOUS,
    Setting("zero_optimization.reduce_bucket_size", "auto", "the Trainer fills in hidden_size squared"),
    Setting("zero_optimization.stage3_prefetch_bucket_size", "auto", "0.9 of hidden_size squared: one layer ahead"),
    Setting(
        "zero_optimization.stage3_param_persistence_threshold",
        "auto",
        "10 x hidden_size: norms and biases stay whole, their gathers would be all latency",
    ),
    Setting(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        True,
        "without it a ZeRO-3 save writes shards and no usable safetensors",
    ),
)
_ADAM_ON_CPU = Setting(
    "optim", "adamw_torch", "offload replaces it with DeepSpeedCPUAdam, in its AdamW mode for this one"
)
NVME_SUB_GROUP = 100_000_000  # as much again takes a part of the embedding, the largest parameter
UNSHARDED = (
    "ZeRO-1 and ZeRO-2 on one GPU shard nothing: use lora or qlora, zero2_offload or zero3_offload, or more GPUs"
)
_ROUNDED = "or more: page-locked buffers round up to powers of two"
_LINUX_AIO = "needs libaio (apt-get install libaio-dev) and --nvme_path on a local disk"


def none() -> Preset:
    return Preset(
        name="none",
        summary="one process, plain PyTorch; nothing added",
        shards="nothing",
        lives="everything on the GPU: 16P with fp32 master weights",
        constraints=("one process",),
    )


def ddp() -> Preset:
    return Preset(
        name="ddp",
        summary="PyTorch DistributedDataParallel: a whole copy on each GPU",
        shards="nothing (the batch only)",
        lives="everything on every GPU: 16P",
        arguments=(
            Setting("ddp_find_unused_parameters", False, "decoder-only models use every parameter: saves a graph walk"),
        ),
    )


def zero1() -> Preset:
    return Preset(
        name="zero1",
        summary="optimizer states sharded",
        shards="optimizer states",
        lives="GPU: 2P weights + 14P/N; 2P more while several micro-batches are added",
        zero_stage=1,
        # bf16 accumulation here: with fp32 ZeRO-1 becomes BF16_Optimizer, which keeps 4P of unsharded gradients.
        deepspeed=(_OVERLAP, _CONTIGUOUS, _BUCKET),
        constraints=(UNSHARDED,),
    )


def zero2() -> Preset:
    return Preset(
        name="zero2",
        summary="optimizer states and gradients sharded; the fastest that fits for most models",
        shards="optimizer states, gradients",
        lives="GPU: 2P weights + 16P/N",
        zero_stage=2,
        deepspeed=(_OVERLAP, _CONTIGUOUS, _BUCKET, _FP32_ACCUMULATION),
        constraints=(UNSHARDED,),
    )


def zero2_offload() -> Preset:
    return dataclasses.replace(
        zero2(),
        name="zero2_offload",
        summary="ZeRO-2 with optimizer states and step on the CPU",
        lives="GPU: 2P weights + gradients in flight; host: 18P over all ranks",
        offload_optimizer="cpu",
        # DeepSpeedCPUAdam accumulates in its own fp32 host buffers; the GPU keeps bf16 gradients.
        deepspeed=(_OVERLAP, _CONTIGUOUS, _BUCKET),
        arguments=(_ADAM_ON_CPU,),
        constraints=(
            f"host RAM 18 bytes per parameter (+2 with gradient accumulation) {_ROUNDED}",
            "a C++ compiler for CPUAdam",
        ),
    )


def zero3() -> Preset:
    return Preset(
        name="zero3",
        summary="weights, gradients and optimizer states sharded",
        shards="weights, gradients, optimizer states",
        lives="GPU: 16P/N + the output head and up to three layers gathered",
        zero_stage=3,
        deepspeed=_STAGE3,
        constraints=("arguments must exist before the model is loaded", "no device_map"),
    )


def zero3_offload_optimizer() -> Preset:
    return dataclasses.replace(
        zero3(),
        name="zero3_offload_optimizer",
        summary="ZeRO-3 with optimizer states and step on the CPU",
        lives="GPU: 2P/N weights + gradients in flight; host: 18P over all ranks",
        offload_optimizer="cpu",
        arguments=(_ADAM_ON_CPU,),
        constraints=(f"host RAM 18 bytes per parameter {_ROUNDED}", "a C++ compiler for CPUAdam"),
    )


def zero3_offload() -> Preset:
    return dataclasses.replace(
        zero3_offload_optimizer(),
        name="zero3_offload",
        summary="ZeRO-3 with weights and optimizer states on the CPU: the largest model for a GPU",
        lives="GPU: the layer in use; host: 20P over all ranks",
        offload_param="cpu",
        constraints=(
            f"host RAM 20 bytes per parameter {_ROUNDED}",
            "a C++ compiler for CPUAdam",
            "limited by the host link",
        ),
    )


def zero3_nvme() -> Preset:
    return dataclasses.replace(
        zero3_offload(),
        name="zero3_nvme",
        summary="ZeRO-3 with weights and optimizer states on NVMe: when the host RAM is too small as well",
        lives="GPU: the layer in use; NVMe: 18P; host: 2P over all ranks for gradients, and buffers",
        offload_optimizer="nvme",
        offload_param="nvme",
        deepspeed=(
            *(each for each in _STAGE3 if each.key != "zero_optimization.stage3_prefetch_bucket_size"),
            # DeepSpeed 0.19.8 stops where all swap buffers are taken: in the second step of 1.7B on an H200 by four
            # weights of a layer whose recomputation was near, and the embedding.
            Setting(
                "zero_optimization.stage3_max_reuse_distance",
                0,
                "a weight is let go after each use: kept, it would keep one of the few swap buffers",
            ),
            Setting("zero_optimization.stage3_prefetch_bucket_size", 0, "what is fetched early takes a buffer too"),
            Setting(
                "zero_optimization.sub_group_size",
                NVME_SUB_GROUP,
                "parameters stepped at once: 24 bytes of host memory for each and 2 for each rank; 1e9 by default",
            ),
            # 1 MiB blocks, 8 in flight, one thread: what DeepSpeed's own aio sweep gives for NVMe drives
            Setting("aio.block_size", 1_048_576, "1 MiB requests: large enough to reach an NVMe drive's bandwidth"),
            Setting("aio.queue_depth", 8, "eight requests in flight keep one drive busy"),
            Setting("aio.intra_op_parallelism", 1, "one thread per file: more only helps striped volumes"),
            Setting("aio.single_submit", False, "submit requests in batches"),
            Setting("aio.overlap_events", True, "collect finished requests while others are submitted"),
        ),
        constraints=(_LINUX_AIO, "each save copies the swap files into the checkpoint"),
    )


def lora() -> Preset:
    return Preset(
        name="lora",
        summary="low-rank adapters on a frozen 16-bit model",
        shards="nothing",
        lives="GPU: 2 bytes per frozen parameter + 16 per adapter parameter",
        adapter="lora",
        arguments=(
            Setting("ddp_find_unused_parameters", False, "every adapter is used in every step: saves a graph walk"),
        ),
    )


def qlora() -> Preset:
    return dataclasses.replace(
        lora(),
        name="qlora",
        summary="low-rank adapters on a frozen 4-bit model (nf4, double quantisation)",
        lives="GPU: 0.52 bytes per frozen linear parameter + 16 per adapter parameter",
        adapter="qlora",
        constraints=("bitsandbytes",),
    )


def zero2_lowmem() -> Preset:
    return dataclasses.replace(
        zero2(),
        name="zero2_lowmem",
        summary="ZeRO-2 with master weights, gradients and Adam states in bf16; what is stepped is rounded at random",
        lives="GPU: 2P weights + 8P/N",
        deepspeed=(
            _OVERLAP,
            _CONTIGUOUS,
            _BUCKET,
            Setting("bf16.bf16_master_weights_and_grads", True, "half the bytes of fp32 master weights and gradients"),
            Setting("bf16.bf16_optimizer_states", True, "half the bytes of Adam's two moments"),
        ),
        arguments=(Setting("bf16", True, "bf16 master weights exist only in DeepSpeed's bf16 mode"),),
        constraints=(UNSHARDED, "AdamW alone, whose updates are rounded to bf16 at random"),
        experimental=True,
    )


def long_context() -> Preset:
    return dataclasses.replace(
        zero3(),
        name="long_context",
        summary="ZeRO-3 with Ulysses sequence parallelism: each GPU holds a slice of every sequence",
        shards="weights, gradients, optimizer states, the sequence",
        lives="GPU: 16P/N + activations of length/N",
        min_processes=2,
        sequence_parallel=True,
        constraints=(
            "two or more GPUs",
            "attention heads and sequence length divisible by the number of GPUs",
            "attention sdpa or flash_attention_2",
        ),
        experimental=True,
    )


def zero3_hpz() -> Preset:
    return dataclasses.replace(
        zero3(),
        name="zero3_hpz",
        summary="ZeRO-3 with a second copy of the weights sharded inside each node (ZeRO++ hpZ)",
        lives="GPU: 16P/N + 2P/(GPUs per node)",
        deepspeed=(
            *_STAGE3,
            Setting(
                "zero_optimization.zero_hpz_partition_size",
                "gpus_per_node",
                "backward gathers stay inside the node, off the slow network",
            ),
        ),
        min_processes=2,
        constraints=("pays between nodes only", "open upstream failures (DeepSpeed #4852, #6926)"),
        experimental=True,
    )


def onebit(name: str, optimizer: str, freeze_key: str, states: int, step: int) -> Preset:
    """`states` and `step`: bytes a parameter, as `hf_dsvllm.planner.states` counts them; N processes."""
    params: tuple[Setting, ...] = (
        Setting("optimizer.type", optimizer, "compressed communication lives in this optimizer"),
        Setting("optimizer.params.lr", "auto", "the Trainer's learning rate"),
        Setting("optimizer.params.weight_decay", "auto", "the Trainer's weight decay"),
        Setting("optimizer.params.cuda_aware", False, "plain NCCL backend"),
        Setting("optimizer.params.comm_backend_name", "compressed", "torch alone; nccl needs CuPy, mpi a patched MPI"),
        Setting(f"optimizer.params.{freeze_key}", 100, "uncompressed steps first, until the variance is stable"),
    )
    return Preset(
        name=name,
        summary=f"DeepSpeed's {optimizer}: gradients cross the network in one bit",
        shards="nothing (optimizer states whole on each rank)",
        lives=f"GPU: {states}P + 4P/N, {step}P more in the step",
        zero_stage=0,
        deepspeed=params,
        min_processes=2,
        constraints=("ZeRO stage 0 only", f"DeepSpeed {LAST_DEEPSPEED_WITH_ONEBIT} or older", "CUDA"),
        needs_onebit=True,
        experimental=True,
    )
