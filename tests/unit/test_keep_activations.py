"""Recompute is left out where the planner says that it may be, and a batch is split where that costs no precision."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.door import enter
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("features") / "model"))


def keep(
    monkeypatch: pytest.MonkeyPatch,
    *,
    card: str = "1xH200",
    device: str = "cuda",
    preset: str = "zero2",
    use_dora: bool = False,
    sums: bool = False,
    **changed: Any,
) -> Any:
    """`auto.keep_activations` for a full fine-tune of a 1.7B shape on a named machine, and the arguments after it."""
    from hf_dsvllm import auto
    from hf_dsvllm.hardware import parse_machine
    from hf_dsvllm.model_shape import shape_from_config
    from hf_dsvllm.planner.cards import rates_of
    from hf_dsvllm.presets import get_preset

    config = {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    monkeypatch.setattr(auto, "detect", lambda: parse_machine(card))
    monkeypatch.setattr(auto, "machine_rates", lambda _: rates_of("H200"))
    monkeypatch.setattr(
        auto, "load_shape", lambda _, revision: shape_from_config(config | {"tie_word_embeddings": True})
    )

    class SFTConfig(SimpleNamespace):
        """By the name that tells supervised fine-tuning from other losses."""

        __module__ = "trl.trainer.sft_config"

    hf_config = SimpleNamespace(config={"train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 1})
    base = {
        "hf_deepspeed_config": hf_config,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_length": 2048,
        "ds_speed": None,
        "label_smoothing_factor": 0.0,
        "torch_compile": False,
        "dataloader_drop_last": False,
    }
    base |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": None, "activation_offloading": False}
    asked = {"gen_eval_file": None, "gen_eval_lm_eval": None, "gen_eval_max_new_tokens": 256}
    asked |= {"gen_eval_weights": "disk", "optim": "adamw_torch_fused", "optim_args": None}
    args = SFTConfig(**(base | asked | changed))
    model = SimpleNamespace(model_name_or_path="model", model_revision="main", lora_r=16, use_dora=use_dora)
    settle = auto.sum_gradients if sums else auto.keep_activations
    return args, settle(args, model, get_preset(preset), device)


def test_recompute_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--gradient_checkpointing", "true"])
    args, fixes = keep(monkeypatch)
    assert (args.gradient_checkpointing, fixes) == (True, [])


def test_prepare_keeps_activations_of_a_model_that_no_command_line_names(
    model_path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the README's script, or with --config: the model is known from `ModelConfig` alone."""
    from trl import ModelConfig, SFTConfig

    from hf_dsvllm import auto, prepare
    from hf_dsvllm.hardware import parse_machine

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(auto, "detect", lambda: parse_machine("1xH200"))
    real = auto.keep_activations
    monkeypatch.setattr("hf_dsvllm.session.keep_activations", lambda *given: real(*given[:-1], "cuda"))
    args = enter(tmp_path, SFTConfig, ds_preset="lora")
    assert args.gradient_checkpointing is True
    prepare(args, ModelConfig(model_name_or_path=model_path))
    assert args.gradient_checkpointing is False
    assert "gradient_checkpointing: True → False (the planner predicts" in capsys.readouterr().err


def test_activations_are_kept_where_they_fit_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    args, (fix,) = keep(monkeypatch)
    assert args.gradient_checkpointing is False
    assert "51.1 GiB" in str(fix)  # 51.5 were measured (benchmarks/planner/results)


@pytest.mark.parametrize(
    "changed",
    [
        {"card": "1xA100-40GB"},
        {"device": "cpu"},
        {"max_length": None},
        {"ds_speed": ["no_keep_activations"]},
        {"gradient_checkpointing_kwargs": {"selective": True}},
        {"activation_offloading": True},
        {"per_device_train_batch_size": 32, "ds_speed": ["no_split_batch"]},
        {"per_device_train_batch_size": 32, "dataloader_drop_last": True},
        {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 12, "ds_speed": ["no_split_batch"]},
        {"preset": "lora", "use_dora": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_recompute_stays_where_memory_the_user_or_the_formulas_ask_for_it(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    args, fixes = keep(monkeypatch, **changed)
    assert args.gradient_checkpointing is True
    assert fixes == []


def test_a_batch_of_qlora_is_not_split_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL trains its adapters in bf16, so that is what their gradients would be added up in."""
    batch = {"preset": "qlora", "card": "1xH100-80GB", "per_device_train_batch_size": 64}
    args, _ = keep(monkeypatch, **batch)
    assert (args.per_device_train_batch_size, args.gradient_checkpointing) == (64, True)
    args, _ = keep(monkeypatch, **batch, ds_speed=["split_batch"])
    assert (args.per_device_train_batch_size < 64, args.gradient_checkpointing) == (True, False)


SPLIT = {"per_device_train_batch_size": 32}


def test_a_batch_that_does_not_fit_is_split_instead_of_recomputed_and_stays_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args, fixes = keep(monkeypatch, **SPLIT)
    micro, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    assert args.gradient_checkpointing is False
    assert (micro * steps, micro < 32, steps > 1) == (32, True, True)
    assert args.hf_deepspeed_config.config == {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    assert [fix.key for fix in fixes] == [
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    ]  # fmt: skip
    assert "tokens/s instead of" in str(fixes[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"card": "1xA100-40GB"},
        {"ds_speed": ["no_split_batch"]},
        {"preset": "zero3"},
        {"argv": ["t.py", "--gradient_accumulation_steps", "1"]},
    ],
    ids=["nothing fits", "left out", "gradients added up in bf16", "accumulation given"],
)
def test_a_batch_is_not_split_without_need_and_leave(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    monkeypatch.setattr("sys.argv", changed.get("argv", ["t.py"]))
    args, fixes = keep(monkeypatch, **SPLIT | {name: value for name, value in changed.items() if name != "argv"})
    assert (args.per_device_train_batch_size, args.gradient_checkpointing, fixes) == (32, True, [])


def test_label_smoothing_needs_all_logits_and_is_planned_so(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"per_device_train_batch_size": 12, "ds_speed": ["no_split_batch"]}
    args, _ = keep(monkeypatch, **batch)
    assert args.gradient_checkpointing is False  # the same batch without smoothing fits


def test_compiled_layers_are_planned_as_pefts_own() -> None:
    from hf_dsvllm.auto import features_of

    args, model = SimpleNamespace(ds_speed=None, torch_compile=True), SimpleNamespace(use_dora=False)
    assert "fused_adapters" not in features_of(args, model)
    args.torch_compile = False
    assert {"fused_adapters", "lean_adapters"} <= features_of(args, model)
    model.use_dora = True
    assert not {"fused_adapters", "lean_adapters"} & features_of(args, model)


def test_a_trainer_that_is_there_keeps_the_batch_it_was_made_with(
    model_path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trl import ModelConfig, SFTConfig

    from hf_dsvllm import prepare

    def never(*_: Any) -> Any:
        raise AssertionError("the arguments are written too late")

    monkeypatch.setattr("hf_dsvllm.session.keep_activations", never)
    args = enter(tmp_path, SFTConfig, ds_preset="lora")
    prepare(args, ModelConfig(model_name_or_path=model_path), constructed=True)


def test_gradients_are_summed_on_the_gpu_where_that_fits_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args, (fix,) = keep(monkeypatch, sums=True, preset="zero2_offload", gradient_accumulation_steps=8)
    assert args.ds_speed == ["gpu_gradients"]
    assert str(fix).startswith("ds_speed: None → ['gpu_gradients'] (the planner predicts")
    args, _ = keep(monkeypatch, sums=True, preset="zero2_offload", gradient_accumulation_steps=8, ds_speed=["no_fused"])
    assert args.ds_speed == ["no_fused", "gpu_gradients"]


@pytest.mark.parametrize(
    "changed",
    [
        {"card": "1xA100-40GB", "max_length": 32768},
        {"device": "cpu"},
        {"max_length": None},
        {"preset": "zero2"},
        {"preset": "zero3_nvme"},
        {"gradient_accumulation_steps": 1},
        {"ds_speed": ["no_gpu_gradients"]},
        {"ds_speed": ["none"]},
        {"ds_speed": ["gpu_gradients"]},
    ],
)
def test_gradients_stay_where_they_are_otherwise(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    given = {"preset": "zero2_offload", "gradient_accumulation_steps": 8} | changed
    args, fixes = keep(monkeypatch, sums=True, **given)
    assert (args.ds_speed, fixes) == (changed.get("ds_speed"), [])
