"""Where an export is written: beside the folder that --out leads to, and one clear error where that cannot be."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_dsvllm import files
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export import claim
from hf_dsvllm.export.claim import claimed, replacing


def export(out: Path, text: str = "new") -> Path:
    """An export of one file, as export.py does it; returns the folder in which it was written."""
    with claimed(out), replacing(out) as folder:
        (folder / "model").write_text(text)
    return folder


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A link on a small disk to `export` on a big one, where nothing is yet."""
    (tmp_path / "big").mkdir()
    (tmp_path / "small").mkdir()
    link = tmp_path / "small" / "out"
    link.symlink_to(tmp_path / "big" / "export")
    return link


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "an export"])
def test_a_link_stays_a_link_and_its_target_is_written(linked: Path, there: str) -> None:
    target = linked.readlink()
    if there != "nothing":
        target.mkdir()
    if there == "an export":
        (target / "old").write_text("old")
    written = export(linked)
    assert written.parent == target.parent
    assert linked.is_symlink()
    assert [item.name for item in linked.iterdir()] == ["model"]
    assert [item.name for item in target.parent.iterdir()] == ["export"]
    assert [item.name for item in linked.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_replacement_is_on_the_disk_before_the_old_export_goes(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "out", "old")
    seen: list[tuple[list[str], str]] = []
    flush = files.fsync_path

    def flushed(path: Path) -> None:
        if path == tmp_path:
            beside = [(tmp_path / name / "model") for name in (".out.old", ".out.new")]
            seen.append(
                ([file.read_text() for file in beside if file.exists()], (tmp_path / "out" / "model").read_text())
            )
        flush(path)

    monkeypatch.setattr(files, "fsync_path", flushed)
    if not at_once:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    export(tmp_path / "out", "new")
    assert seen[-1] == (["old"], "new")
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_through_a_link_keeps_what_was_there(linked: Path) -> None:
    export(linked, "old")
    with pytest.raises(FileNotFoundError), claimed(linked), replacing(linked) as folder:
        (folder / "absent" / "model").write_text("half")
    assert (linked / "model").read_text() == "old"
    assert [item.name for item in linked.readlink().parent.iterdir()] == ["export"]


def test_a_link_and_its_target_are_one_folder(linked: Path) -> None:
    with claimed(linked), pytest.raises(ExportError, match="Another process is exporting"), claimed(linked.readlink()):
        pass


def test_what_a_killed_export_left_behind_a_link_is_cleared_away(linked: Path) -> None:
    big = linked.readlink().parent
    for left in (".export.abcd1234.tmp", ".export.new", "..export.new.abcd1234.tmp"):
        (big / left).mkdir()
    (big / ".export.old").mkdir()
    with claimed(linked):
        assert sorted(item.name for item in big.iterdir()) == [".export.lock", "export"]


def test_links_in_a_circle_and_roots_of_disks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ExportError, match="leads to itself"):
        export(tmp_path / "a")
    (tmp_path / "disk").symlink_to("/proc")
    with pytest.raises(ExportError, match="root of a disk"):
        export(tmp_path / "disk")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_disk_that_fills_up_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, replaced: bool
) -> None:
    out = tmp_path / "out"
    if replaced:
        export(out, "old")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("hf_dsvllm.files.os.fsync", full)
        with pytest.raises(ExportError, match=f"out cannot be written: {os.strerror(number)}; name another") as told:
            export(out)
    assert isinstance(told.value.__cause__, OSError)
    assert [item.name for item in tmp_path.iterdir()] == (["out"] if replaced else [])
    assert not replaced or (out / "model").read_text() == "old"


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), claimed(tmp_path / "out"), replacing(tmp_path / "out"):
        (tmp_path / "absent").read_text()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("hf_dsvllm.export.claim.os.open", refuse)
    with pytest.raises(ExportError, match=r"\.out\.lock cannot be written: Permission denied; name another"):
        export(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_exported_to_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(claim.fcntl, "flock", failing_lock(number))
    export(tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_somebody_has_is_an_export_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(claim.fcntl, "flock", failing_lock(number))
    with pytest.raises(ExportError, match="Another process is exporting"):
        export(tmp_path / "out")


def failing_lock(number: int) -> Callable[[int, int], None]:
    def flock(_: int, __: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock
