"""What is counted on which disk before a run begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trl import ModelConfig

from hf_dsvllm import checks, disk
from hf_dsvllm.disk import disk_problems
from hf_dsvllm.errors import Problem
from hf_dsvllm.placement import Place

GIB = 1 << 30
SHAPE: Any = SimpleNamespace(parameters=GIB)  # a GiB for each byte a parameter
APART = Place(kind="spare", gpus=("1",), reason="a test")


def run_args(folder: Path, **changes: Any) -> Any:
    values = {
        "output_dir": str(folder / "run"), "export_to": None, "save_strategy": "steps", "save_only_model": False,
        "resume_from_checkpoint": None, "metric_for_best_model": None, "load_best_model_at_end": False,
        "eval_strategy": "steps", "eval_steps": 10, "gen_eval_steps": None, "max_steps": 100, "num_train_epochs": 3.0,
        "optim": "adamw_torch_fused", "deepspeed": {"zero_optimization": {"stage": 3}},
    }  # fmt: skip
    return SimpleNamespace(**values | changes)


def problems(
    monkeypatch: pytest.MonkeyPatch, args: Any, *, place: Place | None = None, free: float = 0.0, **model: Any
) -> list[Problem]:
    monkeypatch.setattr(disk, "_place", lambda *_: place)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free * GIB)))
    return disk_problems(args, ModelConfig(model_name_or_path="m", **model), "cuda", SHAPE)


def test_a_full_fine_tune_is_counted_with_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems(monkeypatch, run_args(tmp_path), free=17.9)
    assert "needs 18.0 GiB there at once (a checkpoint 14.0, one snapshot 2.0, one export 2.0)" in problem.what
    assert problems(monkeypatch, run_args(tmp_path), free=18.0) == []


def test_an_evaluated_one_with_three_snapshots_or_the_best_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (problem,) = problems(monkeypatch, run_args(tmp_path), place=APART)
    assert "needs 22.0 GiB there at once (a checkpoint 14.0, 2 snapshots 4.0, 2 exports 4.0)" in problem.what
    (problem,) = problems(monkeypatch, run_args(tmp_path, export_to="none", save_only_model=True), place=APART)
    assert "needs 8.0 GiB there at once (a checkpoint 2.0, 3 snapshots 6.0)" in problem.what


@pytest.mark.parametrize(
    ("changes", "snapshots"),
    [
        ({"eval_strategy": "no"}, "one snapshot"),
        ({"eval_strategy": "epoch"}, "one snapshot"),
        ({"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2.0}, "2 snapshots"),
        ({"eval_strategy": "no", "gen_eval_steps": 50}, "2 snapshots"),
        ({"max_steps": -1}, "one snapshot"),
        ({"max_steps": -1, "eval_steps": 0.1}, "3 snapshots"),
    ],
)
def test_no_more_snapshots_are_counted_than_evaluations_write(
    changes: dict[str, Any], snapshots: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = run_args(tmp_path, save_strategy="no", export_to="none", **changes)
    (problem,) = problems(monkeypatch, args, place=APART)
    assert f"({snapshots} " in problem.what


@pytest.mark.parametrize("changes", [{"eval_strategy": "no"}, {"load_best_model_at_end": True}])
def test_weights_that_are_the_last_and_the_best_are_exported_once(changes: dict[str, Any], tmp_path: Path) -> None:
    assert disk._exports(run_args(tmp_path), SHAPE, APART) == [("2 exports", 4 * GIB)]
    assert disk._exports(run_args(tmp_path, **changes), SHAPE, APART) == [("one export", 2 * GIB)]


@pytest.mark.parametrize(
    ("changes", "dtype", "gib"),
    [
        ({}, "float32", 14),
        ({"optim": "sgd"}, "float32", 6),
        ({"optim": "adamw_torch_8bit"}, "float32", 6),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}}, "float32", 6),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "optim": "sgd"}, None, 14),
        ({"deepspeed": None}, "float32", 12),
        ({"deepspeed": None}, "bfloat16", 6),
        ({"deepspeed": None, "optim": "adafactor"}, "float32", 4),
        ({"deepspeed": None, "save_only_model": True}, "float32", 4),
        ({"save_only_model": True}, "float32", 2),
    ],
)
def test_a_checkpoint_is_counted_by_what_its_optimizer_keeps(
    changes: dict[str, Any], dtype: str | None, gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = run_args(tmp_path, export_to="none", **changes)
    (problem,) = problems(monkeypatch, args, dtype=dtype)
    assert f"(a checkpoint {gib}.0, one snapshot 2.0)" in problem.what


def test_a_disk_that_cannot_be_looked_at_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    args = run_args(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", refused)
        (problem,) = problems(patched, args)
        (output,) = checks._output_problems(Path(args.output_dir))
    assert problem.what == f"{tmp_path / 'run' / 'export'} cannot be looked at: Permission denied"
    assert "cannot be used: [Errno 13] Permission denied" in output.what


@pytest.mark.parametrize(("rank", "asked"), [("0", 1), ("1", 0)])
def test_only_the_rank_that_writes_looks_at_the_disk(rank: str, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(checks, "load_shape", lambda *_, **__: SHAPE)
    monkeypatch.setattr(checks, "_memory_problems", lambda *_: [])
    monkeypatch.setattr(checks, "disk_problems", lambda *_: looked.append(1) or [])
    checks.trained_problems(run_args(Path()), ModelConfig(model_name_or_path="m"), None, "cpu")
    assert len(looked) == asked


@pytest.mark.parametrize(
    ("late", "counted"), [(True, "(one snapshot 2.0, one export 2.0)"), (False, "(2 snapshots 4.0, 2 exports 4.0)")]
)
def test_of_streamed_weights_the_best_are_on_the_disk_and_of_late_ones_the_last_alone(
    late: bool, counted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(kind="spare", gpus=("1",), stream=True, late=late, reason="a test")
    (problem,) = problems(monkeypatch, run_args(tmp_path, save_strategy="no"), place=place)
    assert counted in problem.what


def test_vllms_copies_of_a_qlora_run_are_counted_until_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qlora = {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16"}
    args = run_args(tmp_path, export_to="none")
    (problem,) = problems(monkeypatch, args, place=APART, **qlora)
    assert "(vLLM's copy of the base 2.0)" in problem.what
    (problem,) = problems(monkeypatch, args, place=APART, **qlora, use_dora=True)
    assert "needs 4.0 GiB there at once (vLLM's copy of the base 2.0, vLLM's merged copy 2.0)" in problem.what
    assert problems(monkeypatch, args, place=None, **qlora) == []
    (problem,) = problems(monkeypatch, run_args(tmp_path), place=APART, free=3.0, **qlora)
    assert "(2 exports 4.0)" in problem.what, "the copies are gone by then"
    (tmp_path / "run" / "engine" / "base").mkdir(parents=True)
    assert problems(monkeypatch, args, place=APART, **qlora) == [], "a killed run's is replaced"


def test_a_resumed_run_has_its_snapshots_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        (tmp_path / "run" / "snapshots" / f"step-{step}").mkdir(parents=True)
    args = run_args(tmp_path, save_strategy="no", export_to="none", resume_from_checkpoint="checkpoint-4")
    (problem,) = problems(monkeypatch, args, place=APART)
    assert "(one snapshot 2.0)" in problem.what


def test_an_export_to_another_disk_is_counted_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    devices = {tmp_path / "other": 2}
    existing = disk._existing

    def on_disks(folder: Path) -> Any:
        found = existing(folder)
        stat = SimpleNamespace(st_dev=devices.get(found, 1))
        return type("Folder", (type(found),), {"stat": lambda self: stat})(found)

    monkeypatch.setattr(disk, "_existing", on_disks)
    args = run_args(tmp_path, save_strategy="no", export_to=str(tmp_path / "other" / "out"))
    here, there = problems(monkeypatch, args)
    assert f"{tmp_path} has 0.0 GiB free, the run needs 2.0 GiB there at once (one snapshot 2.0)" in here.what
    assert f"{tmp_path / 'other'} has 0.0 GiB free, the run needs 2.0 GiB there at once (one export 2.0)" in there.what
