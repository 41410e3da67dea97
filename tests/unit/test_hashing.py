"""Hashes of files while they are written, and bytes on their way to a device and back."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blake3 import blake3

from hf_dsvllm.errors import ExportError
from hf_dsvllm.tensors import hashing, staging
from hf_dsvllm.tensors.hashing import HashBehind, hash_of
from hf_dsvllm.tensors.shards import write_shards
from hf_dsvllm.tensors.weights import TensorFolder, TensorPlan


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    return os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)


def test_parts_written_in_any_order_by_several_threads_give_the_files_own_hash(
    descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "PIECE_BYTES", 1000)  # several reads a part
    data = random.Random(0).randbytes(100_000)
    starts = list(range(0, len(data), 3333))
    random.Random(1).shuffle(starts)
    behind = HashBehind(descriptor, len(data), tmp_path / "file")

    def write(mine: list[int]) -> None:
        for start in mine:
            part = data[start : start + 3333]
            os.pwrite(descriptor, part, start)
            behind.wrote(start, len(part))
            behind.wrote(start, 0)  # a tensor without elements lies where the next one begins

    threads = [threading.Thread(target=write, args=(starts[number::3],)) for number in range(3)]
    for thread in threads:
        thread.start()
    assert behind.finish() == blake3(data).hexdigest() == hash_of(tmp_path / "file")
    behind.close()
    os.close(descriptor)


def test_a_hash_that_will_never_be_whole_can_be_given_up(descriptor: int) -> None:
    behind = HashBehind(descriptor, 10, Path("file"))
    os.pwrite(descriptor, b"12345", 0)
    behind.wrote(0, 5)
    behind.close()
    assert not any(thread.name == "hash-behind" for thread in threading.enumerate())
    os.close(descriptor)


def test_a_file_that_becomes_shorter_is_an_error(descriptor: int) -> None:
    behind = HashBehind(descriptor, 10, Path("file"))
    behind.wrote(0, 10)  # nothing was
    with pytest.raises(ExportError, match=r"file could not be read back \(.*shorter"):
        behind.finish()
    os.close(descriptor)


def test_a_hash_that_ran_out_of_memory_is_an_error(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr(hashing.os, "preadv", refuse)
    behind = HashBehind(descriptor, 5, Path("file"))
    os.pwrite(descriptor, b"12345", 0)
    behind.wrote(0, 5)
    with pytest.raises(ExportError, match=r"file could not be read back \(no room"):
        behind.finish()
    os.close(descriptor)


def test_a_hash_that_was_given_up_is_not_taken_for_one(descriptor: int) -> None:
    behind = HashBehind(descriptor, 10, Path("file"))
    behind.close()
    with pytest.raises(ExportError, match="0 of 10 bytes were hashed"):
        behind.finish()
    os.close(descriptor)


@pytest.mark.parametrize("workers", [1, 4])
def test_shards_are_hashed_while_they_are_written(tmp_path: Path, workers: int) -> None:
    tensors = {f"layer.{number}": torch.randn(100, number) for number in range(8)}  # one has no elements
    plan = [TensorPlan(name=name, shape=tuple(each.shape), dtype=each.dtype) for name, each in tensors.items()]
    found = write_shards(tmp_path, plan, tensors.__getitem__, max_shard_size_bytes=4000, workers=workers, hashed=True)
    assert len(found) > 2
    hashes = {name: under_way.finish() for name, under_way in found.items()}
    assert hashes == {name: hash_of(tmp_path / name) for name in found}
    with TensorFolder(tmp_path) as written:
        assert all(torch.equal(written.get(name), tensor) for name, tensor in tensors.items())
    assert not any(thread.name == "hash-behind" for thread in threading.enumerate())


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
