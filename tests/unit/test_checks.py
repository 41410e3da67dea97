"""What is told about a model, its machine and its tasks before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils
from trl import ModelConfig, SFTConfig

from hf_dsvllm import checks, disk
from hf_dsvllm.checks import check_before_loading, load_tokenizer
from hf_dsvllm.engine_size import load_config
from hf_dsvllm.errors import Problem
from hf_dsvllm.hardware import Machine
from hf_dsvllm.presets import get_preset
from hf_dsvllm.tasks import load_task
from tests.door import enter
from tests.tiny import write_tiny_model

GIB = 1 << 30


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def run_args(folder: Path, **changes: Any) -> Any:
    """Arguments of a TRL run on the CPU; `deepspeed` is put in afterwards, since only its content matters here."""
    config = changes.pop("deepspeed", None)
    args = enter(folder, SFTConfig, use_cpu=True, bf16=False, per_device_train_batch_size=1, **changes)
    args.deepspeed = config
    return args


def model_args(name: Path | str | None, **changes: Any) -> Any:
    return ModelConfig(model_name_or_path=None if name is None else str(name), **changes)


def problems(args: Any, model: Any, preset: str | None = "zero2", tasks: Any = ()) -> list[Problem]:
    return check_before_loading(args, model, get_preset(preset) if preset else None, "cpu", tasks)


def test_a_run_nothing_is_wrong_with_has_no_problem(tmp_path: Path, model_folder: Path) -> None:
    assert problems(run_args(tmp_path), model_args(model_folder)) == []
    assert not (tmp_path / "run").exists(), "checking writes nothing"


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        (None, "no model is named", "--model_name_or_path"),
        ("./no/such/model", "model folder ./no/such/model does not exist", "check the path"),
        ("a/b/c", "model folder a/b/c does not exist", "check the path"),
        ("nobody/nothing-at-all", "is neither a folder nor to be had from the hub", "check the name"),
    ],
)
def test_a_model_that_is_not_there_is_one_problem(name: str | None, what: str, fix: str, tmp_path: Path) -> None:
    (problem,) = problems(run_args(tmp_path), model_args(name))
    assert what in problem.what
    assert fix in problem.fix


def test_a_mistyped_folder_is_answered_with_the_one_beside_it(tmp_path: Path, model_folder: Path) -> None:
    (problem,) = problems(run_args(tmp_path), model_args(model_folder.with_name("tiny-lama")))
    assert str(model_folder) in problem.fix


def test_a_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    (problem,) = problems(run_args(tmp_path), model_args(tmp_path))
    assert "has no config.json" in problem.what


def test_what_needs_the_model_trained_is_left_out_where_that_is_not_known(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "detect", lambda: Machine(gpus=(), cpu_count=2, ram_bytes=1))
    args, model, preset = run_args(tmp_path), model_args(model_folder), get_preset("zero2")
    assert any("host memory" in problem.what for problem in check_before_loading(args, model, preset, "cpu", ()))
    assert check_before_loading(args, model, preset, "cpu", (), trained=False) == []
    assert any("host memory" in problem.what for problem in checks.trained_problems(args, model, preset, "cpu"))


def chat_task(folder: Path) -> Any:
    line = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (folder / "chat.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    return load_task(folder / "chat.jsonl")


@pytest.fixture
def without_template(tmp_path: Path, model_folder: Path) -> Path:
    import shutil

    folder = tmp_path / "no-template"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_missing_chat_template_is_a_problem_of_the_task(tmp_path: Path, without_template: Path) -> None:
    (problem,) = problems(run_args(tmp_path), model_args(without_template), tasks=[chat_task(tmp_path)])
    assert "task chat" in problem.what
    assert "no chat template" in problem.what
    assert problem.fix == "--chat_template_path FILE.jinja"


@pytest.mark.parametrize("source", ["file", "model"])
def test_a_template_named_on_the_command_line_is_used(
    source: str, tmp_path: Path, without_template: Path, model_folder: Path
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    args = run_args(tmp_path, chat_template_path=str(file if source == "file" else model_folder))
    assert problems(args, model_args(without_template), tasks=[chat_task(tmp_path)]) == []
    template = load_tokenizer(args, model_args(without_template)).chat_template
    assert ("m.content" in template) == (source == "file")


def test_a_model_without_tokenizer_is_a_problem_where_it_is_asked(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "no-tokenizer"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    assert problems(run_args(tmp_path), model_args(folder)) == []
    (problem,) = problems(run_args(tmp_path), model_args(folder), tasks=[chat_task(tmp_path)])
    assert problem.what.startswith(f"the tokenizer of {folder} cannot be loaded: ")
    assert "tokenizer.json" in problem.fix
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    (problem,) = problems(run_args(tmp_path), model_args(folder), tasks=[chat_task(tmp_path)])
    assert "cannot be loaded" in problem.what


@pytest.mark.parametrize("path", ["no-such.jinja", "./no/such.jinja", "nobody/nothing-at-all"])
def test_a_template_that_is_no_file_is_a_problem_with_or_without_tasks(
    path: str, tmp_path: Path, model_folder: Path
) -> None:
    args = run_args(tmp_path, chat_template_path=path)
    for tasks in ([], [chat_task(tmp_path)]):
        (problem,) = problems(args, model_args(model_folder), tasks=tasks)
        assert problem.what.startswith(f"chat_template_path={path} is no file, nor a model with a tokenizer: ")
        assert "--chat_template_path FILE.jinja" in problem.fix


def test_an_output_folder_that_is_a_file_is_a_problem(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    (problem,) = problems(run_args(tmp_path), model_args(model_folder))
    assert "is a file" in problem.what


def test_an_output_folder_that_cannot_be_written_is_a_problem(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    (problem,) = problems(run_args(tmp_path), model_args(model_folder))
    assert "cannot be written" in problem.what


def test_a_model_that_surely_does_not_fit_is_refused(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "detect", lambda: Machine(gpus=(), cpu_count=2, ram_bytes=1 << 20))
    found = problems(run_args(tmp_path), model_args(model_folder))
    assert found
    assert any("GiB" in problem.what for problem in found)
    assert problems(run_args(tmp_path), model_args(model_folder), preset=None) == [], "without a preset nothing is said"


def test_too_small_a_disk_is_refused_for_what_the_run_would_write(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=600_000))
    (problem,) = problems(run_args(tmp_path), model_args(model_folder))
    assert "GiB there at once (a checkpoint " in problem.what
    assert "--save_strategy no" in problem.fix
    frugal = run_args(tmp_path, save_strategy="no", export_to="none")
    assert problems(frugal, model_args(model_folder)) == []
    assert problems(run_args(tmp_path, export_to="none"), model_args(model_folder, use_peft=True), "lora") == []


def mixture(model_type: str) -> Any:
    """A small mixture of experts without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    sizes: dict[str, Any] = {"num_experts": 2, "vocab_size": 64}
    if model_type == "switch_transformers":
        sizes |= {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2, "num_sparse_encoder_layers": 1}
    else:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    kind = AutoModelForSeq2SeqLM if model_type == "switch_transformers" else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(AutoConfig.for_model(model_type, **sizes))


@pytest.mark.parametrize(
    ("model_type", "zero", "processes", "refused"),
    [
        ("switch_transformers", {"stage": 3}, 2, True),
        ("switch_transformers", {"stage": 3}, 1, False),
        ("switch_transformers", {"stage": 2}, 2, False),
        ("switch_transformers", {"stage": 3, "leaf_module": {"classes": ["SwitchTransformersSparseMLP"]}}, 2, False),
        ("olmoe", {"stage": 3}, 2, False),
        ("qwen3_moe", {"stage": 3}, 2, False),
    ],
)
def test_experts_that_are_modules_of_their_own_are_refused_under_zero3(
    model_type: str, zero: dict[str, Any], processes: int, refused: bool
) -> None:
    found = checks.expert_problems(mixture(model_type), {"zero_optimization": zero}, processes)
    assert bool(found) == refused
    assert all("wait for each other for ever" in problem.what and "leaf_module" in problem.fix for problem in found)


OWN_CODE = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.mark.parametrize("place", ["args", "model_args"])
def test_a_model_with_code_of_its_own_is_read_where_that_code_is_trusted(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_tiny_model(tmp_path / "own")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_config.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own_config.py").write_text(OWN_CODE, encoding="utf-8")
    args, model = run_args(tmp_path), model_args(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_config(args, model)
    (args if place == "args" else model).trust_remote_code = True  # a field of SFTConfig since TRL 1.16
    assert load_config(args, model).model_type == "own"
    assert problems(args, model, tasks=[chat_task(tmp_path)]) == []
