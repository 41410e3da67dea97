"""Which tensors an export has: the base's own, with tied embeddings untied where training told them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.fourbit import quantised_weights, round_trip
from hf_dsvllm.merge import Adapter, Update
from hf_dsvllm.weights import TensorFolder, TensorPlan

__all__ = ["Layout", "cast_layout", "merged_layout"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What to write and how to make each tensor.

    `untied` names parameters that shared their value with another in the base and no longer do; `vocab_size` is set
    if the adapter resized the embeddings.  `config_changes` follow from both.
    """

    plan: tuple[TensorPlan, ...]
    produce: Callable[[str], torch.Tensor]
    changed: tuple[str, ...]
    untied: tuple[str, ...] = ()
    vocab_size: int | None = None

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of config.json that must differ from the base's."""
        changes: dict[str, Any] = {"tie_word_embeddings": False} if self.untied else {}
        return changes if self.vocab_size is None else changes | {"vocab_size": self.vocab_size}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """A tensor of the export under `key`: parameter `name` of the model, made from the base's tensor `stored`."""

    key: str
    name: str
    stored: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Skeleton:
    """What a model without memory tells: its parameters, `{copy: origin}` of the tied ones, and its key prefix."""

    parameters: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    prefix: str
    embedding: str

    def name_of(self, key: str) -> str:
        """Key in a file -> parameter; files saved from the model without its head lack the prefix (`model.`)."""
        prefixed = f"{self.prefix}.{key}"
        return prefixed if key not in self.parameters and prefixed in self.parameters else key


def cast_layout(model_dir: Path, tensors: TensorFolder, *, dtype: torch.dtype) -> Layout:
    """A fully trained model: its own tensors, rounded once to `dtype`; copies of tied tensors are left out."""
    skeleton = _skeleton(model_dir)
    copies = {copy for copy, origin in skeleton.tied.items() if _both_equal(tensors, copy, origin)}
    names = tuple(name for name in tensors.names if name not in copies)
    return Layout(
        plan=tuple(TensorPlan(name=name, shape=tensors.shape(name), dtype=dtype) for name in names),
        produce=lambda name: tensors.get(name).to(dtype),
        changed=names,
    )


def merged_layout(
    base: Path,
    tensors: TensorFolder,
    adapter: Adapter,
    *,
    base_dtype: torch.dtype | None,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None,
) -> Layout:
    """`base` (in the trainer's `base_dtype`, through 4 bit if `quantization`) + `adapter`, rounded once to `dtype`.

    Raises ExportError if an adapted or quantised parameter is not in the base's files under its own name.
    """
    skeleton = _skeleton(base)
    quantised = frozenset() if quantization is None else quantised_weights(base, quantization)

    def merged(output: _Output, update: Update | None) -> torch.Tensor:
        weight = tensors.get(output.stored)
        weight = weight if base_dtype is None else weight.to(base_dtype)
        if output.name in quantised and quantization is not None:
            weight = round_trip(weight, quantization)
        return (weight if update is None else adapter.apply(update, weight)).to(dtype)

    outputs = {
        name: _Output(key=key, name=name, stored=key) for key in tensors.names for name in [skeleton.name_of(key)]
    }
    updates = dict(adapter.updates)
    untied: list[str] = []
    for copy, origin in skeleton.tied.items():
        if (
            copy in outputs
            and origin in outputs
            and not _both_equal(tensors, outputs[copy].stored, outputs[origin].stored)
        ):
            continue  # stored with different values: transformers does not tie them either
        untied += _settle_tie(copy, origin, outputs, updates, merged)
    _check_names("adapted", set(adapter.updates) - set(outputs) - set(skeleton.tied), base)
    _check_names("quantised", quantised - set(outputs), base)

    shapes = {
        output.key: adapter.replaced_shape(updates.get(output.name)) or tensors.shape(output.stored)
        for output in outputs.values()
    }
    of_key = {output.key: output for output in outputs.values()}
    return Layout(
        plan=tuple(TensorPlan(name=key, shape=shape, dtype=dtype) for key, shape in shapes.items()),
        produce=lambda key: merged(of_key[key], updates.get(of_key[key].name)),
        changed=tuple(key for key, output in of_key.items() if output.name in updates),
        untied=tuple(untied),
        vocab_size=_new_vocab_size(skeleton, of_key, shapes),
    )


def _settle_tie(
    copy: str,
    origin: str,
    outputs: dict[str, _Output],
    updates: dict[str, Update],
    merged: Callable[[_Output, Update | None], torch.Tensor],
) -> list[str]:
    """Keep a tied pair as one tensor, or make it two where their updates differ; returns the names now untied.

    Only one of the pair trained (LoRA on the input embedding, a saved output head): the other must stay as it was.
    """
    kept = origin if origin in outputs else copy
    if kept not in outputs:
        return []
    stored = outputs[kept].stored
    outputs.pop(copy if kept == origin else origin, None)
    if copy not in updates and origin not in updates:
        return []
    own = {name: _with_shared(name, updates.get(name), updates.get(other)) for name, other in _both_ways(copy, origin)}
    values = {name: merged(_Output(key=name, name=name, stored=stored), update) for name, update in own.items()}
    updates |= {name: update for name, update in own.items() if update is not None}
    if torch.equal(values[copy], values[origin]):
        updates.pop(copy if kept == origin else origin, None)
        return []
    other = copy if kept == origin else origin
    outputs[other] = _Output(key=other, name=other, stored=stored)
    return [copy, origin]


def _both_ways(copy: str, origin: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (copy, origin), (origin, copy)


def _with_shared(name: str, own: Update | None, partner: Update | None) -> Update | None:
    """`own`, with what PEFT does to the storage both share: resized base layers and trained token rows."""
    if partner is None:
        return own
    update = own or Update(name=name)
    if partner.shared_base and update.replacement is None:
        update = dataclasses.replace(update, replacement=partner.replacement, shared_base=True)
    if partner.rows is not None and update.rows is None:
        update = dataclasses.replace(update, rows=partner.rows, row_indices=partner.row_indices)
    return update if update.keys else None


def _check_names(what: str, lost: Set[str], base: Path) -> None:
    """Refuse parameters that the base's files do not have; an adapted copy of a tied pair lives on in its origin."""
    if lost:
        raise ExportError(
            f"{len(lost)} {what} parameters are not in the base's files under that name: "
            f"{', '.join(sorted(lost)[:4])}. Either {base} is not the base that was trained (name it with --base), or "
            "transformers renames or fuses its weights on loading (as for mixtures of experts), which this merge "
            "cannot map back."
        )


def _new_vocab_size(
    skeleton: _Skeleton, of_key: Mapping[str, _Output], shapes: Mapping[str, tuple[int, ...]]
) -> int | None:
    """Rows of the input embedding, if they differ from the base's."""
    before = skeleton.parameters[skeleton.embedding][0]
    after = {shapes[key][0] for key, output in of_key.items() if output.name == skeleton.embedding}
    return next((rows for rows in after if rows != before), None)


def _both_equal(tensors: TensorFolder, copy: str, origin: str) -> bool:
    return copy in tensors and origin in tensors and torch.equal(tensors.get(copy), tensors.get(origin))


def _skeleton(folder: Path) -> _Skeleton:
    """Build the model on the meta device: names and ties, no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    embedding = model.get_input_embeddings()
    return _Skeleton(
        parameters={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tied=dict(model.all_tied_weights_keys),
        prefix=model.base_model_prefix,
        embedding=next(f"{name}.weight" for name, module in model.named_modules() if module is embedding),
    )
