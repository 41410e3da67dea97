"""How a run ends where its disk is full or its export fails: one error on every rank, with what is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm import ending
from hf_dsvllm.ending import weights_lost, write_end
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.source import find_source
from hf_dsvllm.live.snapshot import Snapshot, point_to_latest
from hf_dsvllm.session import Session


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def snapshot_in(run: Path, step: int) -> Snapshot:
    return Snapshot(path=weights_in(run / "snapshots" / f"step-{step}"), kind="full", step=step)


def weights_in(folder: Path) -> Path:
    """A folder that holds a full model by its names."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_a_full_disk_at_the_end_is_said_of_each_thing_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "write_json", full)
    monkeypatch.setattr(ending, "export_last", full)
    measures, export = write_end(tmp_path, None, {}, None, snapshot_in(tmp_path, 4))
    assert measures == "measured.json could not be written: OSError: [Errno 28] No space left on device"
    assert export == "the export failed: OSError: [Errno 28] No space left on device"


def test_an_export_is_made_although_the_measures_were_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Snapshot] = []
    monkeypatch.setattr(ending, "write_json", full)
    monkeypatch.setattr(ending, "export_last", lambda run_dir, export_to, snapshot: exported.append(snapshot))
    assert len(write_end(tmp_path, None, {}, None, snapshot_in(tmp_path, 4))) == 1
    assert [snapshot.step for snapshot in exported] == [4]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_ends_with_the_same_error(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dsvllm.session.is_main_process", lambda: rank == 0)
    monkeypatch.setattr("hf_dsvllm.session.write_end", lambda *_: ["the export failed: no room"])
    heard = SimpleNamespace(broadcast=lambda said: said or ["the export failed: no room"])
    session: Any = SimpleNamespace(
        run_dir=tmp_path, ranks=heard, forecast=None, args=SimpleNamespace(export_to=None)
    )  # fmt: skip
    measure: Any = SimpleNamespace(as_record=dict)
    with pytest.raises(ExportError, match="the export failed: no room"):
        Session.finish(session, measure, snapshot_in(tmp_path, 4))


def test_weights_that_were_not_written_end_with_what_there_is_instead(tmp_path: Path) -> None:
    assert "no other weights of this run" in str(weights_lost(tmp_path, "no room"))
    for number, name in enumerate(("snapshots/step-6", "checkpoint-9")):
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, (number, number))
    error = str(weights_lost(tmp_path, "OSError: no room"))
    assert f"could not be written to {tmp_path / 'snapshots'}: OSError: no room" in error
    assert "snapshots/step-6, checkpoint-9" in error


def test_vllms_copies_go_when_it_is_stopped_and_its_logs_stay(tmp_path: Path) -> None:
    for name in ("base", "merged"):
        (tmp_path / "engine" / name).mkdir(parents=True)
    (tmp_path / "engine" / "vllm-1.log").touch()
    closed: list[bool] = []
    there = {name: (tmp_path / "engine" / name).is_dir for name in ("base", "merged")}
    evaluator = SimpleNamespace(close=lambda: closed.append(all(is_dir() for is_dir in there.values())))
    session: Any = SimpleNamespace(run_dir=tmp_path, _evaluator=evaluator, server=None)
    Session.stop_engine(session)
    assert closed == [True], "not before it is stopped"
    assert [path.name for path in (tmp_path / "engine").iterdir()] == ["vllm-1.log"]


def test_the_latest_is_the_newer_one_of_snapshot_and_checkpoint(tmp_path: Path) -> None:
    point_to_latest(tmp_path, snapshot_in(tmp_path, 6), trained_to=6)
    weights_in(tmp_path / "checkpoint-6")
    assert find_source(tmp_path, "latest").model_dir.name == "step-6"
    weights_in(tmp_path / "checkpoint-9")
    assert find_source(tmp_path, "latest").model_dir.name == "checkpoint-9"
    assert find_source(tmp_path, "final").model_dir.name == "checkpoint-9"


def test_the_latest_of_a_run_that_ended_with_its_best_weights_is_those(tmp_path: Path) -> None:
    point_to_latest(tmp_path, snapshot_in(tmp_path, 6), trained_to=9)
    weights_in(tmp_path / "checkpoint-9")
    assert find_source(tmp_path, "latest").model_dir.name == "step-6"
    weights_in(tmp_path / "checkpoint-12")  # the run was continued
    assert find_source(tmp_path, "latest").model_dir.name == "checkpoint-12"


def test_a_half_written_checkpoint_is_passed_over_unless_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point_to_latest(tmp_path, snapshot_in(tmp_path, 6), trained_to=6)
    (weights_in(tmp_path / "checkpoint-12") / "trainer_state.json").unlink()
    assert find_source(tmp_path, "latest").model_dir.name == "step-6"
    assert f"{tmp_path / 'checkpoint-12'} is passed over: it has no trainer_state.json" in capsys.readouterr().err
    weights_in(tmp_path / "checkpoint-9")
    assert find_source(tmp_path, "latest").model_dir.name == "checkpoint-9"
    assert find_source(tmp_path / "checkpoint-12", "latest").step == 12


def test_what_was_chosen_by_its_time_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point_to_latest(tmp_path, snapshot_in(tmp_path, 6), trained_to=6)
    state = weights_in(tmp_path / "checkpoint-9") / "trainer_state.json"
    find_source(tmp_path, "latest")
    assert "checkpoint-9 is chosen: of a later step, and written later, than the snapshot" in capsys.readouterr().err
    os.utime(state, (1, 1))
    find_source(tmp_path, "latest")
    assert "the snapshot of step 6 is chosen: checkpoint-9 was written before it" in capsys.readouterr().err


def test_an_earlier_runs_checkpoint_is_not_the_latest(tmp_path: Path) -> None:
    state = weights_in(tmp_path / "checkpoint-900") / "trainer_state.json"
    os.utime(state, (1, 1))
    point_to_latest(tmp_path, snapshot_in(tmp_path, 200), trained_to=200)
    assert find_source(tmp_path, "latest").step == 200


def test_pointers_written_before_they_had_a_step_of_training_are_read(tmp_path: Path) -> None:
    snapshot_in(tmp_path, 6)
    pointer = tmp_path / "snapshots" / "latest.json"
    pointer.write_text(json.dumps({"path": "step-6", "step": 6, "kind": "full"}), encoding="utf-8")
    assert find_source(tmp_path, "latest").step == 6
    weights_in(tmp_path / "checkpoint-9")
    assert find_source(tmp_path, "latest").step == 9
