"""A disk that fills up or fails while weights are written is one clear error, from whatever thread."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import atomic_folder
from hf_dsvllm.tensors import shard_file, shard_writer
from hf_dsvllm.tensors.shard_file import ShardFile, grouped
from hf_dsvllm.tensors.shard_writer import ShardWriter
from hf_dsvllm.tensors.shards import write_shards
from hf_dsvllm.tensors.weights import TensorFolder, TensorPlan

PLAN = [TensorPlan(name=f"layer.{number}", shape=(64, 64), dtype=torch.float32) for number in range(8)]


def write(folder: Path, workers: int) -> dict[str, str]:
    def produce(_: str) -> torch.Tensor:
        return torch.ones(64, 64)

    return write_shards(folder, PLAN, produce, max_shard_size_bytes=40_000, workers=workers)


@pytest.fixture
def files_of_at_most_20_kb() -> Iterator[None]:
    """The kernel refuses to write more into one file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.usefixtures("files_of_at_most_20_kb")
def test_a_write_that_the_kernel_refuses_leaves_nothing(tmp_path: Path, workers: int) -> None:
    said = r"model-0000\d-of-00004\.safetensors cannot be written: File too large;"
    with pytest.raises(ExportError, match=said) as told, atomic_folder(tmp_path / "out") as folder:
        write(folder, workers)
    assert isinstance(told.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("step", ["open", "pwrite", "close"])
@pytest.mark.parametrize("workers", [1, 4])
def test_every_step_of_writing_a_shard_says_what_the_disk_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str, workers: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(shard_file.os, step, refuse)
        with pytest.raises(
            ExportError, match=rf"safetensors cannot be written: {os.strerror(number)}; free some space"
        ):
            write(tmp_path, workers)


def test_an_index_that_cannot_be_written_is_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_file, "write_json", full)
    with pytest.raises(ExportError, match=r"index\.json cannot be written: No space left"):
        write(tmp_path, workers=1)


def test_whole_numbers_and_truth_values_are_written_as_they_are(tmp_path: Path) -> None:
    tensors = {"ids": torch.tensor([3, 1, 2]), "mask": torch.tensor([True, False]), "weight": torch.ones(2, 2)}
    plan = [TensorPlan(name=name, shape=tuple(each.shape), dtype=each.dtype) for name, each in tensors.items()]
    write_shards(tmp_path, plan, tensors.__getitem__)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], each) for name, each in tensors.items())


@pytest.fixture
def few_files() -> Iterator[None]:
    """This process may open 100 more files than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.usefixtures("few_files")
def test_a_thousand_shards_are_written_hashed_and_read_a_few_at_a_time(tmp_path: Path, workers: int) -> None:
    plan = [TensorPlan(name=f"layer.{number}", shape=(1,), dtype=torch.float32) for number in range(1000)]
    found = write_shards(
        tmp_path, plan, lambda name: torch.tensor([float(name[6:])]), max_shard_size_bytes=4, workers=workers,
        hashed=True,
    )  # fmt: skip
    assert len(set(found.values())) == 1000
    with TensorFolder(tmp_path) as written:
        assert len(written.files) == 1000
        assert [written.get(f"layer.{number}").item() for number in range(1000)] == list(range(1000))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.usefixtures("few_files")
def test_tensors_that_come_bucket_by_bucket_are_cast_to_their_places_in_few_open_files(
    tmp_path: Path, workers: int
) -> None:
    names = [f"layer.{number}" for number in range(1000)]
    plan = [TensorPlan(name=name, shape=(), dtype=torch.bfloat16) for name in names]
    with ShardWriter(tmp_path, plan, max_shard_size_bytes=6, workers=workers) as writer:
        for begin in range(0, 1000, 50):
            writer.write({name: torch.tensor(float(name[6:])) for name in names[begin : begin + 50]})
        writer.write({})
    with TensorFolder(tmp_path) as written:
        assert len(written.files) == 334
        found = torch.stack([written.get(name) for name in names])
    assert torch.equal(found, torch.arange(1000.0).bfloat16())


@pytest.mark.parametrize("pieces", [False, True])
def test_values_are_not_looked_at_where_they_are_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: bool
) -> None:
    if pieces:
        monkeypatch.setattr("hf_dsvllm.tensors.staging.CHUNK_BYTES", 64)
    tensor = torch.randn(33, 7).t()
    tensor[0, 0] = float("nan")
    with ShardWriter(tmp_path, [TensorPlan(name="a", shape=(7, 33), dtype=torch.float16)]) as writer:
        writer.write({"a": tensor})
    found = load_file(tmp_path / "model.safetensors")["a"]
    assert torch.equal(found.view(torch.int16), tensor.half().contiguous().view(torch.int16))


def test_a_tensor_of_another_shape_than_planned_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"layer\.0 came out as \(0,\), not \(64, 64\)\."),
        ShardWriter(tmp_path, PLAN) as writer,
    ):
        writer.write({"layer.0": torch.empty(0)})


@pytest.mark.parametrize("step", ["open", "pwrite", "close"])
def test_a_disk_that_fails_under_brought_tensors_is_told_with_the_given_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shard_file.os, step, refuse)
        with (
            pytest.raises(ExportError, match=r"cannot be written: No space left on device; go away\."),
            ShardWriter(tmp_path, PLAN, remedy="go away") as writer,
        ):
            writer.write({planned.name: torch.ones(64, 64) for planned in PLAN})


@pytest.mark.parametrize(
    ("sizes", "limit", "files"),
    [
        ([10] * 8, 50, [40, 40]),  # not 50 and 30
        ([60, 10, 10, 10], 50, [60, 30]),  # one that is larger is alone
        ([10, 10, 45, 10, 10], 50, [20, 45, 20]),  # a lump that fits neither side
        ([], 50, []),
        ([0, 0], 50, [0]),
    ],
)
def test_shards_are_of_one_size(sizes: list[int], limit: int, files: list[int]) -> None:
    plan = [TensorPlan(name=str(number), shape=(size,), dtype=torch.int8) for number, size in enumerate(sizes)]
    groups = list(grouped(plan, limit))
    assert [sum(planned.size_bytes for planned in group) for group in groups] == files
    assert [planned for group in groups for planned in group] == plan


def test_brought_tensors_that_would_be_waited_for_begin_first_and_the_rest_goes_through_the_files_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "LARGE_BYTES", 100_000)
    head = TensorPlan(name="head", shape=(300, 100), dtype=torch.float32)
    order: list[str] = []
    written = ShardFile.write

    def write(self: ShardFile, planned: TensorPlan, tensor: torch.Tensor) -> None:
        order.append(planned.name)
        written(self, planned, tensor)

    monkeypatch.setattr(ShardFile, "write", write)
    with ShardWriter(tmp_path, [*PLAN, head], max_shard_size_bytes=70_000, workers=1) as writer:
        writer.write({planned.name: torch.ones(64, 64) for planned in PLAN} | {"head": torch.zeros(300, 100)})
    assert order[0] == "head"
    assert sorted(order[1:]) == [planned.name for planned in PLAN]
    assert order[1:3] != ["layer.0", "layer.1"]


def test_the_next_tensor_of_a_file_is_made_while_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = {planned.name: threading.Event() for planned in PLAN}
    written = ShardFile.write

    def produce(name: str) -> torch.Tensor:
        begun[name].set()
        return torch.full((64, 64), float(name[6:]))

    def write(self: ShardFile, planned: TensorPlan, tensor: torch.Tensor) -> None:
        following = begun.get(f"layer.{int(planned.name[6:]) + 1}")
        assert following is None or following.wait(20)
        written(self, planned, tensor)

    monkeypatch.setattr(ShardFile, "write", write)
    write_shards(tmp_path, PLAN, produce, workers=4)
    with TensorFolder(tmp_path) as found:
        assert all(found.get(planned.name).mean() == float(planned.name[6:]) for planned in PLAN)


def test_one_thread_makes_a_tensor_only_when_the_one_before_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    written = ShardFile.write

    def produce(name: str) -> torch.Tensor:
        happened.append(f"made {name}")
        return torch.ones(64, 64)

    def write(self: ShardFile, planned: TensorPlan, tensor: torch.Tensor) -> None:
        written(self, planned, tensor)
        happened.append(f"wrote {planned.name}")

    monkeypatch.setattr(ShardFile, "write", write)
    write_shards(tmp_path, PLAN, produce, workers=1)
    assert happened == [f"{what} {planned.name}" for planned in PLAN for what in ("made", "wrote")]


@pytest.mark.parametrize("workers", [2, 16])
def test_tensors_under_way_take_no_more_memory_than_allowed_and_a_larger_one_is_not_left_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    big = TensorPlan(name="big", shape=(64, 400), dtype=torch.float32)
    plan = [*PLAN, big, *(TensorPlan(name=f"more.{n}", shape=(64, 64), dtype=torch.float32) for n in range(40))]
    lock = threading.Lock()
    now = most = 0
    order: list[str] = []
    written = ShardFile.write

    def produce(name: str) -> torch.Tensor:
        nonlocal now, most
        with lock:
            order.append(name)
            now += 102_400 if name == "big" else 16_384
            most = max(most, now)
        time.sleep(0.002)
        return torch.zeros(64, 400 if name == "big" else 64)

    def write(self: ShardFile, planned: TensorPlan, tensor: torch.Tensor) -> None:
        nonlocal now
        written(self, planned, tensor)
        with lock:
            now -= planned.size_bytes

    monkeypatch.setattr(ShardFile, "write", write)
    write_shards(
        tmp_path, plan, produce, max_shard_size_bytes=120_000, memory_bytes=50_000, workers=workers,
        working_bytes=lambda planned: planned.size_bytes,
    )  # fmt: skip
    assert most == 102_400  # alone; and the others at most three at a time
    assert order.index("big") < len(order) - 5
    with TensorFolder(tmp_path) as found:
        assert len(found.names) == len(plan)


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("at", [0, 5, 47])
def test_a_tensor_that_cannot_be_made_stops_the_others(tmp_path: Path, workers: int, at: int) -> None:
    plan = [TensorPlan(name=str(number), shape=(64, 64), dtype=torch.float32) for number in range(48)]
    made: list[str] = []

    def produce(name: str) -> torch.Tensor:
        if name == str(at):
            raise ValueError(f"no {name}")
        made.append(name)
        return torch.ones(64, 64)

    with pytest.raises(ValueError, match=f"no {at}"):
        write_shards(
            tmp_path, plan, produce, max_shard_size_bytes=60_000, memory_bytes=50_000, workers=workers, hashed=True
        )
    assert not any(thread.name.startswith("export") for thread in threading.enumerate())
    assert at != 0 or len(made) < 40


@pytest.mark.parametrize("number_of_files", [1, 4])
def test_few_files_have_several_tensors_made_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number_of_files: int
) -> None:
    plan = [TensorPlan(name=str(number), shape=(64, 64), dtype=torch.float32) for number in range(64)]
    lock, all_there = threading.Lock(), threading.Event()
    now = 0

    def produce(name: str) -> torch.Tensor:
        nonlocal now
        with lock:
            now += 1
            if now == 8:
                all_there.set()
        assert all_there.wait(20)
        with lock:
            now -= 1
        return torch.full((64, 64), float(name))

    size = sum(planned.size_bytes for planned in plan) // number_of_files
    found = write_shards(tmp_path, plan, produce, max_shard_size_bytes=size, memory_bytes=10**9, workers=8)
    assert found == {}
    with TensorFolder(tmp_path) as written:
        assert len(written.files) == number_of_files
        assert all(written.get(planned.name).mean() == float(planned.name) for planned in plan)


@pytest.mark.parametrize("writes", [0, 40])
def test_after_a_full_disk_no_other_file_is_begun_and_none_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    plan = [TensorPlan(name=str(number), shape=(16,), dtype=torch.float32) for number in range(300)]
    before, pwrite, done = len(os.listdir("/proc/self/fd")), os.pwrite, [0]

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        done[0] += 1
        if done[0] > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(shard_file.os, "pwrite", full)
        with pytest.raises(ExportError, match="No space left on device"):
            write_shards(tmp_path, plan, lambda _: torch.ones(16), max_shard_size_bytes=64, workers=16)
    assert len(list(tmp_path.iterdir())) < 100
    assert len(os.listdir("/proc/self/fd")) == before


def test_after_a_failure_what_was_made_ahead_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [TensorPlan(name=str(number), shape=(64, 64), dtype=torch.float32) for number in range(48)]
    failed = threading.Event()
    late: list[str] = []
    written = ShardFile.write

    def produce(name: str) -> torch.Tensor:
        if name == "30":
            failed.set()
            raise ValueError("no 30")
        return torch.ones(64, 64)

    def write(self: ShardFile, planned: TensorPlan, tensor: torch.Tensor) -> None:
        if failed.is_set():
            time.sleep(0.2)  # until the gate is closed
        late.append(planned.name) if failed.is_set() else None
        written(self, planned, tensor)

    monkeypatch.setattr(ShardFile, "write", write)
    with pytest.raises(ValueError, match="no 30"):
        write_shards(tmp_path, plan, produce, max_shard_size_bytes=200_000, memory_bytes=10**9, workers=4)
    assert len(late) <= 4  # one for each file that was being written
