"""A reader never sees half a file, and a DeepSpeed configuration is read in every form the Trainer takes."""

from __future__ import annotations

import base64
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file as save

from hf_dsvllm.files import atomic_folder, exchange, read_json_or_problem, write_json, write_text


def test_text_is_written_with_its_folders_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "first")
    write_text(path, "zweite Fassung: ü")
    assert path.read_text(encoding="utf-8") == "zweite Fassung: ü"
    assert [item.name for item in path.parent.iterdir()] == ["note.txt"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def refuse(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hf_dsvllm.files.os.fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["note.txt"]


def test_json_keeps_its_letters_and_writes_paths_as_text(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": "Größe", "path": Path("a/b")})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "Größe", "path": "a/b"}
    assert "Größe" in text


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "made" / "export"
    with atomic_folder(target) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("x", encoding="utf-8")
        assert not target.exists()
    assert (target / "part" / "file").read_text(encoding="utf-8") == "x"
    assert [item.name for item in target.parent.iterdir()] == ["export"]


def test_a_folder_that_was_not_finished_is_gone(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "export") as folder:
            (folder / "half").write_text("x", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    (target / "kept").write_text("x", encoding="utf-8")
    with pytest.raises(OSError), atomic_folder(target) as folder:
        (folder / "other").write_text("y", encoding="utf-8")
    assert [item.name for item in tmp_path.rglob("*")] == ["export", "kept"]


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0, 0o777, 0o666)])
def test_what_is_written_is_open_to_whom_the_umask_lets_in(umask: int, folder: int, file: int, tmp_path: Path) -> None:
    """Another user serves an export: a container, a unit of systemd."""
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "export") as made:
            assert made.stat().st_mode & 0o777 == 0o700
            write_json(made / "config.json", {})
            save({"a": torch.ones(2)}, made / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "export").stat().st_mode & 0o777 == folder
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "export" / name).stat().st_mode & 0o777 == file


def test_a_file_system_without_modes_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("hf_dsvllm.files.os.chmod", refuse)
    write_text(tmp_path / "note.txt", "here")
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "here"


def test_a_folder_is_there_all_the_time_while_it_is_replaced(tmp_path: Path) -> None:
    """Not between two renames, where the file system can exchange (ext4, xfs, btrfs, tmpfs, overlayfs)."""
    target, over, missing = tmp_path / "step-3", threading.Event(), []
    with atomic_folder(target) as folder:
        (folder / "weights").touch()

    def look() -> None:
        while not over.is_set():
            if not target.is_dir():
                missing.append(True)

    watcher = threading.Thread(target=look)
    watcher.start()
    for text in map(str, range(100)):
        with atomic_folder(target, replace=True) as folder:
            (folder / "weights").write_text(text, encoding="utf-8")
    over.set()
    watcher.join()
    assert (target / "weights").read_text(encoding="utf-8") == "99"
    assert [item.name for item in tmp_path.iterdir()] == ["step-3"]
    (tmp_path / "other").mkdir()
    assert not missing or not exchange(target, tmp_path / "other")


def test_a_file_system_that_cannot_exchange_gets_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dsvllm.files.exchange", lambda *_: False)
    target = tmp_path / "step-3"
    for text in ("1", "2"):
        with atomic_folder(target, replace=True) as folder:
            (folder / "weights").write_text(text, encoding="utf-8")
    assert (target / "weights").read_text(encoding="utf-8") == "2"
    assert [item.name for item in tmp_path.iterdir()] == ["step-3"]


def test_a_folder_that_is_replaced_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "step-3"

    def write(text: str, *, fails: bool = False) -> None:
        with atomic_folder(target, replace=True) as folder:
            (folder / "weights").write_text(text, encoding="utf-8")
            if fails:
                assert target.is_dir()
                raise OSError("disk full")

    write("first")
    with pytest.raises(OSError, match="disk full"):
        write("half", fails=True)
    assert (target / "weights").read_text(encoding="utf-8") == "first"
    write("second")
    assert (target / "weights").read_text(encoding="utf-8") == "second"
    assert [item.name for item in tmp_path.iterdir()] == ["step-3"]


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step-3"
    target.mkdir()
    (target / "weights").touch()
    calls: list[str] = []
    rename = os.rename

    def second_fails(source: Path, to: Path) -> None:
        calls.append(str(to))
        if len(calls) == 2:
            raise OSError("stale handle")
        rename(source, to)

    monkeypatch.setattr("hf_dsvllm.files.exchange", lambda *_: False)
    monkeypatch.setattr("hf_dsvllm.files.os.rename", second_fails)
    with pytest.raises(OSError, match="stale handle"), atomic_folder(target, replace=True):
        pass
    assert [str(item.relative_to(tmp_path)) for item in tmp_path.rglob("*")] == ["step-3", "step-3/weights"]


@pytest.mark.parametrize("form", ["file", "text", "base64", "long base64"])
def test_a_configuration_is_read_in_every_form(form: str, tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2}, "note": "x" * (500 if form == "long base64" else 1)}
    text = json.dumps(config)
    (tmp_path / "ds.json").write_text(text, encoding="utf-8")
    coded = base64.urlsafe_b64encode(text.encode()).decode()
    given = {"file": str(tmp_path / "ds.json"), "text": f" {text}", "base64": coded, "long base64": coded}[form]
    assert read_json_or_problem(given) == (config, None)


@pytest.mark.parametrize(
    ("text", "what"), [('{\n"a": }', "line 2"), ("[1, 2]", "a list, not an object"), ("7", "a int, not an object")]
)
def test_a_file_that_is_no_configuration_is_one_problem(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    config, problem = read_json_or_problem(str(path))
    assert config is None
    assert problem is not None
    assert what in problem.what
    assert str(path) in problem.what


@pytest.mark.parametrize("given", ["absent.json", "folder/absent.json", "%%%", ""])
def test_a_name_that_is_no_file_is_one_problem(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, problem = read_json_or_problem(given)
    assert config is None
    assert problem is not None


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    config, problem = read_json_or_problem(str(tmp_path))
    assert config is None
    assert problem is not None
