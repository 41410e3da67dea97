"""Hashes of files while they are written, and bytes on their way to a device and back."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blake3 import blake3

from hf_dsvllm.tensors import hashing, staging
from hf_dsvllm.tensors.hashing import hash_files, hash_of
from hf_dsvllm.tensors.shards import write_shards
from hf_dsvllm.tensors.weights import TensorFolder, TensorPlan


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_hash_does_not_depend_on_threads_or_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, threads: int
) -> None:
    monkeypatch.setattr(hashing, "READ_BYTES", 1000)
    monkeypatch.setattr(hashing, "SHARE_BYTES", 7000)
    monkeypatch.setattr(hashing, "WORTH_BYTES", 5000)
    data = random.Random(0).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert hash_of(tmp_path / "file", threads) == blake3(data).hexdigest()


@pytest.mark.parametrize(
    ("cores", "files", "large", "threads"),
    [(2, 9, None, 1), (16, 4, None, 2), (16, 1, None, 8), (64, 8, 4, 4), (16, 20, 1, 8), (1, 1, None, 1)],
)
def test_few_large_files_are_hashed_by_several_threads_each(
    monkeypatch: pytest.MonkeyPatch, cores: int, files: int, large: int | None, threads: int
) -> None:
    monkeypatch.setattr(hashing, "usable_cpus", lambda: cores)
    paths = [Path(str(number)) for number in range(files)]
    found = hash_files(paths, lambda path, threads: f"{path} {threads}", large=large)
    assert found == {path: f"{path} {threads}" for path in paths}


@pytest.mark.parametrize("workers", [1, 4])
def test_shards_are_hashed_while_they_are_written(tmp_path: Path, workers: int) -> None:
    tensors = {f"layer.{number}": torch.randn(100, number) for number in range(8)}  # one has no elements
    plan = [TensorPlan(name=name, shape=tuple(each.shape), dtype=each.dtype) for name, each in tensors.items()]
    found = write_shards(tmp_path, plan, tensors.__getitem__, max_shard_size_bytes=4000, workers=workers, hashed=True)
    assert len(found) > 2
    assert found == {name: hash_of(tmp_path / name) for name in found}
    with TensorFolder(tmp_path) as written:
        assert all(torch.equal(written.get(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5432])
def test_bytes_go_to_a_device_and_back_in_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(staging, "_of_thread", threading.local())  # buffers of that size
    data = random.Random(size).randbytes(size)
    pieces: list[int] = []

    def read(into: memoryview, at: int) -> None:
        pieces.append(len(into))
        into[:] = data[at : at + len(into)]

    back = bytearray(size)

    def write(part: memoryview, at: int) -> None:
        back[at : at + len(part)] = part

    tensor = staging.upload(read, size, staging.CPU)
    assert sum(pieces) == size
    assert max(pieces, default=0) <= 1000
    staging.download(tensor, write)
    assert bytes(back) == data


def test_a_copy_is_awaited_on_the_stream_of_the_tensors_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    plain = torch.empty

    def event(*, blocking: bool) -> SimpleNamespace:
        assert blocking
        return SimpleNamespace(record=recorded.append)

    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory, **more: plain(*sizes, **more))
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    staging._Buffer(torch.device("cuda", 1)).in_use()
    assert recorded == ["stream of cuda:1"]
