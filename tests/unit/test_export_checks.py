"""What would make the export at the end of a run fail is told before training, and what would not is left alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import ModelConfig, SFTConfig

from hf_dsvllm.checks import check_before_loading
from hf_dsvllm.export.job import layout_of, open_job
from hf_dsvllm.export.manifest import REPORT
from hf_dsvllm.export.source import find_source
from hf_dsvllm.presets import get_preset
from tests.door import enter
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def told(
    folder: Path, model: Path | str, *, adapter: bool = False, resume: str | None = None, **more: Any
) -> list[tuple[str, str]]:
    """What and fix of each problem of a run in `folder`/run."""
    args = enter(folder, SFTConfig, use_cpu=True, bf16=False, per_device_train_batch_size=1, **more)
    args.deepspeed, args.resume_from_checkpoint = None, resume
    preset = get_preset("lora" if adapter else "zero2")
    found = check_before_loading(args, ModelConfig(model_name_or_path=str(model), use_peft=adapter), preset, "cpu", ())
    return [(problem.what, problem.fix) for problem in found]


def occupied(folder: Path, name: str = "notes.txt") -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")
    return folder


def test_an_export_goes_to_a_new_folder_an_empty_one_or_over_an_earlier_export(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    occupied(tmp_path / "earlier", REPORT)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("a/b/new", "empty", "earlier", "link", "run/final", "run/a/b"):
        assert told(tmp_path, model, export_to=str(tmp_path / name)) == [], name
    assert not (tmp_path / "a").exists(), "checking writes nothing"


@pytest.mark.parametrize("where", ["run", ".", "run/x/..", "link"])
def test_the_runs_own_folder_and_those_around_it_are_no_export(where: str, tmp_path: Path, model: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    ((what, fix),) = told(tmp_path, model, export_to=str(tmp_path / where))
    assert "is the run's own folder" in what
    assert str(tmp_path / "run" / "export") in fix


def test_a_folder_with_something_else_is_not_replaced(tmp_path: Path, model: Path) -> None:
    folder = occupied(tmp_path / "thesis")
    ((what, _),) = told(tmp_path, model, export_to=str(folder))
    assert what == f"export_to {folder} exists and is no export of hf-dsvllm"
    ((what, _),) = told(tmp_path, model, export_to=str(folder / "notes.txt"))
    assert "is no export" in what
    ((what, _),) = told(tmp_path, model, export_to=str(folder / "notes.txt" / "export"))
    assert "notes.txt is a file" in what


def test_the_usual_folder_is_set_aside_by_a_fresh_run_and_kept_by_one_that_goes_on(tmp_path: Path, model: Path) -> None:
    occupied(tmp_path / "run" / "export")
    assert told(tmp_path, model) == []
    ((what, _),) = told(tmp_path, model, resume="last")
    assert "is no export" in what


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    access = os.access
    monkeypatch.setattr("hf_dsvllm.checks.os.access", lambda path, mode: path.name != "theirs" and access(path, mode))
    ((what, fix),) = told(tmp_path, model, export_to=str(tmp_path / "theirs" / "a" / "export"))
    assert what.endswith("theirs cannot be written")
    assert fix == "--export_to another folder, or none"
    monkeypatch.setenv("RANK", "1")
    assert told(tmp_path, model, export_to=str(tmp_path / "theirs" / "export")) == [], "rank 0 writes it"


def test_links_in_a_circle_and_roots_of_disks_are_told(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    ((what, _),) = told(tmp_path, model, export_to=str(tmp_path / "a"))
    assert "cannot be used" in what
    what, fix = told(tmp_path, model, export_to="/proc")[0]  # a disk without room, too
    assert ("root of a disk" in what, fix) == (True, "a folder in it")


def test_the_folder_for_the_best_weights_is_looked_at_where_scores_may_choose_them(tmp_path: Path, model: Path) -> None:
    best = occupied(tmp_path / "final-best")
    (tmp_path / "task.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "reference": "2"}))
    scores = {"export_to": str(tmp_path / "final"), "gen_eval_file": [str(tmp_path / "task.jsonl")]}
    ((what, _),) = told(tmp_path, model, **scores)
    assert f"{best}, for the best weights, exists and is no export" in what
    assert told(tmp_path, model, export_to=scores["export_to"]) == []
    (best / REPORT).write_text("{}")
    assert told(tmp_path, model, **scores) == []
    occupied(tmp_path / "run" / "export-best")
    (tmp_path / "link-best").symlink_to(tmp_path / "run")
    ((what, _),) = told(tmp_path, model, **scores | {"export_to": str(tmp_path / "link")})
    assert "link-best, for the best weights, is the run's own folder" in what
    assert told(tmp_path, model, gen_eval_file=scores["gen_eval_file"]) == [], "set aside"
    ((what, _),) = told(tmp_path, model, gen_eval_file=scores["gen_eval_file"], resume="last")
    assert "export-best, for the best weights, exists and is no export" in what


@pytest.fixture
def pickled(tmp_path: Path, model: Path) -> Path:
    folder = shutil.copytree(model, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def quantised(tmp_path: Path, model: Path) -> Path:
    folder = shutil.copytree(model, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_adapters_need_a_base_they_can_be_merged_into(tmp_path: Path, pickled: Path, quantised: Path) -> None:
    ((what, fix),) = told(tmp_path, pickled, adapter=True)
    assert "has no model.safetensors" in what
    assert "save_pretrained" in fix
    ((what, fix),) = told(tmp_path, quantised, adapter=True)
    assert "is stored quantised (gptq)" in what
    assert fix.endswith("or --export_to none")
    (quantised / "model.safetensors").unlink()
    assert len(told(tmp_path, quantised, adapter=True)) == 2, "all problems at once"


def test_nothing_is_asked_of_a_base_that_nothing_is_merged_into(tmp_path: Path, pickled: Path, quantised: Path) -> None:
    for base in (pickled, quantised):
        assert told(tmp_path, base) == []
        assert told(tmp_path, base, adapter=True, export_to="none") == []


def test_a_full_model_is_exported_without_its_base_in_safetensors(tmp_path: Path, model: Path, pickled: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(model, run / "snapshots" / "step-4")
    (run / "snapshots" / "latest.json").write_text(json.dumps({"path": "step-4", "step": 4, "kind": "full"}))
    record = {"base_model": str(pickled), "adapter": None, "quantization": None, "dtype": "bfloat16"}
    (run / "run.json").write_text(json.dumps(record))
    with contextlib.ExitStack() as stack:
        job = open_job(find_source(run, "latest"), torch.bfloat16, None, stack)
        assert job.base == pickled
        assert layout_of(job).plan


def test_nothing_is_asked_of_a_place_that_nothing_is_exported_to(tmp_path: Path, model: Path) -> None:
    occupied(tmp_path / "run" / "export")
    assert told(tmp_path, model, export_to="none", resume="last") == []


def test_the_index_of_shards_counts_as_safetensors(tmp_path: Path, pickled: Path) -> None:
    (pickled / "model.safetensors.index.json").write_text("{}")
    assert told(tmp_path, pickled, adapter=True) == []
