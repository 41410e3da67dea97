"""The record of engines: what runs, what was left behind, and whose process a number means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm.engine import list_engines, reap
from hf_dsvllm.engine.registry import record_path, state_folder
from hf_dsvllm.engine.supervisor import MARK, birth
from hf_dsvllm.errors import EngineError

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(300)"]
GONE = {"pid": 2**22 + 7, "birth": "a boot long ago:1"}  # above pid_max


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def me() -> dict[str, Any]:
    return {"pid": os.getpid(), "birth": birth(os.getpid())}


def write(engine_id: str = "e1", **changes: Any) -> Path:
    record = {"engine_id": engine_id, "host": os.uname().nodename, "owner": GONE, "supervisor": GONE, "engine": GONE}
    file = record_path(engine_id)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record | {"run_dir": "/run", "command": ["python", "-m", "vllm"]} | changes))
    return file


def test_the_registry_is_in_the_state_folder(tmp_path: Path) -> None:
    assert state_folder() == tmp_path / "hf-dsvllm" / "engines"
    assert list_engines() == ()


def test_a_record_whose_processes_are_gone_is_reaped() -> None:
    file = write()
    (record,) = list_engines()
    assert record.state == "gone"
    assert reap(record) == ()
    assert not file.exists()


def test_a_foreign_process_with_the_same_number_is_not_touched(sleepers: list[subprocess.Popen[bytes]]) -> None:
    foreign = subprocess.Popen(SLEEPER, start_new_session=True)
    sleepers.append(foreign)
    file = write(engine={"pid": foreign.pid, "birth": "a boot long ago:1"})
    (record,) = list_engines()
    assert record.state == "gone"
    assert reap(record) == ()
    assert foreign.poll() is None
    assert not file.exists()


def test_processes_left_by_a_dead_run_are_orphaned_and_reaped(sleepers: list[subprocess.Popen[bytes]]) -> None:
    leader = subprocess.Popen(SLEEPER, start_new_session=True)
    elsewhere = subprocess.Popen(SLEEPER, start_new_session=True, env=os.environ | {MARK: "e1"})
    sleepers += [leader, elsewhere]
    write(engine={"pid": leader.pid, "birth": birth(leader.pid)})
    (record,) = list_engines()
    assert record.state == "orphaned"
    assert set(reap(record, grace_s=5.0)) == {leader.pid, elsewhere.pid}
    assert leader.wait() != 0
    assert elsewhere.wait() != 0
    assert list_engines() == ()


def test_an_engine_that_has_its_owner_is_not_reaped(sleepers: list[subprocess.Popen[bytes]]) -> None:
    leader = subprocess.Popen(SLEEPER, start_new_session=True)
    sleepers.append(leader)
    write(owner=me(), supervisor=me(), engine={"pid": leader.pid, "birth": birth(leader.pid)})
    (record,) = list_engines()
    assert record.state == "running"
    with pytest.raises(EngineError, match=f"belongs to process {os.getpid()}"):
        reap(record)
    assert leader.poll() is None


def test_an_engine_of_another_host_is_not_reaped() -> None:
    file = write(host="another-host")
    (record,) = list_engines()
    assert record.state == "elsewhere"
    with pytest.raises(EngineError, match="another-host"):
        reap(record)
    assert file.exists()


def test_files_that_are_no_records_are_skipped() -> None:
    write()
    (state_folder() / "broken.json").write_text("{")
    (state_folder() / "other.json").write_text("[]")
    assert [record.engine_id for record in list_engines()] == ["e1"]
