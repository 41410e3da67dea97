"""How a run ends where its disk is full or its export fails: one error on every rank, with what is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm import ending
from hf_dsvllm.ending import export_last, export_places, weights_lost, write_end
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.manifest import REPORT
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


def exported(folder: Path, source: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / REPORT).write_text(json.dumps({"source": str(source)}))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are exported to."""
    folders: list[Path] = []

    def export_model(source: Path, out: Path, **_: Any) -> SimpleNamespace:
        folders.append(out)
        return SimpleNamespace(weights_bytes=1, remarks=())

    monkeypatch.setattr("hf_dsvllm.export.make.export_model", export_model)
    return folders


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    """A run whose best step is 4."""
    (tmp_path / "run" / "snapshots").mkdir(parents=True)
    (tmp_path / "run" / "snapshots" / "best.json").write_text(json.dumps({"step": 4}))
    return tmp_path / "run"


def test_the_best_weights_replace_an_export_of_the_same_run(chosen: Path, tmp_path: Path, asked: list[Path]) -> None:
    exported(tmp_path / "out-best", chosen / "snapshots" / "step-2")
    export_last(chosen, str(tmp_path / "out"), snapshot_in(chosen, 8))
    assert asked == [tmp_path / "out", tmp_path / "out-best"]


def test_the_usual_folder_of_the_best_weights_is_the_runs_own(chosen: Path, asked: list[Path]) -> None:
    exported(chosen / "export-best", Path("where/it/was/before"))
    export_last(chosen, None, snapshot_in(chosen, 8))
    assert asked == [chosen / "export", chosen / "export-best"]


@pytest.mark.parametrize("other", ["another run", "something else"])
def test_the_best_weights_leave_what_is_not_of_the_run(
    other: str, chosen: Path, tmp_path: Path, asked: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if other == "another run":
        exported(tmp_path / "out-best", tmp_path / "earlier" / "snapshots" / "step-2")
    else:
        weights_in(tmp_path / "out-best")
    weights_in(tmp_path / "out-best-2")
    export_last(chosen, str(tmp_path / "out"), snapshot_in(chosen, 8))
    assert asked == [tmp_path / "out", tmp_path / "out-best-3"]
    said = " ".join("".join(capsys.readouterr()).split())
    assert other in said
    assert "and is left as it is: the best weights go to" in said


@pytest.mark.parametrize("step", [4, None])
def test_an_earlier_export_of_best_weights_is_told_from_a_run_that_ends_with_its_best(
    step: int | None, chosen: Path, tmp_path: Path, asked: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if step is None:
        (chosen / "snapshots" / "best.json").unlink()
    exported(tmp_path / "out-best", tmp_path / "earlier")
    export_last(chosen, str(tmp_path / "out"), snapshot_in(chosen, 4))
    assert asked == [tmp_path / "out"]
    assert "out-best is not of this run's end: it was exported before" in " ".join("".join(capsys.readouterr()).split())


def test_an_export_to_the_root_of_a_disk_has_a_place_for_the_best() -> None:
    assert export_places(Path("run"), "/")[1] == Path("/-best")


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
