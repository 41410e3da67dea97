"""LoRA and QLoRA settings as TRL's own flags would give them, and what vLLM or the engine could not take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_dsvllm import adapters
from hf_dsvllm.adapters import (
    adapter_problems,
    apply_to_model_config,
    full_dtype,
    quant_storage,
    training_dtype,
    trl_flags,
    why_merge_for_engine,
    wrap,
)
from hf_dsvllm.presets import every_preset, get_preset

WITH_ADAPTER = [preset.name for preset in every_preset() if preset.adapter] + ["zero3+lora", "zero2_offload+qlora"]


def settled(name: str, device: str = "cuda", training: str = "bfloat16", **given: Any) -> ModelConfig:
    preset = get_preset(name)
    config = ModelConfig(model_name_or_path="m", **given)
    apply_to_model_config(config, preset, device=device, full_dtype=full_dtype(preset, device, training))
    return config


@pytest.mark.parametrize("name", WITH_ADAPTER)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("training", ["bfloat16", "float16"])
def test_a_preset_equals_the_trl_flags_it_shows(name: str, device: str, training: str) -> None:
    flags = ["--model_name_or_path", "m", *trl_flags(get_preset(name), device, training)]
    (by_flags,) = HfArgumentParser(ModelConfig).parse_args_into_dataclasses(flags)
    ours, theirs = dataclasses.asdict(settled(name, device, training)), dataclasses.asdict(by_flags)
    if get_preset(name).adapter == "lora":
        ours.pop("bnb_4bit_quant_storage"), theirs.pop("bnb_4bit_quant_storage")
    assert ours == theirs


def mixture(folder: Path) -> str:
    """A mixture of two experts, its configuration alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8, "vocab_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen3MoeConfig(**sizes, **heads, num_experts=2, num_experts_per_tok=1).save_pretrained(folder)
    return str(folder)


def test_adapters_on_fused_experts_have_no_dropout_which_peft_would_refuse(tmp_path: Path) -> None:
    preset = get_preset("lora")
    config = ModelConfig(model_name_or_path=mixture(tmp_path))
    fixes = apply_to_model_config(config, preset, device="cpu", full_dtype="float32")
    assert "lora_dropout" in [fix.key for fix in fixes]
    assert adapter_problems(config, preset, stage=preset.zero_stage) == []
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_pretrained(tmp_path))
    args = SimpleNamespace(deepspeed=None, gradient_checkpointing=False, bf16=False)
    assert any("experts" in name for name, _ in wrap(model, get_peft_config(config), args).named_parameters())


def test_dropout_asked_for_on_fused_experts_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    preset = get_preset("lora")
    config = ModelConfig(model_name_or_path=mixture(tmp_path), lora_dropout=0.1)
    apply_to_model_config(config, preset, device="cpu", full_dtype="float32")
    (problem,) = adapter_problems(config, preset, stage=preset.zero_stage)
    assert "--lora_dropout 0" in problem.fix
    config.lora_target_modules = ["q_proj", "v_proj"]
    assert adapter_problems(config, preset, stage=preset.zero_stage) == []


def test_a_preset_without_adapter_shows_no_flags() -> None:
    assert trl_flags(get_preset("zero2"), "cuda") == []


@pytest.mark.parametrize(("preset", "storage"), [("qlora", torch.uint8), ("qlora_zero2", torch.uint8),
                                                 ("qlora_zero3", torch.bfloat16)])  # fmt: skip
def test_qlora_is_nf4_double_quantised_computing_in_bf16_on_all_linear_layers(
    preset: str, storage: torch.dtype
) -> None:
    config = settled(preset)
    quantization = get_quantization_config(config)
    assert quantization.load_in_4bit
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant
    assert quantization.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization.bnb_4bit_quant_storage == storage
    assert get_peft_config(config).target_modules == "all-linear"


def test_what_the_user_set_is_kept() -> None:
    config = settled("qlora", lora_target_modules=["q_proj", "v_proj"], lora_r=4, bnb_4bit_quant_storage="bfloat16")
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert (config.lora_r, config.bnb_4bit_quant_storage) == (4, "bfloat16")
    assert settled("lora", dtype="float16").dtype == "float16"


def test_an_automatic_dtype_is_settled_for_4_bit_weights_alone() -> None:
    config = settled("qlora", dtype="auto")
    assert get_quantization_config(config).bnb_4bit_compute_dtype == torch.bfloat16
    assert settled("qlora_zero3", dtype="auto").bnb_4bit_quant_storage == "bfloat16"
    assert settled("lora", dtype="auto").dtype == "auto"


def test_a_preset_without_adapter_changes_the_dtype_alone() -> None:
    changed = dataclasses.asdict(settled("zero2"))
    plain = dataclasses.asdict(ModelConfig(model_name_or_path="m"))
    assert {name for name in plain if plain[name] != changed[name]} <= {"dtype"}


def test_every_change_says_why() -> None:
    preset = get_preset("qlora_zero3")
    fixes = apply_to_model_config(ModelConfig(), preset, device="cuda", full_dtype="bfloat16")
    assert {fix.key for fix in fixes} >= {"use_peft", "lora_target_modules", "load_in_4bit", "use_bnb_nested_quant"}
    assert all(fix.why for fix in fixes)
    assert apply_to_model_config(ModelConfig(), get_preset("none"), device="cpu", full_dtype="float32") == []


@pytest.mark.parametrize(
    ("preset", "device", "dtype"),
    [
        ("none", "cuda", "float32"),
        ("ddp", "cuda", "float32"),
        ("lora", "cuda", "bfloat16"),
        ("zero2", "cuda", "bfloat16"),
        ("qlora_zero3", "cuda", "bfloat16"),
        ("zero2", "cpu", "float32"),
        ("qlora", "cpu", "float32"),
    ],
)
def test_the_dtype_a_model_is_loaded_in(preset: str, device: str, dtype: str) -> None:
    assert full_dtype(get_preset(preset), device) == dtype


@pytest.mark.parametrize(
    ("preset", "device", "training", "dtype"),
    [
        ("ddp", "cuda", "float16", "float32"),
        ("lora", "cuda", "float16", "float16"),
        ("lora", "cuda", "float32", "bfloat16"),
        ("zero2", "cuda", "float16", "float16"),
        ("zero2", "cuda", "float32", "float32"),
        ("qlora_zero3", "cpu", "float16", "float32"),
    ],
)
def test_the_dtype_of_training_is_that_of_loading_under_deepspeed(
    preset: str, device: str, training: str, dtype: str
) -> None:
    assert full_dtype(get_preset(preset), device, training) == dtype


@pytest.mark.parametrize(("stage", "storage"), [(None, "uint8"), (0, "uint8"), (2, "uint8"), (3, "bfloat16")])
def test_four_bit_weights_are_stored_in_what_the_stage_leaves_intact(stage: int | None, storage: str) -> None:
    assert quant_storage(stage, "bfloat16") == storage


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"lora_r": 1024}, "lora_r=1024 is above vLLM's largest rank, 512"),
        ({"use_dora": True}, "vLLM refuses DoRA"),
        ({"lora_modules_to_save": ["lm_head"]}, "vLLM refuses modules_to_save"),
        ({"lora_target_parameters": ["mlp.experts.gate_up_proj"]}, "vLLM refuses lora_target_parameters"),
    ],
)
def test_an_adapter_vllm_would_refuse_reaches_it_merged(given: dict[str, Any], why: str) -> None:
    assert why_merge_for_engine(settled("lora", **given), "cuda") == why


def test_a_plain_adapter_is_hot_loaded_on_gpus_and_merged_on_cpus() -> None:
    assert why_merge_for_engine(settled("lora"), "cuda") is None
    assert "slower on CPUs" in str(why_merge_for_engine(settled("lora"), "cpu"))


@pytest.mark.parametrize(("preset", "storage", "accepted"), [
    ("qlora_zero2", "float16", False), ("qlora_zero2", "float32", False), ("qlora_zero2", "bfloat16", True),
    ("qlora_zero3", "uint8", False), ("qlora_zero3", "bfloat16", True), ("qlora", "float16", True),
])  # fmt: skip
def test_a_storage_dtype_the_engine_would_break_is_refused(preset: str, storage: str, accepted: bool) -> None:
    config = settled(preset, bnb_4bit_quant_storage=storage)
    problems = adapter_problems(config, get_preset(preset), stage=get_preset(preset).zero_stage)
    assert (problems == []) == accepted
    assert all(f"bnb_4bit_quant_storage={storage}" in problem.what for problem in problems)


def test_training_in_fp16_stores_and_computes_4_bit_weights_in_fp16() -> None:
    args = SimpleNamespace(fp16=True, bf16=False)
    training = training_dtype(args)
    config = settled("qlora_zero3", training=training)
    assert (config.dtype, config.bnb_4bit_quant_storage) == ("float16", "float16")
    assert adapter_problems(config, get_preset("qlora_zero3"), stage=3, training=training) == []
    assert settled("qlora", training=training).bnb_4bit_quant_storage == "uint8", "which nothing casts"


@pytest.mark.parametrize("preset", ["qlora_zero3", None])
def test_storage_in_another_dtype_than_that_of_training_is_refused_whatever_the_models(preset: str | None) -> None:
    config = settled("qlora_zero3", bnb_4bit_quant_storage="bfloat16", dtype="bfloat16")
    known = None if preset is None else get_preset(preset)
    (problem,) = adapter_problems(config, known, stage=3, training="float16")
    assert "bnb_4bit_quant_storage=bfloat16 while training in float16" in problem.what
    assert problem.fix == "bnb_4bit_quant_storage=float16"


def test_the_storage_follows_the_training_dtype_where_the_model_is_asked_for_in_another() -> None:
    assert settled("qlora_zero3", dtype="float16").bnb_4bit_quant_storage == "bfloat16"


@pytest.mark.parametrize(
    ("fp16", "bf16", "dtype"),
    [(True, False, "float16"), (False, True, "bfloat16"), (False, None, "bfloat16"), (True, None, "float16"),
     (False, False, "float32")],
)  # fmt: skip
def test_the_dtype_of_training_is_what_the_arguments_say(fp16: bool, bf16: bool | None, dtype: str) -> None:
    assert training_dtype(SimpleNamespace(fp16=fp16, bf16=bf16)) == dtype


def test_four_bit_training_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    (problem,) = adapter_problems(settled("qlora"), get_preset("qlora"), stage=None)
    assert problem.fix == "pip install bitsandbytes"


def tiny_model(dtype: torch.dtype) -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1, num_key_value_heads=1)).to(dtype)


@pytest.mark.parametrize(("preset", "dtype"), [("lora", torch.float32), ("lora_zero2", torch.float32),
                                               ("zero3+lora", torch.bfloat16)])  # fmt: skip
def test_adapters_have_one_dtype_with_the_model_under_zero3_and_train_in_fp32_elsewhere(
    preset: str, dtype: torch.dtype
) -> None:
    stage = get_preset(preset).zero_stage
    args = SimpleNamespace(
        deepspeed=None if stage is None else {"zero_optimization": {"stage": stage}},
        gradient_checkpointing=False,
        gradient_checkpointing_kwargs=None,
        bf16=True,
    )
    model = wrap(tiny_model(torch.bfloat16), get_peft_config(settled(preset)), args)
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {dtype}
    assert sum(1 for module in model.modules() if hasattr(module, "lora_A")) == 7


def test_checkpointing_of_a_frozen_model_is_reentrant_under_zero3_and_keeps_gradients() -> None:
    args = SimpleNamespace(
        deepspeed={"zero_optimization": {"stage": 3}},
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=None,
        bf16=False,
    )
    model = wrap(tiny_model(torch.float32), get_peft_config(settled("zero3+lora", "cpu")), args)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}
    embedded = model.get_input_embeddings()(torch.tensor([[1, 2]]))
    assert embedded.requires_grad


def test_a_16_bit_model_has_no_quantization_record(tmp_path: Path) -> None:
    assert adapters.quantization_record(tiny_model(torch.float32)) is None


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_the_dtype_on_record_is_the_one_the_frozen_weights_have(asked: str) -> None:
    args = SimpleNamespace(deepspeed=None, gradient_checkpointing=False, gradient_checkpointing_kwargs=None, bf16=True)
    settings = settled("lora")
    settings.dtype = asked
    inner = tiny_model(torch.bfloat16)
    inner.model.norm.float()  # some parts are kept in fp32
    adapted = wrap(inner, get_peft_config(settings), args)
    assert adapters.dtype_in_training(adapted, settings) == "bfloat16"
    assert adapters.dtype_in_training(tiny_model(torch.float32), settings) == "float32", "of a model trained whole"


def test_the_dtype_on_record_of_a_4_bit_model_is_the_one_it_was_read_in() -> None:
    model = tiny_model(torch.float32)
    model.is_loaded_in_4bit = True
    model.config.dtype = torch.float16
    assert adapters.dtype_in_training(model, ModelConfig(dtype="auto")) == "float16"
    assert adapters.dtype_in_training(model, ModelConfig(dtype="bfloat16")) == "bfloat16"
