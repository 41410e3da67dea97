"""LoRA adapters -> what each tensor of the base becomes, in fp32, without building the model.

Covers what PEFT's `LoraConfig` can train: LoRA, rsLoRA, rank and alpha patterns, DoRA, transposed layers, embeddings,
biases, `modules_to_save`, trainable tokens, and parameters of mixtures of experts (`target_parameters`).  Anything else
is refused by name: an export that silently lacks a trained part is worse than none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.naming import Part
from hf_dsvllm.tensors.weights import TensorFolder

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "Update", "exact_products", "is_adapter", "named_for", "read_adapter"]

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
        *("target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora"),
    )
)
READ_AHEAD = 32  # tensors of an adapter kept; a few MB each
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights in memory; the saved adapter is a delta to those.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What becomes of one parameter of the base; the fields are keys in the adapter file.

    `replacement` (modules_to_save, trained biases, resized embeddings) stands for the base's own value; then rows are
    replaced, then the low-rank delta is added.  `shared_base` marks a replacement that PEFT writes into the base
    layer itself, so that a tied partner sees it too.  `experts` is set for a parameter [experts, …] adapted as a
    whole; until `named_for` knows the model, `name` is its module and `wrapper` how many wrappers PEFT put around it.
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
    wrapper: int | None = None
    experts: int = 0

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
    read: Callable[[str], torch.Tensor]

    def replaced_shape(self, update: Update | None) -> tuple[int, ...] | None:
        """Shape of a parameter that the adapter replaces as a whole (resized embeddings); None otherwise."""
        return None if update is None or update.replacement is None else self.tensors.shape(update.replacement)

    def apply(
        self, update: Update, base: torch.Tensor, part: Part | None = None, transposed: bool = False
    ) -> torch.Tensor:
        """The trained value of a parameter in fp32, given the base's value (any float dtype, any device).

        With `part`, `base` is that part of a fused parameter; `transposed` fused weights are [experts, in, out].
        """
        weight = base if update.replacement is None else self._tensor(update.replacement, base)
        weight = weight.to(torch.float32, copy=True)
        if update.experts:
            return self._with_expert_delta(update, weight, part, transposed)
        if part is not None:
            raise ExportError(f"{update.name} is fused from several tensors; only LoRA on the whole of it is merged.")
        if update.rows is not None:
            weight[list(update.row_indices)] = self._tensor(update.rows, base)
        if update.bias_delta is not None:
            weight.add_(self._tensor(update.bias_delta, base).mul(update.scaling))
        if update.lora_a is not None:
            weight = self._with_delta(update, weight)
        return weight

    def _tensor(self, key: str, like: torch.Tensor) -> torch.Tensor:
        return self.read(key).to(device=like.device, dtype=torch.float32)

    def _with_expert_delta(
        self, update: Update, weight: torch.Tensor, part: Part | None, transposed: bool
    ) -> torch.Tensor:
        """`W[e] + s B[e] A[e]`; PEFT keeps A as [experts * r, in] and B as [out, r * experts]."""
        low, high = self._factors(update, weight)
        low = low.reshape(update.experts, -1, low.shape[-1])
        high = high.reshape(high.shape[0], -1, update.experts).permute(2, 0, 1)
        if part is not None:
            low, high = low[part.expert], high[part.expert, part.rows(high.shape[1])]
        elif weight.dim() == 2:
            low, high = low[0], high[0]  # a plain weight, targeted by the name of its parameter
        if transposed:
            low, high = high.transpose(-1, -2), low.transpose(-1, -2)
        self._check_fit(update, weight, (*high.shape[:-1], low.shape[-1]))
        return weight.add_((high @ low).mul_(update.scaling))

    def _with_delta(self, update: Update, weight: torch.Tensor) -> torch.Tensor:
        """`W + s B A`; DoRA: `m (W + s B A) / ||W + s B A||`, norm over inputs (https://arxiv.org/abs/2402.09353)."""
        low, high = self._factors(update, weight)
        transposed = update.embedding or self._is_transposed((high.shape[0], low.shape[1]), weight)
        if transposed:
            low, high = high.T, low.T
        self._check_fit(update, weight, (high.shape[0], low.shape[1]))
        merged = weight.add_((high @ low).mul_(update.scaling))  # in place, rounded in the order of PEFT's own merge
        if update.magnitude is None:
            return merged
        axis = 0 if transposed else 1
        factor = self._tensor(update.magnitude, weight) / torch.linalg.norm(merged, dim=axis)
        return merged * (factor[None, :] if transposed else factor[:, None])

    def _factors(self, update: Update, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert update.lora_a is not None
        assert update.lora_b is not None
        return self._tensor(update.lora_a, like), self._tensor(update.lora_b, like)

    def _check_fit(self, update: Update, weight: torch.Tensor, delta: tuple[int, ...]) -> None:
        if delta != tuple(weight.shape):
            raise ExportError(
                f"{update.name} is {tuple(weight.shape)} in the base but the adapter's delta is {delta}: "
                f"the adapter in {self.path} was trained on another base; name the right one with --base."
            )

    def _is_transposed(self, delta: tuple[int, int], weight: torch.Tensor) -> bool:
        """Conv1D (GPT-2) keeps [in, out].  PEFT resets the flag for nn.Linear, so a shape that fits one way decides."""
        if delta == tuple(weight.shape) and delta[0] != delta[1]:
            return False
        return bool(self.config.get("fan_in_fan_out"))


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, merged and compared: training may have switched the process to TF32, which has 10 bits.

    Context manager and decorator.  `torch.get_float32_matmul_precision` raises once `--tf32` or `torch_compile` chose
    by torch's newer settings, so it is those that are set and put back.
    """
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


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
    # The experts of one parameter are merged one by one and share the tensors read for it.
    read = functools.lru_cache(maxsize=READ_AHEAD)(tensors.get)
    return Adapter(path=folder, config=config, tensors=tensors, updates=_sort(folder, config, tensors), read=read)


def named_for(adapter: Adapter, parameters: Mapping[str, tuple[int, ...]]) -> Adapter:
    """`adapter` with `target_parameters` under the model's own names; `parameters` are its shapes by name, in order.

    PEFT wraps a module once for each adapted parameter, the first one innermost, and saves only how deep a wrapper was.
    """
    targets = adapter.config.get("target_parameters") or ()
    updates: dict[str, Update] = {}
    for update in adapter.updates.values():
        if update.wrapper is None:
            updates[update.name] = update
            continue
        inside = [name for name in parameters if name.rpartition(".")[0] == update.name]
        adapted = [name for name in inside if any(name == each or name.endswith(f".{each}") for each in targets)]
        if update.wrapper >= len(adapted):
            raise ExportError(
                f"{adapter.path} adapts {update.wrapper + 1} parameters of {update.name}, and the base has "
                f"{len(adapted)} of target_parameters={list(targets)} there: it was trained on another base (--base)."
            )
        name = adapted[-1 - update.wrapper]
        shape = parameters[name]
        updates[name] = _scaled(adapter, update, name, shape[0] if len(shape) == 3 else 1)
    return dataclasses.replace(adapter, updates=updates)


def _scaled(adapter: Adapter, update: Update, name: str, experts: int) -> Update:
    assert update.lora_a is not None
    rank, scaling = _rank_and_scaling(adapter.config, name)
    found = adapter.tensors.shape(update.lora_a)[0]
    if found != rank * experts:
        raise ExportError(
            f"{update.lora_a} has {found} rows, not {rank} for each of {experts} experts: the configuration in "
            f"{adapter.path / CONFIG} does not belong to these weights, or the base is another one (--base)."
        )
    return dataclasses.replace(update, name=name, wrapper=None, experts=experts, scaling=scaling)


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
        if set(values) & set(known) - {"embedding", "wrapper"}:
            raise ExportError(f"{key} in {folder / WEIGHTS} is a second value for {name}.")
        known.update(values)
    if unknown:
        raise ExportError(f"{len(unknown)} tensors of {folder / WEIGHTS} cannot be placed: {', '.join(unknown[:5])}.")
    updates = {name: Update(name=name.partition("#")[0], **values) for name, values in fields.items()}
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
        if (wrapped := _wrapped(config, module)) is not None:
            return f"{wrapped[0]}#{wrapped[1]}", values | {"wrapper": wrapped[1]}
        if "lora_embedding" in ending:
            values["embedding"] = True
        if field == "rows":
            values["row_indices"] = _row_indices(config, module)
        return module + parameter, values
    if "lora_" in path or "token_adapter" in path:
        return None
    shared = ".base_layer." in path
    return path.replace(".base_layer.", "."), {"replacement": key, "shared_base": shared}


def _wrapped(config: Mapping[str, Any], module: str) -> tuple[str, int] | None:
    """(module, depth) if the adapter is on a parameter of the module itself, by `target_parameters`; None otherwise."""
    plain = module.replace(".base_layer", "")
    owners = [target.rpartition(".")[0] for target in config.get("target_parameters") or ()]
    # A parameter may be named without its module: "all-linear" becomes so for mixtures of experts (PEFT 0.21).
    unnamed = "" in owners and not _matches(config.get("target_modules"), plain)
    if unnamed or any(owner and (plain == owner or plain.endswith(f".{owner}")) for owner in owners):
        return plain, module.count(".base_layer")
    return None


def _matches(targets: Any, module: str) -> bool:
    """Whether `target_modules`, names or one regular expression, mean this module."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


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
    if update.wrapper is not None or (update.lora_a is None and update.bias_delta is None):
        return update
    module = update.name.rpartition(".")[0]
    rank, scaling = _rank_and_scaling(config, module)
    if update.lora_a is not None and tensors.shape(update.lora_a)[0] != rank:
        raise ExportError(
            f"{update.lora_a} has rank {tensors.shape(update.lora_a)[0]} but {folder / CONFIG} says {rank} for "
            f"{module}: the configuration does not belong to these weights."
        )
    return dataclasses.replace(update, scaling=scaling)


def _rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """`alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA, with this module's (or parameter's) own rank and alpha."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
