"""Run folders with tiny models, as training leaves them, for the tests of exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_dsvllm.export.make import export_model
from tests.tiny import write_tiny_model

NF4 = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def write_wide_base(folder: Path) -> Path:
    """Hidden 256, so that a weight has many 4-bit blocks; with a tokenizer."""
    write_tiny_model(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def move(model: PeftModel, *, std: float) -> PeftModel:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def write_run(
    folder: Path, base: Path, *, quantization: dict[str, object] | None = None, std: float = 0.02, step: int = 4
) -> Path:
    """A run folder as the training callback leaves it, with one adapter snapshot."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    move(get_peft_model(model, settings), std=std).save_pretrained(folder / "snapshots" / f"step-{step}")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "tokenizer")
    pointer = {"path": f"step-{step}", "step": step, "kind": "adapter"}
    (folder / "snapshots" / "latest.json").write_text(json.dumps(pointer))
    record = {"base_model": str(base), "preset": "lora", "adapter": "qlora" if quantization else "lora"}
    record |= {"quantization": quantization, "dtype": "bfloat16", "versions": {}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", write_tiny_model(tmp_path / "base", dtype="bfloat16"))


def export(source: Path, out: Path, **settings: object) -> object:
    return export_model(source, out, progress=False, **settings)


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits.float()


def nothing_finished(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}.*"))
