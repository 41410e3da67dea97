"""A checkpoint that a run cannot go on from is one problem before anything is loaded; `last` is the last there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm.launch import Launch
from hf_dsvllm.presets import get_preset
from hf_dsvllm.resume import checkpoint_problems, find_checkpoint
from tests.door import enter, problems_of, sound


def write_checkpoint(run: Path, step: int, *files: str) -> Path:
    """A checkpoint as far as its names go."""
    folder = run / f"checkpoint-{step}"
    for name in ("trainer_state.json", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def processes(count: int) -> Launch:
    return Launch(rank=0, local_rank=0, world_size=count, local_world_size=count, launched=True, asked_processes=None)


def differences(checkpoint: Path, preset: str | None, count: int, stage: int = 2) -> list[str]:
    config = sound(zero_optimization={"stage": stage})
    found = checkpoint_problems(checkpoint, config, get_preset(preset) if preset else None, processes(count))
    return [problem.what for problem in found]


@pytest.mark.parametrize("given", ["true", "True", "last", True])
def test_the_last_checkpoint_is_found_by_its_step(given: Any, tmp_path: Path) -> None:
    for step in (90, 100, 9):
        write_checkpoint(tmp_path, step)
    assert find_checkpoint(given, tmp_path) == (tmp_path / "checkpoint-100", [])


@pytest.mark.parametrize("given", [None, False, ""])
def test_a_run_that_does_not_resume_has_no_checkpoint(given: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4)
    assert find_checkpoint(given, tmp_path) == (None, [])


def test_the_last_of_none_is_a_problem(tmp_path: Path) -> None:
    _, (problem,) = find_checkpoint("last", tmp_path / "run")
    assert problem.what == f"resume_from_checkpoint=last: {tmp_path / 'run'} has no checkpoint-*"


def test_a_folder_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    for step in (100, 200):
        write_checkpoint(tmp_path, step)
    _, (problem,) = find_checkpoint(str(tmp_path / "chekpoint-200"), tmp_path)
    assert "is no folder" in problem.what
    assert problem.fix == str(tmp_path / "checkpoint-200")
    _, (problem,) = find_checkpoint(str(tmp_path / "elsewhere"), tmp_path)
    assert problem.fix == f"{tmp_path / 'checkpoint-100'} or {tmp_path / 'checkpoint-200'}"


def test_a_run_folder_is_no_checkpoint_and_its_own_are_named(tmp_path: Path) -> None:
    inside = write_checkpoint(tmp_path / "run", 7)
    _, (problem,) = find_checkpoint(str(tmp_path / "run"), tmp_path / "another")
    assert "is no checkpoint, it has no trainer_state.json" in problem.what
    assert problem.fix == str(inside)


def test_the_arguments_have_the_checkpoint_that_was_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "run", 8, "model.safetensors")
    args = enter(tmp_path, use_cpu=True, resume_from_checkpoint="last")
    assert args.resume_from_checkpoint == str(folder)
    assert f"resume_from_checkpoint: last → {folder}" in capsys.readouterr().err


def test_a_wrong_checkpoint_is_one_problem_of_the_arguments(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, use_cpu=True, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "is no folder" in problem.what


def test_each_way_of_training_needs_its_own_files(tmp_path: Path) -> None:
    empty = write_checkpoint(tmp_path, 1)
    (without,) = checkpoint_problems(empty, None, None, processes(1))
    assert "no weights that a run without DeepSpeed can go on from" in without.what
    (missing,) = checkpoint_problems(empty, sound(), None, processes(1))
    assert "no global_step* folder" in missing.what
    for step, file in enumerate(("adapter_model.safetensors", "default/adapter_model.bin", "pytorch_model.bin"), 2):
        assert checkpoint_problems(write_checkpoint(tmp_path, step, file), None, None, processes(1)) == []


def test_zeros_optimizer_is_resumed_only_as_it_was_cut(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, "global_step4/x.pt", "adapter_model.safetensors")
    assert differences(folder, "zero2", 3) == [], "nothing is recorded"
    (tmp_path / "run.json").write_text(json.dumps({"preset": "lora_zero2", "world_size": 2, "zero_stage": 2}))
    assert differences(folder, "lora_zero2", 2) == []
    number, preset = differences(folder, "zero2", 3)
    assert "is of a run with 2 processes, this one has 3" in number
    assert "is of a run with preset lora_zero2, this one has preset zero2" in preset
    assert differences(folder, None, 2) == [], "an own configuration of the same stage"
    (stage,) = differences(folder, None, 2, stage=3)
    assert "with ZeRO stage 2, this one has stage 3" in stage


def test_presets_that_cut_the_optimizer_alike_resume_each_other(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, "global_step4/x.pt")

    def between(saved: str, now: str) -> list[str]:
        record = {"preset": saved, "world_size": 2, "zero_stage": 3}
        (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
        return differences(folder, now, 2, stage=3)

    assert between("zero3_offload_optimizer", "zero3_offload") == between("zero3_offload", "zero3_offload_optimizer")
    assert between("zero3_offload_optimizer", "zero3_offload") == []
    for other in ("zero3_offload", "zero3_hpz", "long_context", "qlora_zero3", "zero3_nvme"):
        (what,) = between("zero3", other)
        assert f"preset zero3, this one has preset {other}" in what


def test_a_universal_checkpoint_is_for_another_number_of_processes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, "global_step4_universal/zero/x.pt")
    (tmp_path / "run.json").write_text(json.dumps({"preset": "zero2", "world_size": 2, "zero_stage": 2}))
    config = sound(zero_optimization={"stage": 3}, checkpoint={"load_universal": True})
    assert checkpoint_problems(folder, config, None, processes(8)) == []
    config["checkpoint"]["load_universal"] = False
    assert len(checkpoint_problems(folder, config, None, processes(8))) == 2


def test_what_the_trainer_resumes_by_itself_may_differ(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, "global_step4/x.pt", "adapter_model.safetensors")
    (tmp_path / "run.json").write_text(json.dumps({"preset": "lora_zero2", "world_size": 2, "zero_stage": 2}))
    assert checkpoint_problems(folder, None, get_preset("lora"), processes(1)) == []
    assert differences(folder, "ddp", 4, stage=0) == []
    (tmp_path / "run.json").write_text("{ half")
    assert differences(folder, "zero2", 4) == []
