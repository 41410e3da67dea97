"""Bases whose files hold more than parameters: buffers of old versions, masks, and what transformers leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.fingerprint import fingerprint
from hf_dsvllm.tensors.weights import TensorFolder
from tests.export_runs import export, move, run
from tests.tiny import write_tiny_model

__all__ = ["run"]  # a fixture

FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def change(folder: Path, *lost: str, rename: str = "", **more: torch.Tensor) -> None:
    """Leave tensors out of the file, add others, and cut `rename` off the names."""
    file = folder / "model.safetensors"
    tensors = {name.removeprefix(rename): tensor for name, tensor in load_file(file).items() if name not in lost}
    save_file(tensors | more, file, metadata={"format": "pt"})


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A checkpoint of a whole model; its base is `tmp_path / "base"`."""
    write_tiny_model(tmp_path / "base")
    return write_tiny_model(tmp_path / "output" / "checkpoint-7", seed=1)


def test_a_full_model_is_exported_though_its_base_holds_what_is_no_parameter(full: Path, tmp_path: Path) -> None:
    change(tmp_path / "base", **{FREQUENCIES: torch.ones(16), "mtp.layers.0.norm.weight": torch.ones(64)})
    report: Any = export(full, tmp_path / "out", base=str(tmp_path / "base"))
    assert (report.kind, report.verification.passed) == ("full", True)
    with TensorFolder(tmp_path / "out") as written:
        assert FREQUENCIES not in written


def test_a_full_model_that_lacks_a_parameter_of_its_base_is_refused(full: Path, tmp_path: Path) -> None:
    change(tmp_path / "base", **{FREQUENCIES: torch.ones(16)})
    change(full, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ExportError, match=r"missing \['model.layers.1.mlp.up_proj.weight'\], other shape \[\]"):
        export(full, tmp_path / "out", base=str(tmp_path / "base"))


def test_a_base_without_the_models_prefix_is_the_same_base(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "base")
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, n_positions=128, vocab_size=320, bos_token_id=0, eos_token_id=2)
    for folder in ("base", "checkpoint-7"):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / folder)
    mask = torch.ones(1, 1, 128, 128).tril()
    change(tmp_path / "base", rename="transformer.", **{"h.0.attn.bias": mask})
    report: Any = export(tmp_path / "checkpoint-7", tmp_path / "out", base=str(tmp_path / "base"))
    assert report.verification.passed
    change(tmp_path / "checkpoint-7", "transformer.h.0.attn.c_attn.weight")
    with pytest.raises(ExportError, match=r"missing \['transformer.h.0.attn.c_attn.weight'\]"):
        export(tmp_path / "checkpoint-7", tmp_path / "other", base=str(tmp_path / "base"))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_an_adapter_is_merged_into_a_base_that_holds_whole_numbers(
    dtype: torch.dtype, run: Path, tmp_path: Path
) -> None:
    numbers = torch.tensor([1, 0, 1, 1]).to(dtype)
    before = fingerprint(tmp_path / "base")
    change(tmp_path / "base", **{FREQUENCIES: numbers})
    assert fingerprint(tmp_path / "base") != before
    report: Any = export(run, tmp_path / "out")
    assert report.verification.passed
    written = load_file(tmp_path / "out" / "model.safetensors")[FREQUENCIES]
    assert written.dtype == dtype
    assert torch.equal(written, numbers)


def adapter_on(base: Path, folder: Path, *modules: str) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(modules))
    move(get_peft_model(model, settings), std=0.05).save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_into_an_old_gpt_neox_with_its_masks(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    config = GPTNeoXConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=320
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
    change(base, **{"gpt_neox.layers.0.attention.bias": mask})
    adapter = adapter_on(base, tmp_path / "adapter", "query_key_value")
    report: Any = export(adapter, tmp_path / "out")
    assert report.verification.passed


def test_a_bare_adapter_is_compared_in_the_dtype_of_the_weights(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    change(base, **{FREQUENCIES: torch.ones(4, dtype=torch.int64)})
    with TensorFolder(base) as tensors:
        assert tensors.names[0] == FREQUENCIES
    report: Any = export(adapter_on(base, tmp_path / "adapter", "q_proj"), tmp_path / "out")
    assert report.verification.passed


def test_weights_in_whole_numbers_are_refused_as_quantised(run: Path, full: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for folder in (tmp_path / "base", full):
        change(folder, name, **{name: torch.ones(128, 64, dtype=torch.int8)})
    for source in (run, full):
        with pytest.raises(ExportError, match=r"up_proj.weight in .* has dtype int8: this looks like a quantised"):
            export(source, tmp_path / "out")


def test_a_quantised_full_model_is_refused_whatever_its_tensors_are_called(full: Path, tmp_path: Path) -> None:
    change(full, **{"model.layers.0.mlp.experts.down_proj_blocks": torch.ones(4, dtype=torch.uint8)})
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ExportError, match=r"down_proj_blocks in .* has dtype uint8"):
        export(full, tmp_path / "out")


def test_a_dtype_of_neither_kind_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with TensorFolder(tmp_path) as tensors, pytest.raises(ExportError, match="has dtype F8_E4M3: this looks like"):
        tensors.dtype("weight")
