"""What transformers keeps in fp32 in a 16-bit model stays so in exports, snapshots, streams and the engine's base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from hf_dsvllm.live.snapshot import publish
from hf_dsvllm.live.stream import stream
from hf_dsvllm.precision import Precision, held_in_fp32
from hf_dsvllm.tensors.fourbit import dequantised_base
from tests.export_runs import NF4, export, write_run
from tests.tiny import write_tiny_model

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 whose routers choose by a bias that bf16 cannot hold: 30 with differences of 0.05."""
    folder = write_tiny_model(tmp_path_factory.mktemp("deepseek") / "base")
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        vocab_size=320,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    bias = model.get_buffer(BIAS)
    bias.data = 30 + 0.05 * torch.randn(16)
    model.save_pretrained(folder)
    return folder


def bias_of(folder: Path) -> torch.Tensor:
    found = [tensors[BIAS] for file in folder.glob("*.safetensors") if BIAS in (tensors := load_file(file))]
    return found[0]


def test_an_export_keeps_the_routers_bias_and_is_proven(base: Path, tmp_path: Path) -> None:
    report = export(write_run(tmp_path / "run", base), tmp_path / "out")
    assert report.verification.passed
    assert report.dtype == "bfloat16"
    assert torch.equal(bias_of(tmp_path / "out"), bias_of(base))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_full_models_export_keeps_it_too(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "out")
    assert torch.equal(bias_of(tmp_path / "out"), bias_of(base))


def test_snapshot_and_stream_keep_it(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    snapshot = publish(model, tmp_path, step=1, dtype=torch.bfloat16)
    assert torch.equal(bias_of(snapshot.path), bias_of(base))
    streamed = {name: tensor.clone() for bucket in stream(model, dtype=torch.bfloat16) for name, tensor in bucket}
    assert torch.equal(streamed[BIAS], bias_of(base))
    assert {tensor.dtype for name, tensor in streamed.items() if name != BIAS} == {torch.bfloat16}


def test_the_base_of_a_qlora_engine_keeps_it(base: Path, tmp_path: Path) -> None:
    assert torch.equal(bias_of(dequantised_base(base, NF4, tmp_path / "engine")), bias_of(base))


def test_only_half_precision_and_only_listed_names_are_spared() -> None:
    model = torch.nn.Linear(1, 1)
    model._keep_in_fp32_modules_strict = {"gate.weight", "conv*bias"}
    held = held_in_fp32(model)
    half, whole = Precision(dtype=torch.bfloat16, held=held), Precision(dtype=torch.float64, held=held)
    names = ("a.gate.weight", "conv1.bias", "a.gate_proj.weight")
    assert [half.of(name, torch.float32) for name in names] == [torch.float32, torch.float32, torch.bfloat16]
    assert whole.of(names[0], torch.float32) == torch.float64
    assert half.of("ids", torch.int64) == torch.int64, "whole numbers are not rounded"
    assert held_in_fp32(torch.nn.Linear(1, 1)) == ()


def test_lora_on_the_attention_does_not_touch_it(base: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"),
    )
    streamed = dict(pair for bucket in stream(model, dtype=torch.bfloat16, merge_adapters=True) for pair in bucket)
    assert torch.equal(streamed[BIAS], bias_of(base))
