"""The formulas of activations equal what autograd saves for the real models, counted on fake tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen3Config

from hf_dsvllm.errors import ModelShapeError
from hf_dsvllm.model_shape import shape_from_config
from hf_dsvllm.planner.activations import Numerics, layer_bytes
from hf_dsvllm.trace import saved_bytes, trace_layers, traced_shape

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "pad_token_id": 0,
}
QWEN3, LLAMA = Qwen3Config(**SIZES), LlamaConfig(**SIZES)
LORA = {"lora_r": 8, "dropout": True}


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["qwen3", "llama"])
@pytest.mark.parametrize(
    ("numerics", "dtype", "autocast"),
    [
        (Numerics(method="full"), torch.bfloat16, False),
        (Numerics(method="full", weight_bytes=4, autocast=True), torch.float32, True),
        (Numerics(method="full", weight_bytes=4), torch.float32, False),
        (Numerics(method="lora", **LORA), torch.bfloat16, False),
        (Numerics(method="lora", autocast=True, adapter_bytes=4, **LORA), torch.bfloat16, True),
    ],
    ids=["bf16", "mixed", "fp32", "adapters in bf16", "adapters in fp32"],
)
def test_a_layer_saves_what_the_formula_says(config, numerics, dtype, autocast):
    counted = saved_bytes(config, dtype=dtype, autocast=autocast, lora_r=numerics.lora_r)
    assert counted == layer_bytes(shape_from_config(config.to_dict()), numerics)


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_frozen_layers_under_zero3_save_their_inputs_to_the_byte(config, monkeypatch):
    linear = pytest.importorskip("deepspeed.runtime.zero.linear")
    monkeypatch.setattr(torch.nn.functional, "linear", linear.zero3_linear_wrap)
    counted = saved_bytes(config, dtype=torch.bfloat16, lora_r=LORA["lora_r"])
    zero3 = Numerics(method="lora", keeps_inputs=True, **LORA)
    assert counted == layer_bytes(shape_from_config(config.to_dict()), zero3)


def test_a_qwen3_layer_in_bf16_is_the_sum_of_its_docstring():
    shape = shape_from_config(QWEN3.to_dict())
    h, q, k, i, heads, kv_heads = 256, 256, 128, 640, 4, 2
    expected = 16 * h + 10 * q + 10 * k + 8 * i + 8 + 8 * heads + 4 * kv_heads
    assert layer_bytes(shape, Numerics(method="full")) == expected


def test_a_model_without_formulas_is_counted_on_its_modules(tmp_path: Path):
    config = GPTNeoXConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=512
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelShapeError, match="gpt_neox"):
        shape_from_config(config.to_dict())
    from transformers import GPTNeoXForCausalLM

    with torch.device("meta"):
        real = sum(parameter.numel() for parameter in GPTNeoXForCausalLM(config).parameters())
    shape = traced_shape(str(tmp_path))
    assert shape.parameters == real
    assert (shape.layers, shape.hidden, shape.vocab) == (3, 64, 512)
    assert saved_bytes(config, dtype=torch.bfloat16) > 0


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelShapeError, match="no configuration"):
        traced_shape(str(tmp_path))


def test_layers_whose_weights_are_transposed_are_counted_and_attention_keeps_no_squares(tmp_path: Path):
    sizes = {"n_embd": 64, "n_head": 2, "n_layer": 3, "vocab_size": 512, "n_positions": 512}
    config = GPT2Config(**sizes)
    config.save_pretrained(tmp_path)
    shape = traced_shape(str(tmp_path))
    assert shape.linear_parameters == 3 * 12 * 64**2
    assert (shape.intermediate, shape.experts) == (256, 0)
    assert shape.parameters == 512 * 64 + 512 * 64 + 3 * (12 * 64**2 + 13 * 64) + 2 * 64
    without = GPT2Config(**sizes, attn_pdrop=0.0)
    assert saved_bytes(config, dtype=torch.bfloat16) == saved_bytes(without, dtype=torch.bfloat16)


def test_experts_are_found_on_the_model_and_adapters_leave_them_alone(tmp_path: Path):
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralConfig(**SIZES, **moe).save_pretrained(tmp_path)
    shape, formulas = traced_shape(str(tmp_path)), shape_from_config(MixtralConfig(**SIZES, **moe).to_dict())
    assert (shape.experts, shape.experts_per_token, shape.expert_intermediate) == (4, 2, 640)
    assert shape.parameters == formulas.parameters
    assert shape.expert_parameters == formulas.expert_parameters
    traced = trace_layers(str(tmp_path), lora_r=8)
    assert traced.full == pytest.approx(layer_bytes(formulas, Numerics(method="full")), rel=0.05)
    assert traced.full < traced.full_mixed
    assert 0 < traced.adapters < traced.full
