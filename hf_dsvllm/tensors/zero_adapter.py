"""The adapter in a partitioned DeepSpeed checkpoint, as the folder that PEFT would have saved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_dsvllm.errors import ExportError
from hf_dsvllm.tensors.weights import TensorFolder
from hf_dsvllm.tensors.zero_checkpoint import ZeroCheckpoint

__all__ = ["write_adapter"]

ADAPTER = "default"  # the adapter's name in PEFT, which its saved files leave out


def write_adapter(checkpoint: Path, folder: Path) -> Path:
    """The adapter of a ZeRO checkpoint whose own adapter file is missing or empty, as PEFT would have saved it.

    Adapters are small: this writes adapter_config.json and adapter_model.safetensors to `folder` and returns it.  What
    the checkpoint's own adapter file names, such as embeddings that were resized, must be there: ExportError if not.
    """
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    expected, whole = _own_file(checkpoint / "adapter_model.safetensors")
    with ZeroCheckpoint(checkpoint) as tensors:
        held = {_saved_name(name): name for name in tensors.names}
        trained = {name for name in held if _is_trained(name, config)}
        held = {_saved_name(alias): name for alias, name in tensors.aliases.items() if name in tensors} | held
        found = whole | {name: tensors.get(held[name]) for name in trained | (expected & held.keys())}
    if not trained:
        raise ExportError(f"{checkpoint} has an adapter_config.json, but no adapter in its DeepSpeed partitions.")
    if lost := sorted(expected - found.keys()):
        raise ExportError(
            f"{len(lost)} tensors of {checkpoint}'s adapter, such as {lost[0]}, are empty there and in no partition: "
            "ZeRO-3 leaves out what is frozen, also resized embeddings. Export an adapter that was saved with them, or "
            "train with modules_to_save=['embed_tokens', 'lm_head'], or from a base saved after the resize."
        )
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _own_file(file: Path) -> tuple[set[str], dict[str, torch.Tensor]]:
    """The names in an adapter's own file, and those of its tensors that are not empty.

    PEFT names a saved module three times if the vocabulary was resized; the name of every saved module is enough.
    """
    if not file.is_file():
        return set(), {}
    with TensorFolder(file) as tensors:
        names = {name for name in tensors.names if not re.search(r"\.(original_module|modules_to_save)\.", name)}
        return names, {name: tensors.get(name) for name in names if 0 not in tensors.shape(name)}


def _saved_name(name: str) -> str:
    """The trained module's name of a tensor -> the one in PEFT's files (peft/utils/save_and_load.py)."""
    name = name.removeprefix("module.")
    name = name.replace(f".modules_to_save.{ADAPTER}.", ".")
    return re.sub(rf"\.{ADAPTER}(?=\.|$)", "", name)


def _is_trained(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT saves this tensor: the adapter's own, whole saved modules and, where asked for, biases."""
    if "lora_" in name or "trainable_tokens_delta" in name:
        return True
    saved = config.get("modules_to_save") or ()
    if any(f".{module}." in f"{name}." and ".original_module." not in name for module in saved):
        return True
    return config.get("bias", "none") != "none" and name.endswith(".bias")
