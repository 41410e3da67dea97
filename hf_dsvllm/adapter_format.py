"""`--format adapter`: a LoRA adapter that vLLM applies as it was trained.

vLLM reads one rank and one alpha from adapter_config.json; up to 0.31 it ignores patterns of them without a word.  Here
every layer is brought to one rank (with rows of zeros) and its own scale is multiplied into B, so that alpha = rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import write_json
from hf_dsvllm.layout import Layout
from hf_dsvllm.merge import CONFIG, Adapter, Update
from hf_dsvllm.weights import TensorPlan

__all__ = ["adapter_layout", "write_adapter_config"]


def adapter_layout(adapter: Adapter) -> Layout:
    """The tensors of `adapter` as vLLM applies them; ExportError for what it cannot serve as an adapter at all."""
    _refuse(adapter)
    rank = _rank(adapter)
    makers: dict[str, tuple[Update, bool]] = {}
    for update in adapter.updates.values():
        assert update.lora_a is not None
        assert update.lora_b is not None
        makers |= {update.lora_a: (update, False), update.lora_b: (update, True)}

    def produce(key: str) -> torch.Tensor:
        update, high = makers[key]
        tensor = adapter.tensors.get(key)
        if not _is_uneven(adapter.config):
            return tensor
        if high:
            scaled = (tensor.float() * update.scaling).to(tensor.dtype)
            return torch.nn.functional.pad(scaled, (0, rank - tensor.shape[1]))
        return torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))

    def shape(key: str) -> tuple[int, ...]:
        first, second = adapter.tensors.shape(key)
        return (first, rank) if makers[key][1] else (rank, second)

    return Layout(
        plan=tuple(TensorPlan(name=key, shape=shape(key), dtype=adapter.tensors.dtype(key)) for key in makers),
        produce=produce,
        changed=tuple(makers),
    )


def write_adapter_config(folder: Path, adapter: Adapter, base: str) -> None:
    """adapter_config.json for the tensors of `adapter_layout`."""
    config = dict(adapter.config) | {"base_model_name_or_path": base, "inference_mode": True}
    if _is_uneven(adapter.config):
        rank = _rank(adapter)
        config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    write_json(folder / CONFIG, json.loads(json.dumps(config)))


def _is_uneven(config: Mapping[str, Any]) -> bool:
    return bool(config.get("rank_pattern") or config.get("alpha_pattern"))


def _rank(adapter: Adapter) -> int:
    """The largest rank of any layer."""
    return max(adapter.tensors.shape(update.lora_a)[0] for update in adapter.updates.values() if update.lora_a)


def _refuse(adapter: Adapter) -> None:
    kinds = {
        "DoRA": any(update.magnitude for update in adapter.updates.values()),
        "whole saved modules or biases": any(
            update.replacement or update.bias_delta for update in adapter.updates.values()
        ),
        "trained tokens": any(update.rows for update in adapter.updates.values()),
        "LoRA on embeddings": any(update.embedding for update in adapter.updates.values()),
        "LoRA on experts (target_parameters)": any(update.wrapper is not None for update in adapter.updates.values()),
    }
    found = [name for name, there in kinds.items() if there]
    if found:
        raise ExportError(
            f"The adapter in {adapter.path} has {', '.join(found)}, which vLLM does not serve as an adapter: leave "
            "--format out, and everything is merged."
        )
