"""Parameters counted from a configuration equal those of the model that transformers builds from it."""

from __future__ import annotations

import json

import pytest

from hf_dsvllm.errors import ModelShapeError
from hf_dsvllm.model_shape import FAMILIES, ModelShape, UnknownModelError, load_shape, shape_from_config

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_MOE = {**TINY, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}
TINY_MOE |= {"num_experts": 6, "num_experts_per_tok": 2}
QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
CASES = {
    "llama": {"model_type": "llama", **TINY},
    "llama with biases, tied": {
        "model_type": "llama",
        **TINY,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama with wide heads": {"model_type": "llama", **TINY, "head_dim": 32},
    "mistral": {"model_type": "mistral", **TINY},
    "qwen2": {"model_type": "qwen2", **TINY},
    "qwen3": {"model_type": "qwen3", **TINY},
    "qwen3 with biases": {"model_type": "qwen3", **TINY, "head_dim": 32, "attention_bias": True},
    "gemma": {"model_type": "gemma", **TINY},
    "gemma2": {"model_type": "gemma2", **TINY, "head_dim": 32},
    "gemma3_text": {"model_type": "gemma3_text", **TINY, "head_dim": 32},
    "phi3": {"model_type": "phi3", **TINY},
    "smollm3": {"model_type": "smollm3", **TINY},
    "granite": {"model_type": "granite", **TINY},
    "mixtral": {"model_type": "mixtral", **TINY, "num_local_experts": 4},
    "qwen2_moe": {"model_type": "qwen2_moe", **TINY_MOE},
    "qwen2_moe with dense layers, no bias": {
        "model_type": "qwen2_moe",
        **TINY_MOE,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "qkv_bias": False,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **TINY_MOE, "head_dim": 32},
    "Qwen3-4B": QWEN3_4B,
    "Llama-3.1-8B": LLAMA_8B,
}


def config_of(fields: dict):
    """A transformers configuration from the fields of a config.json."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[fields["model_type"]](**{key: value for key, value in fields.items() if key != "model_type"})


def build(config):
    """The model on the meta device: shapes, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def kind_of(name: str) -> str:
    parts = name.split(".")
    for part, kind in (
        ("embed_tokens", "embedding"),
        ("lm_head", "lm_head"),
        ("experts", "experts"),
        ("q_norm", "norm"),
        ("k_norm", "norm"),
        ("self_attn", "attention"),
    ):
        if part in parts:
            return kind
    if parts[-3:] == ["mlp", "gate", "weight"]:
        return "experts"
    return "mlp" if "mlp" in parts else "norm"


@pytest.mark.parametrize("name", CASES)
def test_counts_equal_those_of_the_built_model(name, tmp_path):
    import torch

    config = config_of(CASES[name])
    model = build(config)
    shape = shape_from_config(CASES[name])

    by_kind = dict.fromkeys(shape.parameters_by_kind, 0)
    for parameter_name, parameter in model.named_parameters():
        by_kind[kind_of(parameter_name)] += parameter.numel()
    assert shape.parameters_by_kind == by_kind
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.largest_parameter == max(parameter.numel() for parameter in model.parameters())

    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inner = [module for path, module in linears.items() if path != "lm_head"]
    assert shape.linear_parameters == sum(module.weight.numel() for module in inner)
    assert shape.lora_parameters(4) == sum(4 * (module.in_features + module.out_features) for module in inner)

    config.save_pretrained(tmp_path)
    assert load_shape(tmp_path) == shape
    assert load_shape(tmp_path / "config.json") == shape


def test_every_family_is_compared_with_a_built_model():
    assert {fields["model_type"] for fields in CASES.values()} == set(FAMILIES)


NULL_ALLOWED = ("llama", "qwen2", "qwen3", "phi3", "granite")  # transformers refuses null elsewhere


@pytest.mark.parametrize(
    ("model_type", "given"),
    [*((name, "absent") for name in FAMILIES), *((name, "null") for name in NULL_ALLOWED)],
)
def test_key_value_heads_that_are_not_given_mean_what_transformers_means(model_type, given):
    fields = {**TINY_MOE, "model_type": model_type, "num_attention_heads": 32, "num_local_experts": 6}
    fields = {**fields, "num_key_value_heads": None} if given == "null" else without(fields, "num_key_value_heads")
    assert shape_from_config(fields).kv_heads == config_of(fields).num_key_value_heads


def test_real_models_have_their_published_sizes():
    assert shape_from_config(QWEN3_4B).parameters == 4_022_468_096
    assert shape_from_config(LLAMA_8B).parameters == 8_030_261_248


def test_lora_counts_equal_those_of_peft():
    from peft import LoraConfig, get_peft_model

    for targets in ("all-linear", ["q_proj", "v_proj"]):
        model = get_peft_model(build(config_of(CASES["llama"])), LoraConfig(r=8, target_modules=targets))
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert shape_from_config(CASES["llama"]).lora_parameters(8, targets) == trainable


def test_the_largest_matrix_is_the_embedding_of_a_small_model():
    shape = shape_from_config(QWEN3_4B)
    assert shape.largest_matrix == 151936 * 2560
    assert shape_from_config({**QWEN3_4B, "vocab_size": 100}).largest_matrix == 2560 * 9728


def without(fields: dict, *names: str) -> dict:
    return {key: value for key, value in fields.items() if key not in names}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({**TINY, "model_type": "mamba"}, "model_type 'mamba' is not known"),
        (TINY, "model_type None"),
        ({"model_type": "gemma3", "text_config": {}}, "multimodal"),
        (without(LLAMA_8B, "hidden_size"), "no hidden_size"),
        (without(LLAMA_8B, "vocab_size"), "no vocab_size"),
        (without(CASES["mixtral"], "num_local_experts"), "no num_local_experts"),
        ({**LLAMA_8B, "num_hidden_layers": "32"}, "num_hidden_layers='32'"),
        ({**LLAMA_8B, "num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({**LLAMA_8B, "num_attention_heads": 30}, "not divisible"),
    ],
)
def test_a_configuration_that_cannot_be_counted_names_the_field(fields, part):
    with pytest.raises(ModelShapeError, match=part):
        shape_from_config(fields)


def test_lora_targets_must_exist():
    shape: ModelShape = shape_from_config(CASES["phi3"])
    with pytest.raises(ModelShapeError, match=r"no linear module called q_proj; use .*qkv_proj"):
        shape.lora_parameters(8, ["q_proj"])
    with pytest.raises(ModelShapeError, match="r=0"):
        shape.lora_parameters(0)


def test_a_source_without_configuration_is_a_clear_error(tmp_path, monkeypatch):
    with pytest.raises(ModelShapeError, match=r"holds no config\.json"):
        load_shape(tmp_path)
    with pytest.raises(ModelShapeError, match="no model folder"):
        load_shape(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelShapeError, match="cannot be read as JSON"):
        load_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelShapeError, match="a JSON list"):
        load_shape(tmp_path)


def test_a_hub_that_does_not_answer_is_a_clear_error(monkeypatch):
    import huggingface_hub

    def refuse(*arguments: object, **options: object) -> str:
        raise ConnectionError("no route to the hub\ndetails")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ModelShapeError, match=r"ConnectionError: no route to the hub\)"):
        load_shape("org/model")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({**LLAMA_8B, "num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({**LLAMA_8B, "num_key_value_heads": 64}, "num_key_value_heads=64"),
        ({**CASES["mixtral"], "num_experts_per_tok": 99}, "num_experts_per_tok=99 is more than the 4 experts"),
        ({**CASES["qwen2_moe"], "mlp_only_layers": 5}, "mlp_only_layers=5"),
        ({**CASES["qwen2_moe"], "mlp_only_layers": "abc"}, "mlp_only_layers='abc'"),
        ({**LLAMA_8B, "tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({**LLAMA_8B, "hidden_size": 10**12}, "hidden_size=1000000000000"),
    ],
)
def test_sizes_that_cannot_be_together_are_refused(fields, part):
    with pytest.raises(ModelShapeError, match=part):
        shape_from_config(fields)


def test_every_field_that_is_missing_or_wrong_is_named_at_once():
    fields = {**without(LLAMA_8B, "hidden_size", "vocab_size"), "num_hidden_layers": "32", "max_position_embeddings": 0}
    with pytest.raises(ModelShapeError) as caught:
        shape_from_config(fields)
    for part in ("no hidden_size, vocab_size", "num_hidden_layers='32'", "max_position_embeddings=0"):
        assert part in str(caught.value)


def test_an_architecture_without_formulas_is_told_from_a_broken_file():
    with pytest.raises(UnknownModelError) as caught:
        shape_from_config({**TINY, "model_type": "gpt2"})
    assert caught.value.model_type == "gpt2"
    with pytest.raises(ModelShapeError) as broken:
        shape_from_config(without(LLAMA_8B, "hidden_size"))
    assert not isinstance(broken.value, UnknownModelError)
