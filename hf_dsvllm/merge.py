"""LoRA adapters -> what each tensor of the base becomes, in fp32, without building the model.

Covers what PEFT's `LoraConfig` can train on dense models: LoRA, rsLoRA, rank and alpha patterns, DoRA, transposed
layers, embeddings, biases, `modules_to_save`, trainable tokens.  Anything else is refused by name: an export that
silently lacks a trained part is worse than none.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.weights import TensorFolder

__all__ = ["Adapter", "Update", "is_adapter", "read_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings that change nothing in what the saved tensors mean, or that are read below.
HANDLED = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "modules_to_save"),
        *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
        *("target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora"),
    )
)
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights in memory; the saved adapter is a delta to those.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What becomes of one parameter of the base; the fields are keys in the adapter file.

    `replacement` (modules_to_save, trained biases, resized embeddings) stands for the base's own value; then rows are
    replaced, then the low-rank delta is added.  `shared_base` marks a replacement that PEFT writes into the base
    layer itself, so that a tied partner sees it too.
    """

    name: str
    replacement: str | None = None
    shared_base: bool = False
    rows: str | None = None
    row_indices: tuple[int, ...] = ()
    lora_a: str | None = None
    lora_b: str | None = None
    magnitude: str | None = None
    bias_delta: str | None = None
    embedding: bool = False
    scaling: float = 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapter tensors that this update consumes."""
        fields = (self.replacement, self.rows, self.lora_a, self.lora_b, self.magnitude, self.bias_delta)
        return tuple(key for key in fields if key is not None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter folder read and understood: every tensor in it belongs to exactly one `Update`."""

    path: Path
    config: Mapping[str, Any]
    tensors: TensorFolder
    updates: Mapping[str, Update]

    def replaced_shape(self, update: Update | None) -> tuple[int, ...] | None:
        """Shape of a parameter that the adapter replaces as a whole (resized embeddings); None otherwise."""
        return None if update is None or update.replacement is None else self.tensors.shape(update.replacement)

    def apply(self, update: Update, base: torch.Tensor) -> torch.Tensor:
        """The trained value of a parameter in fp32, given the base's value (any float dtype, any device)."""
        weight = base if update.replacement is None else self._tensor(update.replacement, base)
        weight = weight.to(torch.float32)
        if update.rows is not None:
            weight = weight.clone()
            weight[list(update.row_indices)] = self._tensor(update.rows, base)
        if update.bias_delta is not None:
            weight = weight + update.scaling * self._tensor(update.bias_delta, base)
        if update.lora_a is not None:
            weight = self._with_delta(update, weight)
        return weight

    def _tensor(self, key: str, like: torch.Tensor) -> torch.Tensor:
        return self.tensors.get(key).to(device=like.device, dtype=torch.float32)

    def _with_delta(self, update: Update, weight: torch.Tensor) -> torch.Tensor:
        """`W + s B A`; DoRA: `m (W + s B A) / ||W + s B A||`, norm over inputs (https://arxiv.org/abs/2402.09353)."""
        assert update.lora_a is not None
        assert update.lora_b is not None
        product = self._tensor(update.lora_b, weight) @ self._tensor(update.lora_a, weight)
        transposed = update.embedding or self._is_transposed(update, product, weight)
        delta = (product.T if transposed else product) * update.scaling
        if delta.shape != weight.shape:
            raise ExportError(
                f"{update.name} is {tuple(weight.shape)} in the base but the adapter's delta is {tuple(delta.shape)}: "
                f"the adapter in {self.path} was trained on another base; name the right one with --base."
            )
        merged = weight + delta
        if update.magnitude is None:
            return merged
        axis = 0 if transposed else 1
        factor = self._tensor(update.magnitude, weight) / torch.linalg.norm(merged, dim=axis)
        return merged * (factor[None, :] if transposed else factor[:, None])

    def _is_transposed(self, update: Update, product: torch.Tensor, weight: torch.Tensor) -> bool:
        """Conv1D (GPT-2) keeps [in, out].  PEFT resets the flag for nn.Linear, so a shape that fits one way decides."""
        if product.shape == weight.shape and product.shape[0] != product.shape[1]:
            return False
        return bool(self.config.get("fan_in_fan_out"))


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter folder and sort its tensors into updates.

    Raises ExportError for a setting this merge cannot reproduce, an empty or partitioned file, or an unknown tensor.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    _check_config(folder, config)
    if not (folder / WEIGHTS).is_file():
        raise ExportError(
            f"{folder} has {CONFIG} but no {WEIGHTS}: the save was interrupted or made with safe_serialization=False."
        )
    tensors = TensorFolder(folder / WEIGHTS)
    empty = [key for key in tensors.names if 0 in tensors.shape(key)]
    if empty or not tensors.names:
        found = f"empty tensors such as {empty[0]}" if empty else "no tensors"
        raise ExportError(
            f"{folder / WEIGHTS} has {found}: it was saved from partitioned ZeRO-3 parameters without gathering "
            "them; export a snapshot or a later checkpoint."
        )
    return Adapter(path=folder, config=config, tensors=tensors, updates=_sort(folder, config, tensors))


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise ExportError(f"peft_type={config.get('peft_type')!r} in {where}: only LORA adapters can be merged.")
    if config.get("init_lora_weights", True) not in HARMLESS_INITS:
        raise ExportError(
            f"init_lora_weights={config['init_lora_weights']!r} in {where} changes the base weights themselves; save "
            "with PEFT's path_initial_model_for_weight_conversion to get a plain LoRA adapter."
        )
    other = {key: value for key, value in config.items() if key not in HANDLED and value not in (None, False, {}, [])}
    if other:
        named = ", ".join(f"{key}={value!r}" for key, value in sorted(other.items()))
        raise ExportError(f"{where} has {named}, which this merge cannot reproduce; merge it with PEFT itself.")


def _sort(folder: Path, config: Mapping[str, Any], tensors: TensorFolder) -> dict[str, Update]:
    fields: dict[str, dict[str, Any]] = {}
    unknown: list[str] = []
    for key in tensors.names:
        placed = _place(key, config) if key.startswith(PREFIX) else None
        if placed is None:
            unknown.append(key)
            continue
        name, values = placed
        known = fields.setdefault(name, {})
        if set(values) & set(known) - {"scaling", "embedding"}:
            raise ExportError(f"{key} in {folder / WEIGHTS} is a second value for {name}.")
        known.update(values)
    if unknown:
        raise ExportError(f"{len(unknown)} tensors of {folder / WEIGHTS} cannot be placed: {', '.join(unknown[:5])}.")
    updates = {name: Update(name=name, **values) for name, values in fields.items()}
    return {name: _complete(folder, config, tensors, update) for name, update in updates.items()}


def _place(key: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Adapter key -> (parameter of the base, fields of its Update)."""
    path = key.removeprefix(PREFIX)
    endings = {
        ".lora_A.weight": ("lora_a", ".weight"),
        ".lora_B.weight": ("lora_b", ".weight"),
        ".lora_embedding_A": ("lora_a", ".weight"),
        ".lora_embedding_B": ("lora_b", ".weight"),
        ".lora_magnitude_vector": ("magnitude", ".weight"),
        ".lora_magnitude_vector.weight": ("magnitude", ".weight"),
        ".lora_B.bias": ("bias_delta", ".bias"),
        ".token_adapter.trainable_tokens_delta": ("rows", ".weight"),
    }
    for ending, (field, parameter) in endings.items():
        if not path.endswith(ending):
            continue
        module = path.removesuffix(ending)
        values: dict[str, Any] = {field: key}
        if "lora_embedding" in ending:
            values["embedding"] = True
        if field == "rows":
            values["row_indices"] = _row_indices(config, module)
        return module + parameter, values
    if "lora_" in path or "token_adapter" in path:
        return None
    shared = ".base_layer." in path
    return path.replace(".base_layer.", "."), {"replacement": key, "shared_base": shared}


def _row_indices(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """`trainable_token_indices` is a list for the input embedding, or a mapping from module names."""
    indices = config.get("trainable_token_indices") or ()
    if isinstance(indices, Mapping):
        indices = next((rows for name, rows in indices.items() if module == name or module.endswith(f".{name}")), ())
    return tuple(indices)


def _complete(folder: Path, config: Mapping[str, Any], tensors: TensorFolder, update: Update) -> Update:
    """Check that A and B came together and fill in the scaling of this module."""
    if (update.lora_a is None) != (update.lora_b is None) or (update.magnitude and update.lora_a is None):
        raise ExportError(f"{folder / WEIGHTS} lacks lora_A or lora_B for {update.name}: the file is damaged.")
    if update.rows is not None and len(update.row_indices) != tensors.shape(update.rows)[0]:
        raise ExportError(
            f"{update.rows} has {tensors.shape(update.rows)[0]} rows but trainable_token_indices in {folder / CONFIG} "
            f"names {len(update.row_indices)}."
        )
    if update.lora_a is None and update.bias_delta is None:
        return update
    from peft.utils.other import get_pattern_key

    module = update.name.rpartition(".")[0]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
    if update.lora_a is not None and tensors.shape(update.lora_a)[0] != rank:
        raise ExportError(
            f"{update.lora_a} has rank {tensors.shape(update.lora_a)[0]} but {folder / CONFIG} says {rank} for "
            f"{module}: the configuration does not belong to these weights."
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return dataclasses.replace(update, scaling=scaling)
