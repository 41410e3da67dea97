"""Models of many kinds for tests of full snapshots, and what is in a folder of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.tiny import write_tiny_model

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
REMOTE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.full((3,), 2.0))
        self.post_init()


OwnConfig.register_for_auto_class()
OwnForCausalLM.register_for_auto_class("AutoModelForCausalLM")
"""


def llama(folder: Path, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(write_tiny_model(folder / "base", **changes))


def qwen(tied: bool) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, tie_word_embeddings=tied))


def renamed() -> Any:
    """A head that the files call embed_out."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=2))


def prefixed(folder: Path) -> Any:
    """A decoder alone, loaded from a checkpoint that has it below another name."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(write_tiny_model(folder / "base"))


def experts() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **HEADS, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    )


def with_buffers(folder: Path) -> Any:
    """Of every kind: whole numbers, truth values, floating point in its own dtype, and one that no checkpoint has."""
    model = llama(folder)
    model.model.norm.register_buffer("seen", torch.tensor(3))
    model.model.norm.register_buffer("mask", torch.tensor([True, False, True]))
    model.model.norm.register_buffer("mean", torch.tensor([1.0000001, 2.0], dtype=torch.float64))
    model.model.norm.register_buffer("made_anew", torch.ones(2), persistent=False)
    return model


def held(folder: Path) -> Any:
    model = llama(folder)
    model._keep_in_fp32_modules_strict = {"norm"}
    return model


def diverged(folder: Path) -> Any:
    model = llama(folder, tied=False)
    with torch.no_grad():
        model.lm_head.weight[0, 0], model.lm_head.weight[1, 0] = float("nan"), float("inf")
    return model


def ignored(folder: Path) -> Any:
    model = llama(folder, tied=False)
    model._keys_to_ignore_on_save = ["model.norm.weight"]
    return model


def strided(folder: Path) -> Any:
    """One that lies transposed in memory, one without dimensions, one that is not trained."""
    model = llama(folder)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(64, 128).t())
    model.model.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.5), requires_grad=False))
    return model


def remote(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    base = folder / "own"
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(base)
    (base / "modeling_own.py").write_text(REMOTE, encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"model_type": "own_llama"}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)


STREAMED: dict[str, Callable[[Path], Any]] = {
    "llama": llama,
    "llama untied": lambda folder: llama(folder, tied=False),
    "llama in bf16": lambda folder: llama(folder).bfloat16(),
    "qwen3": lambda _: qwen(tied=True),
    "qwen3 untied": lambda _: qwen(tied=False),
    "renamed": lambda _: renamed(),
    "a decoder alone": prefixed,
    "buffers": with_buffers,
    "held in fp32": held,
    "diverged": diverged,
    "ignored keys": ignored,
    "strided": strided,
    "remote code": remote,
}


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """All tensors, and the bytes of all other files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = opened.keys()
            tensors |= {name: opened.get_tensor(name) for name in names}
    others = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*")
              if file.is_file() and ".safetensors" not in file.name}  # fmt: skip
    return tensors, others


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    def bits(tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return left.keys() == right.keys() and all(bits(left[name]) == bits(right[name]) for name in left)
