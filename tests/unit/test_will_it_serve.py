"""Which adapters vLLM loads as they are, which are rewritten or merged for it, and which no evaluation can serve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_dsvllm.export.adapter_format import servable_adapter, serving_problems, why_merge_live, will_it_serve
from hf_dsvllm.export.merged_copy import merged_copy, same_shape
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


def adapted(base: Path, **given: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | given)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


@pytest.mark.parametrize(
    ("given", "how", "why"),
    [
        ({}, "hot-load", "as it is"),
        ({"use_rslora": True}, "hot-load", "as it is"),
        ({"init_lora_weights": "gaussian"}, "hot-load", "as it is"),
        ({"rank_pattern": {"q_proj": 8}}, "rewrite", "ignores rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "rewrite", "ignores alpha_pattern"),
        ({"use_dora": True}, "merge", "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "merge", "modules_to_save=['lm_head']"),
        ({"bias": "all"}, "merge", "bias='all'"),
        ({"trainable_token_indices": [5]}, "merge", "trained tokens"),
        ({"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}, "merge", "target_parameters"),
        ({"r": 513}, "merge", "rank 513"),
        ({"rank_pattern": {"q_proj": 1024}}, "merge", "rank 1024"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "merge", "embeddings and output head"),
        ({"target_modules": ["q_proj", "lm_head"]}, "merge", "embeddings and output head"),
        ({"lora_bias": True}, "refuse", "lora_bias"),
        ({"init_lora_weights": "pissa"}, "refuse", "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "refuse", "init_lora_weights='olora'"),
        ({"alora_invocation_tokens": [5, 6]}, "refuse", "alora_invocation_tokens"),
    ],
)
def test_every_setting_of_lora_has_its_way(given: dict[str, Any], how: str, why: str, base: Path) -> None:
    model = adapted(base, **given)
    serving = will_it_serve(model.peft_config["default"], model)
    assert (serving.how, why in serving.why) == (how, True), serving
    assert bool(serving.fix) == (how == "refuse")
    assert [problem.fix for problem in serving_problems(model)] == ([serving.fix] if how == "refuse" else [])


def test_a_saved_configuration_is_judged_like_the_live_one(base: Path, tmp_path: Path) -> None:
    for given in ({}, {"use_dora": True}, {"rank_pattern": {"q_proj": 8}}):
        model = adapted(base, **given)
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        assert will_it_serve(saved) == will_it_serve(model.peft_config["default"])


def test_other_methods_and_several_adapters_are_refused_with_what_to_change(base: Path) -> None:
    other = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    (problem,) = serving_problems(get_peft_model(AutoModelForCausalLM.from_pretrained(base), other))
    assert "peft_type=IA3 is not LoRA" in problem.what
    several = adapted(base)
    several.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    (problem,) = serving_problems(several)
    assert "2 adapters ('default', 'second')" in problem.what
    assert serving_problems(AutoModelForCausalLM.from_pretrained(base)) == []


def test_layers_beside_the_language_model_are_merged(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.vision_tower = torch.nn.Linear(8, 8)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "vision_tower"]))
    serving = will_it_serve(wrapped.peft_config["default"], wrapped)
    assert (serving.how, "vision_tower" in serving.why) == ("merge", True)


def test_an_even_adapter_is_served_from_its_own_folder(base: Path, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "step-1")
    assert servable_adapter(tmp_path / "step-1", tmp_path / "out") == tmp_path / "step-1"
    assert not (tmp_path / "out").exists()


def test_patterns_become_one_rank_with_the_scales_in_the_weights(base: Path, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 2}, "use_rslora": True}
    for step in (1, 2, 3):
        model = adapted(base, lora_alpha=16, init_lora_weights=False, **patterns)
        model.save_pretrained(tmp_path / f"step-{step}")
        served = servable_adapter(tmp_path / f"step-{step}", tmp_path / "out")
        os.utime(served, (step, step))
        tensors = load_file(served / "adapter_model.safetensors")
        config = json.loads((served / "adapter_config.json").read_text(encoding="utf-8"))
        assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (8, 8, False, {})
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                delta = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
                torch.testing.assert_close(delta, module.get_delta_weight("default"), atol=1e-5, rtol=1e-5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["step-2", "step-3"]


def test_weights_that_a_running_engine_would_leave_out_are_known_by_their_configuration(
    base: Path, tmp_path: Path
) -> None:
    head = adapted(base, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    head.save_pretrained(tmp_path / "head")
    adapted(base, init_lora_weights=False).save_pretrained(tmp_path / "plain")
    untied = merged_copy(base, tmp_path / "head", tmp_path / "untied", dtype=torch.float32)
    tied = merged_copy(base, tmp_path / "plain", tmp_path / "tied", dtype=torch.float32)
    assert not same_shape(untied, base)
    assert same_shape(tied, base)


def test_a_scripts_own_adapters_are_merged_where_the_engine_was_not_started_for_them(base: Path) -> None:
    assert why_merge_live(adapted(base), 4) is None
    assert why_merge_live(adapted(base, rank_pattern={"q_proj": 8}), 5) is None, "5 is rounded up to 8"
    assert "rank 9" in str(why_merge_live(adapted(base, rank_pattern={"q_proj": 9}), 5))
    assert "rank 4" in str(why_merge_live(adapted(base), None))
    assert "bias='all'" in str(why_merge_live(adapted(base, bias="all"), 4))
    assert why_merge_live(AutoModelForCausalLM.from_pretrained(base), None) is None
