"""Live tensors under the names and with the values a checkpoint of the (merged) model has, or a reason why not."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_dsvllm.live.sources import plain_source
from hf_dsvllm.live.stream import stream, why_no_stream


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def experts() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2))


def adapted(model: Any, **settings: Any) -> Any:
    """The model with random adapters that change something."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings)))
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def streamed(model: Any, *, merge_adapters: bool = False, bucket_bytes: int = 1 << 30) -> dict[str, torch.Tensor]:
    buckets = stream(model, dtype=torch.float32, bucket_bytes=bucket_bytes, merge_adapters=merge_adapters)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_rslora": True, "bias": "all"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["down_proj"], "modules_to_save": ["norm"]},
    ],
)
def test_merged_adapters_are_what_peft_merges(settings: dict[str, Any]) -> None:
    model = adapted(llama(attention_bias=True), **settings)
    found = streamed(model, merge_adapters=True)
    assert equal(found, dict(model.merge_and_unload().state_dict()))


def test_adapted_layers_that_are_one_operation_are_merged_as_well() -> None:
    from hf_dsvllm.low_rank import FusedLinear, fuse, why_not_fused

    model = adapted(llama(), target_modules="all-linear")
    for module in model.modules():
        if hasattr(module, "lora_A") and why_not_fused(module) is None:
            fuse(module)
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 21
    assert why_no_stream(model, merge_adapters=True) is None
    found = streamed(model, merge_adapters=True)
    assert equal(found, dict(model.merge_and_unload().state_dict()))


def test_without_merging_the_frozen_base_comes_out_as_it_was() -> None:
    plain = {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    model = adapted(llama(), target_modules="all-linear", modules_to_save=["lm_head"])
    assert equal(streamed(model), plain)
    assert not equal(streamed(model, merge_adapters=True), plain)


def test_fused_experts_come_out_one_by_one_as_in_the_checkpoint(tmp_path: Path) -> None:
    model = experts()
    model.save_pretrained(tmp_path)
    found = streamed(model, bucket_bytes=1)
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in found
    assert equal(found, load_file(tmp_path / "model.safetensors"))


def test_tied_weights_come_once_and_buffers_if_a_checkpoint_has_them() -> None:
    model = llama(tie_word_embeddings=True)
    model.model.register_buffer("kept", torch.arange(3))
    model.model.register_buffer("made_anew", torch.arange(3), persistent=False)
    found = streamed(model)
    assert "lm_head.weight" not in found
    assert found["model.kept"].dtype == torch.int64, "only floating-point tensors are cast"
    assert "model.made_anew" not in found


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 1 << 30])
def test_a_bucket_ends_with_a_layer(bucket_bytes: int) -> None:
    buckets = [
        [name for name, _ in bucket] for bucket in stream(llama(), dtype=torch.float32, bucket_bytes=bucket_bytes)
    ]
    for layer in range(3):
        holding = [bucket for bucket in buckets if any(f"layers.{layer}." in name for name in bucket)]
        assert len(holding) == 1, f"layer {layer} is cut"
    assert len(buckets) == {1: 6, 20_000: 4, 1 << 30: 1}[bucket_bytes]


def test_a_4_bit_weight_fills_a_bucket_with_what_it_becomes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameter = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    assert parameter.nbytes == 64 * 64 // 2
    assert plain_source("w", parameter).size_bytes == 64 * 64 * 4


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "has use_dora"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "in a way that is not known"),
    ],
)
def test_adapters_that_are_more_than_a_product_are_refused_before_anything_is_sent(
    settings: dict[str, Any], why: str
) -> None:
    model = adapted(llama(attention_bias=True), **settings)
    assert why in str(why_no_stream(model, merge_adapters=True))
    with pytest.raises(Exception, match=r"cannot be streamed: .*" + why):
        streamed(model, merge_adapters=True)


def test_other_kinds_of_adapters_are_refused() -> None:
    from peft import IA3Config, get_peft_model

    model = get_peft_model(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    assert "is IA3, and only LoRA" in str(why_no_stream(model, merge_adapters=True))


def test_adapted_experts_are_refused() -> None:
    model = adapted(experts(), target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    assert "in a way that is not known" in str(why_no_stream(model, merge_adapters=True))


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_that_unties_tied_weights_is_refused(settings: dict[str, Any]) -> None:
    model = adapted(llama(tie_word_embeddings=True), **settings)
    assert "is adapted, but tied" in str(why_no_stream(model, merge_adapters=True))


def test_weights_quantised_in_another_way_are_refused() -> None:
    model = llama()
    model.hf_quantizer = types.SimpleNamespace(quantization_config=types.SimpleNamespace(quant_method="awq"))
    assert "quantised by awq" in str(why_no_stream(model, merge_adapters=False))


def test_experts_without_a_way_back_are_refused() -> None:
    model = experts()
    model._weight_conversions = []
    assert "transformers knows no way back" in str(why_no_stream(model, merge_adapters=False))
