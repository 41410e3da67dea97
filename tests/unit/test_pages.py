"""Pages of mapped files go when they were read; any other memory keeps its contents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_dsvllm.tensors.pages import Pages

MIB = 1 << 20


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssFile:")).split()[1]) + 1024 * int(
        next(line for line in lines if line.startswith("RssShmem:")).split()[1]
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a checkpoint with spaces.pt"
    torch.save({"first": torch.arange(4 * MIB), "second": torch.arange(4 * MIB) + 7}, path)
    return path


def test_what_was_read_of_a_checkpoint_is_let_go_and_can_be_read_again(file: Path) -> None:
    state = torch.load(file, mmap=True, weights_only=True)
    pages = Pages([file, file.parent / "another"])
    before = resident_bytes()
    total = int(state["first"].sum())
    assert resident_bytes() - before > 24 * MIB, "32 MiB are mapped in"
    pages.let_go(state["first"])
    assert resident_bytes() - before < 8 * MIB
    assert int(state["first"].sum()) == total
    assert torch.equal(state["second"], torch.arange(4 * MIB) + 7)


def test_no_other_memory_is_touched(file: Path) -> None:
    state = torch.load(file, mmap=True, weights_only=True)
    own = torch.ones(4 * MIB)
    for pages in (Pages([file]), Pages([])):
        pages.let_go(own)
        pages.let_go(own[:0])
    assert bool((own == 1).all())
    before = resident_bytes()
    _ = int(state["first"].sum())
    Pages([]).let_go(state["first"])
    assert resident_bytes() - before > 24 * MIB
