"""Host memory, NVMe and disk of a run; arithmetic only."""

from __future__ import annotations

import dataclasses

from hf_dsvllm.ds_config import NVME_BUFFERS, swap_buffer_elements
from hf_dsvllm.memory import SUB_GROUP
from hf_dsvllm.planner.footprint import Setup

__all__ = ["HostFootprint", "disk_bytes", "host_footprint"]

GIB = 2**30
# Resident bytes of one process with torch, transformers and TRL imported and CUDA running, under the plain Trainer and
# under DeepSpeed, in training; and of the latter before training.  Measured: H200 host, torch 2.11; CPUs, torch 2.13.
PLAIN_BYTES = int(1.44 * GIB)
DEEPSPEED_BYTES = int(1.86 * GIB)
TRL_BYTES = int(0.12 * GIB)
# An NCCL communicator, probably its library and host buffers: ddp and qlora on two H200s took 0.33 and 0.40 GiB a
# process more than on one.  DeepSpeed makes one for a single process too.
GROUP_BYTES = int(0.36 * GIB)
STARTED_BYTES = int(1.2 * GIB)
STARTED_DEEPSPEED_BYTES = int(1.4 * GIB)  # the same while a recipe loads; benchmarks/results, main-job on H200s
CPU_BYTES = int(0.75 * GIB)
MAX_IN_CPU = 1_000_000_000  # parameters whose weights DeepSpeed keeps in host memory: its default `max_in_cpu`
SMALL_PINNED_BYTES = int(1.28 * GIB)  # ZeRO-3's offload: small buffers beside those of the formula


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostFootprint:
    """Bytes of host memory of all processes: at loading, at engine init, in training (of that pinned), at a save.

    `mapped` is what their resident sizes show of the file of weights at loading: pages that they share and the kernel
    takes back where it needs them, so nothing that must fit.
    """

    load: int
    mapped: int
    init: int
    train: int
    pinned: int
    save: int
    nvme: int

    @property
    def measured_peak(self) -> int:
        """Without loading from files and without saves, as the cells of benchmarks/planner run."""
        return max(self.init, self.train)

    @property
    def resident_peak(self) -> int:
        """What the processes' resident sizes add up to in a run that saves nothing, mapped files in each of them."""
        return max(self.load + self.mapped, self.init, self.train)

    @property
    def peak(self) -> int:
        """What the machine must have, saves too."""
        return max(self.load, self.init, self.train, self.save)


def host_footprint(setup: Setup) -> HostFootprint:
    """load = N * process; train = N * process + offloaded states; save adds 2P a process under ZeRO-1 and 2.

    Weights in the dtype of their file are views of it (transformers 5.19: 540 MB of model are 2 MB of private memory)
    until they are on the GPU, file by file (8B in files of 4 GB: 5.4 GiB resident on an H200); for ZeRO-3 and 4 bit all
    files are there at once (16.8 and 16.9 GiB).  Where fp32 is trained each process holds 4P.  ZeRO-3
    passes what each rank trains through host memory once: 2P/N at engine init (stage3.py, create_fp16_partitions over
    the trainable groups alone; frozen weights stay where they were loaded).  Saving clones the whole state dict to
    every rank's host memory (accelerate, get_state_dict); ZeRO-3 gathers it on rank 0 only.
    """
    shape, preset, world = setup.shape, setup.preset, setup.world
    e = setup.numerics.weight_bytes
    process = CPU_BYTES if setup.device == "cpu" else DEEPSPEED_BYTES if preset.uses_deepspeed else PLAIN_BYTES
    if setup.world > 1 and setup.device == "cuda" and not preset.uses_deepspeed:
        process += GROUP_BYTES
    process += TRL_BYTES if setup.loss == "trl" and setup.device == "cuda" else 0
    processes = world * process
    pinned, ordinary, nvme = offloaded(setup)
    weights = e * shape.parameters
    saved = weights if setup.method == "full" else e * setup.trainable
    copies = world if preset.zero_stage in (0, 1, 2) else 1
    train = processes + world * (pinned + ordinary)
    passing = e * setup.trainable if preset.zero_stage == 3 and setup.device == "cuda" else 0
    started = world * min(STARTED_BYTES, process)
    loading = world * min(STARTED_DEEPSPEED_BYTES, process) if preset.uses_deepspeed else started
    on_gpu = setup.device == "cuda"
    files = 2 * shape.parameters
    if preset.zero_stage != 3 and setup.method != "qlora":
        files = min(files, setup.file_bytes)
    return HostFootprint(
        load=loading + (world * weights if e == 4 and setup.method != "qlora" else 0),
        mapped=world * files if on_gpu else 0,
        init=started + passing,
        train=train,
        pinned=world * pinned,
        save=train + copies * saved,
        nvme=nvme,
    )


def offloaded(setup: Setup) -> tuple[int, int, int]:
    """(pinned, ordinary) host bytes of one process, and NVMe bytes of all of them.

    s = P/N parameters of a process.  Pinned: fp32 weights 4s, gradients 4s, bf16 copy 2s, and under ZeRO-2 a buffer of
    the largest gradient; PyTorch rounds each pinned buffer up to a power of two.  ZeRO-3 has the fp32 buffers by
    sub-groups.  Ordinary: Adam's moments 8s, and under ZeRO-3 flat copies 4s.  Weights offloaded: their 2s are the bf16
    copy.  Without pinning (CPUs) nothing is rounded.  stage_1_and_2.py, stage3.py; measured with 1.7e9 parameters.
    """
    preset, shape = setup.preset, setup.shape
    e = setup.numerics.weight_bytes
    share = setup.trainable // setup.world
    frozen = 0 if setup.method == "full" else shape.parameters // setup.world
    if preset.offload_optimizer == "none":
        return (0, 0, 0)
    rounded = power_of_two if setup.device == "cuda" else int
    if preset.offload_optimizer == "nvme":
        moved = 18 * setup.trainable if preset.offload_param == "nvme" else 16 * setup.trainable
        return (*swap_buffers(setup, share), moved + (e * shape.parameters if frozen else 0))
    if preset.zero_stage == 3:
        whole, rest = divmod(share, SUB_GROUP)
        fp32 = whole * rounded(4 * SUB_GROUP) + rounded(4 * rest)
        copies = rounded(e * (share + frozen)) if preset.offload_param == "cpu" else rounded(e * share)
        return (2 * fp32 + copies + SMALL_PINNED_BYTES, 12 * share, 0)
    largest = e * shape.vocab * shape.hidden if setup.method == "full" else 0
    return (2 * rounded(4 * share) + rounded(e * share) + rounded(largest), 8 * share, 0)


def swap_buffers(setup: Setup, share: int) -> tuple[int, int]:
    """(pinned, ordinary) host bytes of one process whose optimizer states are on NVMe.

    g = the largest sub-group's parameters, at most `sub_group_size` and one parameter's part; b = the largest
    parameter's part.  Pinned: all gradients es, weights that stay in memory e min(s, 1e9), both rounded up to powers of
    two.  Locked without rounding: five buffers eb for weights, four 4g for the optimizer's states and gradients, and,
    where weights go to the drive, egN to write them (DeepSpeed counts whole parameters there, not their parts).
    Ordinary: at the start a sub-group's weights and its gradients in fp32, 8g.  stage3.py and swap_tensor/ of deepspeed
    0.19.8; 44.4 GiB for 1.7B on an H200 with g = 1.00e9 and b = 1.3e9, by this too.
    """
    e, shape = setup.numerics.weight_bytes, setup.shape
    rounded = power_of_two if setup.device == "cuda" else int
    largest = shape.largest_parameter // setup.world if setup.method == "full" else 0
    group = min(share, sub_group(setup) + largest)
    buffer = swap_buffer_elements(shape.largest_parameter, setup.world)
    written = e * group * setup.world if share > MAX_IN_CPU else 0
    kept = rounded(e * share) + rounded(e * min(share, MAX_IN_CPU))
    return (kept + NVME_BUFFERS * e * buffer + written + 16 * group, 8 * group)


def sub_group(setup: Setup) -> int:
    """Parameters that ZeRO-3 steps at once."""
    keys = (each.value for each in setup.preset.deepspeed if each.key == "zero_optimization.sub_group_size")
    return next((value for value in keys if isinstance(value, int)), SUB_GROUP)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`; 0 for 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def disk_bytes(setup: Setup) -> int:
    """One checkpoint: weights 2P and, for resuming, fp32 weights and Adam's moments 12P."""
    e = setup.numerics.weight_bytes if setup.method == "full" else setup.numerics.adapter_bytes
    return int((e + 12) * setup.trainable)
