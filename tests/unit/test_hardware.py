"""What a machine has: a fake driver, cgroup files in a folder, and named machines."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_dsvllm import hardware
from hf_dsvllm.errors import HardwareError
from hf_dsvllm.hardware import (
    CARDS_MIB,
    Gpu,
    Machine,
    cgroup_left_bytes,
    cgroup_limit_bytes,
    cpu_flags,
    detect,
    parse_machine,
)

GIB = 2**30


class FakeNvml:
    """As much of pynvml as is used: three cards, one of them with a MIG slice."""

    class NVMLError(Exception):
        pass

    UUIDS = ("GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3")

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "MIG-1":
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> int:
        return 2

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return self.UUIDS[handle].encode()

    def nvmlDeviceGetName(self, handle: int | str) -> str:
        return f"Card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int | str) -> SimpleNamespace:
        return SimpleNamespace(total=10 * GIB if handle == "MIG-1" else 80 * GIB)


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield fake
    assert fake.open == 0


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("GPU-cccc", [2]),
        ("GPU-aa", []),
        ("GPU-aabb-2,GPU-aaaa-1", [1, 0]),
    ],
)
def test_cuda_visible_devices_selects_as_cuda_does(nvml, monkeypatch, visible, indices):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in detect().gpus] == indices


def test_a_mig_slice_has_its_own_memory(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert detect().gpus == (Gpu(name="Card MIG-1", memory_bytes=10 * GIB, index=2),)


def test_a_driver_that_fails_midway_is_an_error_with_a_way_out(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-unknown")
    with pytest.raises(HardwareError, match="CUDA_VISIBLE_DEVICES"):
        detect()


def test_no_driver_means_no_gpus(monkeypatch):
    class Absent(FakeNvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError("driver not loaded")

    monkeypatch.setitem(sys.modules, "pynvml", Absent())
    assert detect().gpus == ()


def test_this_machine_has_cpus_and_memory():
    machine = detect()
    assert 1 <= machine.cpu_count <= os.cpu_count()
    assert machine.ram_bytes > 0
    assert "RAM" in machine.describe()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_the_smallest_cgroup_limit_on_the_way_to_the_root_counts(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    write(membership, "0::/user.slice/job\n")
    assert cgroup_limit_bytes(root, membership) is None
    write(root / "user.slice" / "job" / "memory.max", "max\n")
    assert cgroup_limit_bytes(root, membership) is None
    write(root / "user.slice" / "memory.max", f"{8 * GIB}\n")
    write(root / "user.slice" / "job" / "memory.max", f"{12 * GIB}\n")
    assert cgroup_limit_bytes(root, membership) == 8 * GIB


def test_cgroup_version_1_is_read_and_its_unlimited_value_is_no_limit(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    write(membership, "5:cpu,memory:/docker/1f\n4:devices:/docker/1f\n")
    write(root / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert cgroup_limit_bytes(root, membership) is None
    write(root / "memory" / "docker" / "1f" / "memory.limit_in_bytes", str(4 * GIB))
    assert cgroup_limit_bytes(root, membership) == 4 * GIB


def test_a_container_that_cannot_see_its_group_reads_the_root(tmp_path):
    write(tmp_path / "cgroup" / "memory.max", str(2 * GIB))
    assert cgroup_limit_bytes(tmp_path / "cgroup", tmp_path / "absent") == 2 * GIB


def test_what_a_cgroup_still_gives_counts_cache_that_can_be_dropped(tmp_path):
    root = tmp_path / "cgroup"
    assert cgroup_left_bytes(root, tmp_path / "absent") is None
    write(root / "memory.max", str(8 * GIB))
    write(root / "memory.current", str(7 * GIB))
    assert cgroup_left_bytes(root, tmp_path / "absent") == GIB
    write(root / "memory.stat", f"anon 5\ninactive_file {3 * GIB}\n")
    assert cgroup_left_bytes(root, tmp_path / "absent") == 4 * GIB
    write(root / "memory" / "memory.limit_in_bytes", str(2 * GIB))
    write(root / "memory" / "memory.usage_in_bytes", str(3 * GIB))
    assert cgroup_left_bytes(root, tmp_path / "absent") == 0


def test_free_memory_is_the_least_of_machine_and_cgroup(monkeypatch):
    monkeypatch.setattr(hardware, "cgroup_left_bytes", lambda: 5)
    assert hardware.free_ram_bytes() == 5
    monkeypatch.setattr(hardware, "cgroup_left_bytes", lambda: None)
    assert hardware.free_ram_bytes() > 5


def test_a_cgroup_limit_wins_over_the_machines_memory(monkeypatch):
    monkeypatch.setattr(hardware, "cgroup_limit_bytes", lambda: 3 * GIB)
    assert detect().ram_bytes == 3 * GIB


def test_cpu_flags_are_read_from_the_first_cpu(tmp_path):
    write(tmp_path / "x86", "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor : 1\nflags : fpu\n")
    write(tmp_path / "arm", "processor : 0\nFeatures : fp asimd bf16\n")
    write(tmp_path / "none", "processor : 0\n")
    assert cpu_flags(tmp_path / "x86") == {"fpu", "avx2", "avx512_bf16"}
    assert cpu_flags(tmp_path / "arm") == {"fp", "asimd", "bf16"}
    assert cpu_flags(tmp_path / "none") == cpu_flags(tmp_path / "absent") == frozenset()


@pytest.mark.parametrize(
    ("name", "count", "card"),
    [
        ("4xH100-80GB", 4, "H100-80GB"),
        ("H100", 1, "H100-80GB"),
        ("8 x h200", 8, "H200-141GB"),
        ("2*NVIDIA GeForce RTX 4090", 2, "RTX4090-24GB"),
        ("a100-40gb", 1, "A100-40GB"),
        ("L40S", 1, "L40S-48GB"),
    ],
)
def test_a_named_machine_has_cards_and_unknown_memory(name, count, card):
    machine = parse_machine(name)
    assert [gpu.name for gpu in machine.gpus] == [card] * count
    assert [gpu.index for gpu in machine.gpus] == list(range(count))
    assert machine.gpus[0].memory_bytes == CARDS_MIB[card] * 2**20
    assert (machine.cpu_count, machine.ram_bytes) == (None, None)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("4xH10O-80GB", "Did you mean H100-80GB"),
        ("A100", "A100-40GB or A100-80GB"),
        ("RTX4900", "RTX4090-24GB"),
        ("0xH100", "has no GPU"),
        ("  ", "is empty"),
        ("abacus", "Known: A10-24GB"),
    ],
)
def test_a_card_that_is_not_known_names_the_nearest(name, part):
    with pytest.raises(HardwareError, match=part):
        parse_machine(name)


def test_a_card_is_no_bigger_than_its_name_says_in_powers_of_two():
    for card, mib in CARDS_MIB.items():
        size_gb = int(card.rpartition("-")[2].removesuffix("GB"))
        assert 0.9 * size_gb < mib / 1024 <= 1.03 * size_gb, card


def test_machines_are_described_in_one_line():
    machine = Machine(gpus=parse_machine("2xL4").gpus, cpu_count=8, ram_bytes=64 * GIB)
    assert machine.describe() == "2 x L4-24GB (22.5 GiB), 8 CPUs, 64.0 GiB RAM"
    assert Machine(gpus=(), cpu_count=None, ram_bytes=None).describe() == "no GPU"


def test_hardware_shape_and_memory_do_not_import_torch():
    code = (
        "import sys, hf_dsvllm.hardware, hf_dsvllm.model_shape, hf_dsvllm.memory; hf_dsvllm.hardware.detect(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
