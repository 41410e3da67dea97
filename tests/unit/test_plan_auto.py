"""`--ds_preset auto`: the planner's choice becomes the arguments; what it cannot do is a problem with a fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from transformers import TrainingArguments

from hf_dsvllm import auto, forecast
from hf_dsvllm.errors import ConfigError, GpuMemoryError
from hf_dsvllm.hardware import Machine, parse_machine
from hf_dsvllm.launch import Launch
from hf_dsvllm.planner import cards
from hf_dsvllm.planner.footprint import Setup, gpu_footprint
from hf_dsvllm.planner.host import host_footprint
from hf_dsvllm.planner.speed import step_time
from hf_dsvllm.presets import get_preset
from hf_dsvllm.session import Session
from tests.door import enter, leave
from tests.tiny import write_tiny_model
from tests.unit.test_plan_rules import config, shape


@pytest.fixture(autouse=True)
def _left_behind() -> Iterator[None]:
    yield
    leave()


def launched(world: int) -> Launch:
    return Launch(rank=0, local_rank=0, world_size=world, local_world_size=world, launched=True, asked_processes=None)


def arguments(**fields: Any) -> Any:
    class Fields:
        ds_preset = "auto"
        per_device_train_batch_size = 4
        gradient_accumulation_steps = 2
        gradient_checkpointing = True
        max_length = 4096
        gen_eval_file = None
        gen_eval_lm_eval = None
        gen_eval_max_new_tokens = 256
        gen_eval_weights = "auto"
        optim = "adamw_torch_fused"
        optim_args = None
        vllm_python = None
        ds_speed = None

    for name, value in fields.items():
        setattr(Fields, name, value)
    return Fields()


@pytest.fixture
def eight_billion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import json

    (tmp_path / "config.json").write_text(json.dumps(config("8b")), encoding="utf-8")
    named = parse_machine("4xH100-80GB")
    machine = Machine(gpus=named.gpus, cpu_count=64, ram_bytes=2**40)
    monkeypatch.setattr(auto, "detect", lambda: machine)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return str(tmp_path)


def test_auto_writes_its_choice_into_the_arguments_and_keeps_the_batch(eight_billion: str) -> None:
    args = arguments()
    choice = auto.choose(args, launched(4), "cuda", ["--model_name_or_path", eight_billion])
    assert choice.problems == ()
    assert choice.plan is not None
    assert choice.plan.chosen is not None
    assert args.ds_preset == choice.plan.chosen.setup.preset.name
    assert args.ds_preset in ("zero1", "zero2", "zero3")  # within a few per cent of each other
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
    assert any(f"Use {args.ds_preset}" in sentence for sentence in choice.sentences)
    assert str(choice.fixes[0]).startswith("ds_preset")


@pytest.mark.parametrize(("weights", "asleep"), [("disk", False), ("stream", True), ("auto", True)])
def test_auto_counts_vllm_asleep_only_where_the_run_lets_it_sleep(
    eight_billion: str, weights: str, asleep: bool
) -> None:
    args = arguments(gen_eval_file=["eval.jsonl"], gen_eval_weights=weights)
    assert auto.job_of(args, launched(4), "cuda", eight_billion, "full", []).streams is asleep


@pytest.mark.parametrize(
    ("name", "adapter"), [("auto+lora", "lora"), ("auto+qlora", "qlora"), ("AUTO + QLoRA", "qlora")]
)
def test_auto_with_a_method_trains_that(eight_billion: str, name: str, adapter: str) -> None:
    args = arguments(ds_preset=name)
    auto.choose(args, launched(2), "cuda", [f"--model_name_or_path={eight_billion}"])
    assert get_preset(args.ds_preset).adapter == adapter


def test_every_rank_chooses_the_same(eight_billion: str) -> None:
    chosen = []
    for _ in range(3):
        args = arguments(ds_preset=f"auto:{eight_billion}")
        auto.choose(args, launched(4), "cuda", [])
        chosen.append((args.ds_preset, args.per_device_train_batch_size, args.gradient_checkpointing))
    assert len(set(chosen)) == 1


def test_what_auto_cannot_do_is_a_problem(eight_billion: str) -> None:
    def problem(argv: list[str], **fields: Any) -> str:
        choice = auto.choose(arguments(**fields), launched(1), "cuda", argv)
        assert choice.plan is None
        return " ".join(map(str, choice.problems))

    assert "does not know the model" in problem([])
    assert "'turbo' is no method" in problem(["--model", eight_billion], ds_preset="auto+turbo")
    assert "cannot plan" in problem(["--model", "/nowhere/at/all"])


@pytest.mark.parametrize("name", ["DPOConfig", "GRPOConfig", "RewardConfig"])
def test_auto_is_refused_for_training_that_its_formulas_do_not_know(eight_billion: str, name: str) -> None:
    class Own(getattr(trl, name)):  # type: ignore[misc]
        pass

    args = object.__new__(Own)
    args.ds_preset = "auto+lora"
    choice = auto.choose(args, launched(4), "cuda", ["--model", eight_billion])
    (problem,) = choice.problems
    assert f"these are {name}" in problem.what
    assert "zero2 or zero3" in problem.fix
    assert args.ds_preset == "auto+lora"


def test_a_trl_class_made_from_sft_is_not_taken_for_it() -> None:
    gkd = type("GKDConfig", (trl.SFTConfig,), {"__module__": "trl.experimental.gkd"})
    assert auto.trl_config(object.__new__(gkd)) == "GKDConfig"
    assert auto.trl_config(object.__new__(trl.SFTConfig)) == "SFTConfig"
    assert auto.trl_config(object.__new__(TrainingArguments)) is None


def test_what_does_not_fit_is_a_problem_that_names_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(config("32b")), encoding="utf-8")
    card = parse_machine("1xL4").gpus
    monkeypatch.setattr(auto, "detect", lambda: Machine(gpus=card, cpu_count=8, ram_bytes=2**36))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    choice = auto.choose(arguments(), launched(1), "cuda", ["--model", str(tmp_path)])
    (problem,) = choice.problems
    assert "Nothing fits" in problem.what
    assert "qlora on the same machine" in problem.fix
    assert "of host RAM" in problem.fix


@pytest.mark.parametrize("cls", [TrainingArguments, trl.SFTConfig])
def test_real_arguments_take_auto_on_a_cpu(cls: type, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    args = enter(tmp_path, cls, ds_preset=f"auto:{model}")
    assert args.ds_preset == "none"
    assert args.gradient_checkpointing is False


def test_real_arguments_without_a_model_refuse_auto_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto:MODEL"):
        enter(tmp_path, TrainingArguments, ds_preset="auto")


# -- predicted against measured


def predicted(preset: str = "zero2", micro: int = 8, *, recompute: bool = False) -> forecast.Forecast:
    machine = parse_machine("1xH200")
    setup = Setup(
        shape=shape("1.7b"),
        preset=get_preset(preset),
        world=1,
        micro=micro,
        length=8192,
        recompute=recompute,
    )
    rates = cards.rates_of("H200")
    return forecast.Forecast(
        setup=setup,
        machine=machine,
        rates=rates,
        footprint=gpu_footprint(setup),
        host=host_footprint(setup),
        step=step_time(setup, rates),
    )


def test_the_end_of_a_run_says_predicted_and_measured() -> None:
    found = predicted()
    peak = found.footprint.peak / 2**30
    lines = forecast.comparison(
        found, {"gpu_peak_allocated_gib": peak / 1.1, "host_peak_all_gib": 3.0, "median_step_seconds": 1.0}
    )
    assert len(lines) == 3
    assert lines[0].startswith("GPU peak: predicted")
    assert lines[0].endswith("(+10 %)")


def test_the_end_of_a_run_holds_each_moment_against_its_own_prediction() -> None:
    found = predicted(recompute=True)
    said = forecast.moments(found)
    allocated = found.footprint.allocated
    assert said["before training"] == max(allocated["load"], allocated["init"])
    assert said["steps"] == found.footprint.peak
    assert said["between steps"] < allocated["optimizer"] <= said["steps"]
    parts = found.footprint.parts["optimizer"]
    assert said["between steps"] == parts["weights"] + parts["optimizer"], "ZeRO-2 lets go of gradients"
    kept = predicted("zero3").footprint.parts["optimizer"]["gradients"]
    assert forecast.moments(predicted("zero3"))["between steps"] > kept > 0
    phases = {name: {"allocated_gib": size / 2**30 / 1.25, "host_gib": 1.0} for name, size in said.items()}
    lines = forecast.comparison(found, {"phases": {**phases, "end": {"host_gib": 1.0}}})
    assert [line.partition(":")[0] for line in lines] == [f"GPU {words}" for words in forecast.WORDS.values()]
    assert all(line.endswith("(+25 %)") for line in lines)
    assert found.as_record()["gpu_bytes_as_measured"] == said


def test_out_of_memory_is_answered_with_less_memory_for_the_same_batch() -> None:
    found = predicted()
    text = forecast.out_of_memory_advice(found, "CUDA out of memory. Tried to allocate 2 GiB")
    assert "Tried to allocate 2 GiB" in text
    assert "--gradient_checkpointing true" in text or "--per_device_train_batch_size" in text
    assert "the same batch" in text


def test_out_of_memory_without_a_forecast_still_has_advice() -> None:
    assert "--gradient_checkpointing true" in forecast.out_of_memory_advice(None, "")


def test_out_of_memory_with_nothing_smaller_names_what_would_fit() -> None:
    """LoRA with recompute and one sequence at a time on a card that is too small for it."""
    small = dataclasses.replace(parse_machine("1xL4"), ram_bytes=16 * 2**30)
    found = dataclasses.replace(predicted("lora", 1, recompute=True), machine=small)
    found = dataclasses.replace(found, setup=dataclasses.replace(found.setup, shape=shape("14b"), length=4096))
    found = dataclasses.replace(found, footprint=gpu_footprint(found.setup))
    text = forecast.out_of_memory_advice(found, "CUDA out of memory")
    assert "Nothing smaller fits; what would: " in text
    assert "qlora" in text


def test_an_out_of_memory_error_of_training_becomes_the_plans_advice_and_the_engine_is_stopped() -> None:
    """What `attach` puts around `trainer.train`."""
    found, stopped = predicted(), []
    session = SimpleNamespace(features=frozenset(), forecast=found, stop_engine=lambda: stopped.append(True))

    def train() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    explained = Session._explaining_memory(session, train)  # type: ignore[arg-type]
    with pytest.raises(GpuMemoryError) as caught:
        explained()
    assert str(caught.value) == forecast.out_of_memory_advice(found, "CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "Start again with --" in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert stopped == [True]


def test_other_errors_of_training_stay_what_they_are() -> None:
    session = SimpleNamespace(features=frozenset(), forecast=None, stop_engine=lambda: None)

    def train() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        Session._explaining_memory(session, train)()  # type: ignore[arg-type]


def test_a_compiled_run_is_planned_without_what_it_goes_without() -> None:
    assert "whole_layers" in auto.features_of(arguments(), None)
    assert not {"whole_layers", "fused_adapters"} & auto.features_of(arguments(torch_compile=True), None)
