"""What this machine has, or what a named one has (`4xH100-80GB`).  torch is never imported."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import HardwareError

__all__ = [
    "CARDS_MIB",
    "Gpu",
    "Machine",
    "count_and_card",
    "cpu_flags",
    "detect",
    "parse_machine",
    "smallest_card",
    "usable_cpus",
]

MIB = 1024**2

# `memory.total` in MiB as nvidia-smi prints it with the card's usual ECC setting (public nvidia-smi listings).
CARDS_MIB: Mapping[str, int] = {
    "A10-24GB": 23028,
    "A100-40GB": 40960,
    "A100-80GB": 81920,
    "A10G-24GB": 23028,
    "A40-48GB": 46068,
    "B200-180GB": 183359,
    "H100-80GB": 81559,
    "H200-141GB": 143771,
    "L4-24GB": 23034,
    "L40S-48GB": 46068,
    "RTX3090-24GB": 24576,
    "RTX4090-24GB": 24564,
    "RTX5090-32GB": 32607,
    "RTX6000Ada-48GB": 49140,
    "RTXA6000-48GB": 49140,
    "T4-16GB": 15360,
    "V100-16GB": 16384,
    "V100-32GB": 32768,
}
# Names of the limit, of what is used, and of the reclaimable cache in memory.stat
CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
UNLIMITED_BYTES = 2**60  # cgroup v1 writes nearly 2^63 for "no limit"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA device: `index` as the driver counts (of a MIG slice: its parent's), `memory_bytes` in all, not free."""

    name: str
    memory_bytes: int
    index: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One host.  `cpu_count` and `ram_bytes` are what this process may use, or None for a named machine."""

    gpus: tuple[Gpu, ...]
    cpu_count: int | None
    ram_bytes: int | None

    def describe(self) -> str:
        """`2 x NVIDIA H200 (140.4 GiB), 32 CPUs, 256.0 GiB RAM`."""
        groups: dict[tuple[str, int], int] = {}
        for gpu in self.gpus:
            groups[gpu.name, gpu.memory_bytes] = groups.get((gpu.name, gpu.memory_bytes), 0) + 1
        parts = [f"{count} x {name} ({size / 2**30:.1f} GiB)" for (name, size), count in groups.items()] or ["no GPU"]
        if self.cpu_count is not None:
            parts.append(f"{self.cpu_count} CPUs")
        if self.ram_bytes is not None:
            parts.append(f"{self.ram_bytes / 2**30:.1f} GiB RAM")
        return ", ".join(parts)


def detect() -> Machine:
    """This machine: GPUs the driver reports and CUDA_VISIBLE_DEVICES lets through, CPUs and memory of this process."""
    return Machine(gpus=detect_gpus(), cpu_count=usable_cpus(), ram_bytes=usable_ram_bytes())


def detect_gpus() -> tuple[Gpu, ...]:
    """GPUs seen through NVML; none if there is no driver.

    NVML and CUDA may count differently (CUDA_DEVICE_ORDER), which matters only on machines with mixed cards.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a driver that is being replaced: no usable GPU
        return ()
    try:
        return visible_gpus(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except pynvml.NVMLError as error:
        raise HardwareError(
            f"the NVIDIA driver answered, but not about its GPUs: {error}. Look at `nvidia-smi`; "
            'to go on without GPUs set CUDA_VISIBLE_DEVICES="".'
        ) from error
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(nvml: Any, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs that `visible` (the value of CUDA_VISIBLE_DEVICES, None if unset) selects, in its order.

    As CUDA does, reading stops at the first entry that selects nothing: "0,-1,1" is GPU 0 alone.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return tuple(describe_gpu(nvml, handle, index) for index, handle in enumerate(handles))
    selected: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        gpu = select_gpu(nvml, handles, entry)
        if gpu is None:
            break
        selected.append(gpu)
    return tuple(selected)


def smallest_card(gpus: Sequence[str]) -> tuple[int, int] | None:
    """Bytes in all and free now, the least of these GPUs (ids of CUDA_VISIBLE_DEVICES); None where NVML knows none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # as in `detect_gpus`
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = [select_gpu(pynvml, handles, gpu) for gpu in gpus]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handles[gpu.index]) for gpu in found if gpu is not None]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    if not memory or len(memory) < len(gpus):
        return None
    return min(int(card.total) for card in memory), min(int(card.free) for card in memory)


def select_gpu(nvml: Any, handles: list[Any], entry: str) -> Gpu | None:
    """One entry of CUDA_VISIBLE_DEVICES: an index, the start of a GPU UUID, or a MIG UUID."""
    if entry.isdecimal():
        index = int(entry)
        return describe_gpu(nvml, handles[index], index) if index < len(handles) else None
    if entry.startswith("GPU-"):
        uuids = [text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
        return describe_gpu(nvml, handles[matches[0]], matches[0]) if len(matches) == 1 else None
    if entry.startswith("MIG-"):
        slice_handle = nvml.nvmlDeviceGetHandleByUUID(entry)
        parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_handle)
        return describe_gpu(nvml, slice_handle, nvml.nvmlDeviceGetIndex(parent))
    return None


def describe_gpu(nvml: Any, handle: Any, index: int) -> Gpu:
    memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Gpu(name=text(nvml.nvmlDeviceGetName(handle)), memory_bytes=memory_bytes, index=index)


def text(value: str | bytes) -> str:
    """Older bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def usable_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_ram_bytes() -> int:
    """The cgroup's memory limit where there is a finite one, otherwise the machine's memory.

    The limit also wins over a smaller MemTotal: some virtual machines start small and grow up to it.
    """
    import psutil

    limit = cgroup_limit_bytes()
    return limit if limit is not None else int(psutil.virtual_memory().total)


def free_ram_bytes() -> int:
    """Memory that can be taken now: what the machine has left, and what the cgroups have left below their limits."""
    import psutil

    left = cgroup_left_bytes()
    available = int(psutil.virtual_memory().available)
    return available if left is None else min(available, left)


def cgroup_left_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The least that a cgroup on the way to the root still gives; None without a limit.

    left = limit - (used - inactive file cache, which the kernel gives back): what Kubernetes calls the working set.
    """
    lefts: list[int] = []
    for group in cgroup_paths(membership):
        for base, names in ((root, CGROUP_V2), (root / "memory", CGROUP_V1)):
            folder = base / group
            for each in (folder, *folder.parents):
                limit, used = read_limit(each / names[0]), read_limit(each / names[1])
                if limit is not None and used is not None:
                    lefts.append(max(0, limit - used + inactive_file_bytes(each / "memory.stat", names[2])))
    return min(lefts, default=None)


def inactive_file_bytes(stat: Path, name: str) -> int:
    """The entry `name` of a cgroup's memory.stat; 0 if there is none."""
    try:
        rows = [line.split() for line in stat.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == name), 0)


def cgroup_limit_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The smallest finite limit on the way from this process's cgroup to the root (v2, then v1); None without one."""
    limits: list[int] = []
    for group in cgroup_paths(membership):
        for base, name in ((root, "memory.max"), (root / "memory", "memory.limit_in_bytes")):
            folder = base / group
            limits += [
                limit for parent in (folder, *folder.parents) if (limit := read_limit(parent / name)) is not None
            ]
    return min(limits, default=None)


def cgroup_paths(membership: Path) -> list[str]:
    """Relative cgroup folders from lines like `0::/user.slice` or `5:memory:/docker/1f`; always with the root."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return [""]
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return ["", *(path.lstrip("/") for _, controllers, path in fields if "memory" in controllers or not controllers)]


def read_limit(file: Path) -> int | None:
    """A limit in bytes; None if absent, `max`, or beyond any machine."""
    try:
        content = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(content) if content.isdecimal() and 0 < int(content) < UNLIMITED_BYTES else None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of the first CPU, such as `avx512_bf16`; empty where /proc/cpuinfo is missing or has none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86, ARM
            return frozenset(value.split())
    return frozenset()


def parse_machine(name: str) -> Machine:
    """`[COUNTx]CARD`, such as `4xH100-80GB`, `L4` or `2 x rtx 4090`; CPUs and memory of a named machine are unknown.

    Raises HardwareError for a card that is not in the catalogue (with the nearest names) or comes in several sizes.
    """
    count, word = count_and_card(name)
    if not word:
        raise HardwareError("the name of a machine is empty; write for example 4xH100-80GB")
    if count < 1:
        raise HardwareError(f"{name!r} has no GPU; write for example 1xH100-80GB")
    card = find_card(word)
    gpus = tuple(Gpu(name=card, memory_bytes=CARDS_MIB[card] * MIB, index=index) for index in range(count))
    return Machine(gpus=gpus, cpu_count=None, ram_bytes=None)


def count_and_card(name: str) -> tuple[int, str]:
    """`4xH100-80GB` → 4 and the card as typed, known or not; 1 without a count."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?(\S.*?)\s*", name, flags=re.IGNORECASE)
    return (1, "") if match is None else (int(match[1] or 1), match[2])


def find_card(name: str) -> str:
    """The catalogue's spelling of a card; the size may be left out where there is only one."""
    wanted = squeeze(name)
    full = {squeeze(card): card for card in CARDS_MIB}
    if wanted in full:
        return full[wanted]
    sizes = [card for card in CARDS_MIB if squeeze(card.rpartition("-")[0]) == wanted]
    if len(sizes) == 1:
        return sizes[0]
    if sizes:
        raise HardwareError(f"{name} comes in {len(sizes)} sizes; write {' or '.join(sizes)}")
    short = {squeeze(card.rpartition("-")[0]): card for card in CARDS_MIB}
    near = difflib.get_close_matches(wanted, [*full, *short], n=3, cutoff=0.5)
    names = list(dict.fromkeys((full | short)[key] for key in near))
    guess = f" Did you mean {' or '.join(names)}?" if names else ""
    raise HardwareError(f"card {name!r} is not known.{guess} Known: {', '.join(sorted(CARDS_MIB))}")


def squeeze(name: str) -> str:
    """Lower case without blanks, dashes, `nvidia` and `geforce`."""
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
