"""Memory and disk are checked for what the trainer of a `run` trains, not for what its script loads first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_dsvllm import checks, session
from hf_dsvllm.errors import ConfigError, Problem
from hf_dsvllm.run.for_arguments import ForArguments
from hf_dsvllm.run.for_models import ForModels
from hf_dsvllm.run.for_trainers import ForTrainers
from tests.tiny import write_tiny_model
from tests.unit.test_run_state import a_run, arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that memory and disk were checked for, in order; what needs more than adapters is refused."""
    seen: list[Any] = []

    def trained_problems(_args: Any, settings: Any, *_more: Any) -> list[Problem]:
        seen.append(settings)
        return [] if settings.use_peft else [Problem("training needs at least 112 GiB", "adapters")]

    monkeypatch.setattr(checks, "trained_problems", trained_problems)
    return seen


def test_a_teacher_loaded_first_is_not_checked_as_the_model_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: list[Any]
) -> None:
    prepared: list[Any] = []

    def prepare(args: Any, model_args: Any, *, trained: bool, constructed: bool = False) -> Any:
        assert not trained
        prepared.append(args)
        return SimpleNamespace(args=args, model_args=model_args, preset=None, device="cpu", stop_engine=lambda: None)

    monkeypatch.setattr(session, "prepare", prepare)
    run = a_run("zero2")
    run.use(arguments(tmp_path))
    ForModels(run, ForArguments(run)).before_load(transformers.LlamaForCausalLM, "teacher", {})
    assert len(prepared) == 1
    assert checked == []


def test_adapters_of_the_script_are_counted_as_adapters(folder: Path, checked: list[Any]) -> None:
    run = a_run("zero2")
    door = ForTrainers(run)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16"), LoraConfig(target_modules=["q_proj"])
    )
    run.settle_model(model, transformers.Trainer)
    door._check_loaded(model)
    assert (checked[0].use_peft, checked[0].lora_r, checked[0].dtype) == (True, 1, "bfloat16")
    assert not run.model_args.use_peft, "what the preset says stays"


def test_a_model_given_by_name_with_adapters_is_checked_before_trl_loads_it(checked: list[Any]) -> None:
    run = a_run("zero2")
    run.settle_model("m", trl.SFTTrainer)
    door = ForTrainers(run)
    door._check_named({"peft_config": LoraConfig()})
    with pytest.raises(ConfigError, match="112 GiB"):
        door._check_named({"args": SimpleNamespace(model_init_kwargs={"dtype": "bfloat16"})})
    assert isinstance(run.failed, ConfigError)
    assert [settings.use_peft for settings in checked] == [True, False]


def test_a_whole_model_is_checked_and_one_that_is_partly_frozen_is_not(folder: Path, checked: list[Any]) -> None:
    run = a_run("zero2")
    door, model = ForTrainers(run), AutoModelForCausalLM.from_pretrained(folder)
    run.settle_model(model, transformers.Trainer)
    with pytest.raises(ConfigError, match="112 GiB"):
        door._check_loaded(model)
    model.get_input_embeddings().requires_grad_(False)
    door._check_loaded(model)
    assert len(checked) == 1
