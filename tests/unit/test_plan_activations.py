"""The formulas of activations equal what autograd saves for the real models, counted on fake tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config

from hf_dsvllm.errors import ModelShapeError
from hf_dsvllm.model_shape import shape_from_config
from hf_dsvllm.planner.activations import Numerics, layer_bytes
from hf_dsvllm.trace import saved_bytes, traced_shape

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
