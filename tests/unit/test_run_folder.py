"""One run at a time in a folder, and what a killed one left is found by record, named and removed; nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_dsvllm import run_folder
from hf_dsvllm.doctor import describe_leftover, remove_leftovers
from hf_dsvllm.engine import server
from hf_dsvllm.errors import ConfigError, EngineError
from hf_dsvllm.run_folder import leave, leftovers, occupy, set_aside_earlier_run

HALF_WRITTEN = (".run.json.ab12_x9z.tmp", "snapshots/.step-3.abcdefgh.tmp", "evals/.scores.jsonl.q_q_q_q_.tmp")
OTHERS = ("run.json", ".hidden", "notes.tmp", ".report.html.abcdefgh.tmp", "checkpoint-2/.x.abcdefgh.tmp")
# A run that holds its folder until its stdin ends, or is killed.
RUN = """
import sys
from pathlib import Path
from hf_dsvllm.run_folder import occupy
occupy(Path(sys.argv[1]))
print("here", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    short = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # a socket's path has 107 bytes
    monkeypatch.setattr("tempfile.tempdir", short)
    monkeypatch.setattr(run_folder, "socket_bases", tuple)
    yield
    shutil.rmtree(short)
    for folder in list(run_folder._held):
        leave(folder)


def run_in(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def fill(folder: Path) -> None:
    for name in (*HALF_WRITTEN, *OTHERS):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "step-" in name:
            path.mkdir()
            (path / "model.safetensors").touch()
        else:
            path.touch()


def test_a_folder_in_use_is_refused_with_the_process_that_has_it(tmp_path: Path) -> None:
    other = run_in(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"in use by a run that is going on .process {other.pid} on "):
        occupy(tmp_path / "run")
    other.communicate("")
    assert not (tmp_path / "run" / ".running").exists()
    assert leftovers() == ()
    assert occupy(tmp_path / "run") == []
    assert occupy(tmp_path / "run") == []
    leave(tmp_path / "run")
    leave(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert leftovers() == ()


def test_the_lock_ends_with_a_killed_run_and_the_next_one_clears_away_what_it_left(tmp_path: Path) -> None:
    other = run_in(tmp_path / "run")
    fill(tmp_path / "run")
    other.kill()
    other.communicate()
    removed = occupy(tmp_path / "run")
    assert {str(path.relative_to(tmp_path / "run")) for path in removed} == set(HALF_WRITTEN)
    assert all((tmp_path / "run" / name).exists() for name in OTHERS)
    assert not any((tmp_path / "run" / name).exists() for name in HALF_WRITTEN)


def test_a_lock_that_this_user_may_not_open_is_a_problem_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(ConfigError, match=r"cannot be used: .*run/\.running: Permission denied"):
            occupy(tmp_path / "run")
    assert occupy(tmp_path / "run") == []


def test_a_full_disk_is_said_and_the_folder_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(ConfigError, match=r"\.running: No space left on device"):
            occupy(tmp_path / "run")
    assert not (tmp_path / "run" / ".running").exists()
    assert occupy(tmp_path / "run") == []


def written(run: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps({"path": "step-6"}), encoding="utf-8")


def set_aside(run: Path) -> None:
    set_aside_earlier_run(run, evals="evals", snapshots="snapshots", exports=("export", "export-best"))


EARLIER = (
    *("snapshots/best.json", "snapshots/latest.json", "snapshots/step-6/model.safetensors", "evals/scores.jsonl"),
    *("export/config.json", "export-best/config.json", "run.json", "tokenizer/tokenizer.json"),
)


def test_a_run_that_starts_afresh_keeps_an_earlier_ones_best_weights_scores_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, (*EARLIER, "checkpoint-9/model.safetensors", "evals-before-1/scores.jsonl"))
    set_aside(tmp_path)
    assert capsys.readouterr().err.count("holds what an earlier run left") == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("evals-before-1", "evals-before-2", "snapshots-before-2", "export-before-2", "export-best-before-2"),
        "checkpoint-9",
    }
    kept = {path.name for path in (tmp_path / "snapshots-before-2").iterdir()}
    assert kept == {"best.json", "latest.json", "step-6", "run.json", "tokenizer"}
    set_aside(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("pointer", ["latest.json", "best.json"])
def test_the_last_weights_of_a_run_without_scores_are_kept_too(pointer: str, tmp_path: Path) -> None:
    written(tmp_path, (f"snapshots/{pointer}", "snapshots/step-6/model.safetensors", "run.json"))
    set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshots-before-1"]
    assert {path.name for path in (tmp_path / "snapshots-before-1").iterdir()} == {pointer, "step-6", "run.json"}


def test_snapshots_that_no_pointer_leads_to_lose_the_pointers_alone(tmp_path: Path) -> None:
    written(tmp_path, ("snapshots/latest.json", "snapshots/best.json", "snapshots/step-9/model.safetensors"))
    written(tmp_path, ("run.json",))
    set_aside(tmp_path)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-9"]
    assert (tmp_path / "run.json").exists()


def test_a_worker_forked_by_a_run_does_not_keep_its_folder(tmp_path: Path) -> None:
    script = RUN.replace("print(", "import os\nchild = os.fork()\nif child == 0: sys.stdin.read(); os._exit(0)\nprint(")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.wait()
    occupy(tmp_path / "run")  # the worker lives until its stdin ends
    process.communicate("")


def test_the_doctor_names_and_removes_what_a_killed_run_left_and_leaves_a_live_one_alone(tmp_path: Path) -> None:
    live, killed = run_in(tmp_path / "live"), run_in(tmp_path / "killed")
    for name in ("live", "killed"):
        fill(tmp_path / name)
    assert leftovers() == ()
    killed.kill()
    killed.communicate()
    found = "\n".join(map(describe_leftover, leftovers()))
    for name in HALF_WRITTEN:
        assert f"{tmp_path / 'killed' / name}: half written by a run in {tmp_path / 'killed'} whose process" in found
    assert str(tmp_path / "live") not in found
    done, failed = remove_leftovers()
    assert len(done) == len(HALF_WRITTEN) + 1, "and its record"
    assert failed == []
    assert leftovers() == ()
    assert all((tmp_path / "killed" / name).exists() for name in OTHERS)
    assert all((tmp_path / "live" / name).exists() for name in HALF_WRITTEN)
    live.communicate("")


def test_a_folder_that_a_later_run_has_is_not_cleared_for_an_earlier_one(tmp_path: Path) -> None:
    killed = run_in(tmp_path / "run")
    killed.kill()
    killed.communicate()
    live = run_in(tmp_path / "run")
    fill(tmp_path / "run")
    (found,) = leftovers()
    assert "record of a run" in found.what
    remove_leftovers()
    assert all((tmp_path / "run" / name).exists() for name in HALF_WRITTEN)
    live.communicate("")


def test_a_run_of_another_machine_is_left_to_that_machine(tmp_path: Path) -> None:
    record = tmp_path / "state" / "hf-dsvllm" / "runs" / "x.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"run_dir": str(tmp_path), "host": "another", "pid": 1, "birth": "1"}))
    (record.parent / "half.json").write_text("{")
    assert leftovers() == ()


def test_folders_of_sockets_go_when_nobody_listens_and_nobody_names_them() -> None:
    base = Path(tempfile.gettempdir())
    names = {name: base / f"dsvllm-{name}" for name in ("deserted", "youthful", "listened", "namedxyz")}
    for folder in names.values():
        folder.mkdir()
    (names["deserted"] / "api.sock").touch()
    script = "print(flush=True); input()"  # Popen returns before the kernel shows the new command line
    named = subprocess.Popen(
        [sys.executable, "-S", "-c", script, str(names["namedxyz"])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert named.stdout is not None
    named.stdout.readline()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(names["listened"] / "api.sock"))
        listener.listen()
        for name in ("deserted", "listened", "namedxyz"):
            os.utime(names[name], (1, 1))
        found = {leftover.path.name for leftover in leftovers()}
    named.communicate(b"\n")
    assert found == {"dsvllm-deserted"}
    done, _ = remove_leftovers()
    assert f"removed {names['deserted']}: sockets of an engine that is gone" in done
    assert not names["deserted"].exists()


def test_what_cannot_be_removed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tempfile.gettempdir(), "dsvllm-12345678")
    folder.mkdir()
    os.utime(folder, (1, 1))

    def refuse(leftover: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("hf_dsvllm.doctor.remove", refuse)
    done, failed = remove_leftovers()
    assert done == []
    assert "dsvllm-12345678 cannot be removed: Operation not permitted" in failed[0]


def test_sockets_go_to_the_first_folder_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "socket_bases", lambda: (str(tmp_path / "absent"), str(tmp_path)))
    assert server.new_socket_folder().parent == tmp_path
    monkeypatch.setattr(server, "socket_bases", lambda: (str(tmp_path / "absent"),))
    with pytest.raises(EngineError, match=r"no folder for vLLM's sockets .*absent: No such file"):
        server.new_socket_folder()
