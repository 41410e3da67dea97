"""A disk that fills up or fails while weights are written is one clear error, from whatever thread."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import atomic_folder
from hf_dsvllm.tensors import shards as shards_module
from hf_dsvllm.tensors.shards import write_shards
from hf_dsvllm.tensors.weights import TensorPlan

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
        patch.setattr(shards_module.os, step, refuse)
        with pytest.raises(
            ExportError, match=rf"safetensors cannot be written: {os.strerror(number)}; free some space"
        ):
            write(tmp_path, workers)


def test_an_index_that_cannot_be_written_is_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards_module, "write_json", full)
    with pytest.raises(ExportError, match=r"index\.json cannot be written: No space left"):
        write(tmp_path, workers=1)


def test_whole_numbers_and_truth_values_are_written_as_they_are(tmp_path: Path) -> None:
    tensors = {"ids": torch.tensor([3, 1, 2]), "mask": torch.tensor([True, False]), "weight": torch.ones(2, 2)}
    plan = [TensorPlan(name=name, shape=tuple(each.shape), dtype=each.dtype) for name, each in tensors.items()]
    write_shards(tmp_path, plan, tensors.__getitem__)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], each) for name, each in tensors.items())
