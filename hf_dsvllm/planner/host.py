"""Host memory, NVMe and disk of a run, and the vLLM process beside it; arithmetic only."""

from __future__ import annotations

import dataclasses

from hf_dsvllm.memory import ADAM_BYTES, Layout, offloaded_bytes
from hf_dsvllm.planner.footprint import Setup

__all__ = ["Engine", "HostFootprint", "disk_bytes", "engine_footprint", "host_footprint"]

GIB = 2**30
# Resident bytes of one process once torch, transformers, TRL and DeepSpeed are imported and, on a GPU, CUDA runs.
PROCESS_BYTES = {"cuda": int(1.3 * GIB), "cpu": int(0.62 * GIB)}
# vLLM 0.26 on an H200, 8B: left on the card at sleep level 2, and what it takes beside weights and KV cache when awake.
ENGINE_ASLEEP_BYTES = int(2.0 * GIB)
ENGINE_WORK_BYTES = int(3.0 * GIB)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostFootprint:
    """Bytes of host memory of all processes of one node: at loading, in training (of that pinned), at a save."""

    load: int
    train: int
    pinned: int
    save: int
    nvme: int

    @property
    def measured_peak(self) -> int:
        """Without loading from files and without saves, as the cells of benchmarks/planner run."""
        return self.train

    @property
    def peak(self) -> int:
        return max(self.load, self.train, self.save)


def host_footprint(setup: Setup) -> HostFootprint:
    """load = N * (process + model); train = N * process + offloaded states; save adds 2P a process under ZeRO-1 and 2.

    4-bit weights are quantised on the GPU tensor by tensor as the files are read: nothing stays on the host.

    Offloaded (stage_1_and_2.py, stage3.py): fp32 weights, Adam's moments and gradients 16P, bf16 staging 2P, and with
    parameters offloaded their 2P; pinned where CUDA is there.  Saving clones the whole state dict to every rank's host
    memory (accelerate, get_state_dict); ZeRO-3 gathers it on rank 0 only.
    """
    shape, preset, world = setup.shape, setup.preset, setup.world
    e = setup.numerics.weight_bytes
    processes = world * PROCESS_BYTES[setup.device]
    offloaded, nvme = offloaded_bytes(shape, layout_of(setup), setup.trainable, preset.adapter)
    weights = e * shape.parameters
    saved = weights if setup.method == "full" else e * setup.trainable
    copies = world if preset.zero_stage in (0, 1, 2) else 1
    return HostFootprint(
        load=processes + (0 if setup.method == "qlora" else world * weights),
        train=processes + offloaded,
        pinned=offloaded if setup.device == "cuda" else 0,
        save=processes + offloaded + copies * saved,
        nvme=nvme,
    )


def layout_of(setup: Setup) -> Layout:
    preset = setup.preset
    return Layout(
        zero_stage=preset.zero_stage,
        offload_optimizer=preset.offload_optimizer,
        offload_param=preset.offload_param,
        world_size=setup.world,
        weight_bytes=setup.numerics.weight_bytes,
        fp32_accumulation=True,
        optimizer_state_bytes=ADAM_BYTES,
    )


def disk_bytes(setup: Setup) -> int:
    """One checkpoint: weights 2P and, for resuming, fp32 weights and Adam's moments 12P."""
    e = setup.numerics.weight_bytes if setup.method == "full" else setup.numerics.adapter_bytes
    return int((e + 12) * setup.trainable)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The vLLM process: bytes on its GPU while it answers and while it sleeps; `kv_bytes` of it are KV cache."""

    awake: int
    asleep: int
    kv_bytes: int


def engine_footprint(setup: Setup, *, sequences: int, length: int) -> Engine:
    """awake = 2 * all parameters + kv + workspace;  kv = sequences * length * 4 * layers * kv_heads * head_dim."""
    shape = setup.shape
    kv = sequences * length * 4 * shape.layers * shape.kv_heads * shape.head_dim
    return Engine(awake=2 * shape.parameters + kv + ENGINE_WORK_BYTES, asleep=ENGINE_ASLEEP_BYTES, kv_bytes=kv)
