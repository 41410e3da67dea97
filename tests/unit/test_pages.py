"""Files that are mapped are read without their pages, any other memory as it is; new memory comes in large pages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.tensors.pages import Pages, empty

MIB = 1 << 20


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssFile:", "RssShmem:")))


def whole(pages: Pages, tensor: torch.Tensor, size_bytes: int = MIB) -> torch.Tensor:
    return torch.cat([piece.clone() for piece in pages.pieces(tensor, size_bytes)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a checkpoint with spaces.pt"
    torch.save({"first": torch.arange(4 * MIB), "second": torch.arange(4 * MIB) + 7}, path)
    return path


def test_what_is_read_of_a_checkpoint_becomes_no_memory_of_this_process(file: Path) -> None:
    state = torch.load(file, mmap=True, weights_only=True)
    pages = Pages([file, file.parent / "another"])
    before = resident_bytes()
    assert torch.equal(whole(pages, state["first"]), torch.arange(4 * MIB))
    assert torch.equal(whole(pages, state["second"][5:-3]), torch.arange(5, 4 * MIB - 3) + 7)
    assert torch.equal(whole(pages, state["second"][5:9], 17), torch.arange(12, 16))
    assert resident_bytes() - before < 8 * MIB
    assert int(state["first"].sum()) == 4 * MIB * (4 * MIB - 1) // 2
    assert resident_bytes() - before > 24 * MIB, "32 MiB are mapped in"


def test_other_memory_is_read_as_it_is(file: Path) -> None:
    state = torch.load(file, mmap=True, weights_only=True)
    own = torch.randn(3 * MIB)
    for pages in (Pages([file]), Pages([])):
        assert torch.equal(whole(pages, own, 1000), own)
        assert [len(piece) for piece in pages.pieces(own[:0])] == [0]
    assert torch.equal(whole(Pages([]), state["second"]), state["second"])


def test_no_file_is_left_open_however_many_there_are(file: Path) -> None:
    state = torch.load(file, mmap=True, weights_only=True)
    opened = len(os.listdir("/proc/self/fd"))
    pages = Pages([file])
    whole(pages, state["first"])
    next(pages.pieces(state["first"], MIB))  # and no more of it
    assert len(os.listdir("/proc/self/fd")) == opened


@pytest.mark.parametrize("then", ["gone", "another"])
def test_a_file_whose_name_another_one_has_is_read_through_its_mapping(file: Path, then: str) -> None:
    state = torch.load(file, mmap=True, weights_only=True)
    pages = Pages([file])
    file.unlink()
    if then == "another":
        torch.save({"first": torch.zeros(4 * MIB), "second": torch.zeros(4 * MIB)}, file)
    assert torch.equal(whole(pages, state["first"]), torch.arange(4 * MIB))


def test_a_file_that_has_become_shorter_is_an_error_and_no_signal(file: Path) -> None:
    state = torch.load(file, mmap=True, weights_only=True)
    pages = Pages([file])
    os.truncate(file, 8 * MIB)
    with pytest.raises(ExportError, match=r"ends at \d+ bytes: it was cut off while it was read"):
        whole(pages, state["second"])


@pytest.mark.parametrize("count", [0, 1, 3 * MIB + 5])
def test_new_memory_of_any_size(count: int) -> None:
    made = empty(count, torch.bfloat16).fill_(2.0)
    assert made.shape == (count,)
    assert made.dtype == torch.bfloat16
    assert bool((made == 2).all())
