"""Which tensors an export has: the base's own, with tied embeddings untied where training told them apart."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.merge import Adapter, Update, named_for
from hf_dsvllm.export.naming import Part, Skeleton, read_skeleton
from hf_dsvllm.precision import Precision
from hf_dsvllm.tensors.fourbit import MERGE_BYTES_PER_ELEMENT, merge_place, quantised_weights, round_trip
from hf_dsvllm.tensors.staging import CPU
from hf_dsvllm.tensors.weights import TensorFolder, TensorPlan, TensorSource

__all__ = ["Layout", "cast_layout", "merged_layout"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What to write and how to make each tensor.

    `untied` names parameters that shared their value with another in the base and no longer do; `vocab_size` is set
    if the adapter resized the embeddings.  `config_changes` follow from both.  `produce` makes tensors on `device`,
    where all that are under way may take `memory_bytes`; an element takes `input_bytes` while it is read, and one that
    changes `merge_bytes` more.
    `applied` collects the adapter's tensors as they are merged, each with the number of tensors it went into.
    """

    plan: tuple[TensorPlan, ...]
    produce: Callable[[str], torch.Tensor]
    changed: tuple[str, ...]
    untied: tuple[str, ...] = ()
    vocab_size: int | None = None
    device: torch.device = CPU
    memory_bytes: int | None = None
    merge_bytes: int = 0
    input_bytes: int = 4
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    applied: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of config.json that must differ from the base's."""
        changes: dict[str, Any] = {"tie_word_embeddings": False} if self.untied else {}
        return changes if self.vocab_size is None else changes | {"vocab_size": self.vocab_size}

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the bytes."""
        sizes: dict[torch.dtype, int] = {}
        for planned in self.plan:
            sizes[planned.dtype] = sizes.get(planned.dtype, 0) + planned.size_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(planned.size_bytes for planned in self.plan)

    def working_bytes(self, planned: TensorPlan) -> int:
        """Memory of `device` that one tensor takes from being read to being written: input and output, and a merge."""
        both = planned.elements * self.input_bytes + planned.size_bytes
        return both + (planned.elements * self.merge_bytes if planned.name in self.changed else 0)

    def check_applied(self) -> None:
        """Every tensor of the adapter was merged, exactly as often as planned; ExportError otherwise."""
        wrong = sorted(k for k in self.expected.keys() | self.applied.keys()
                       if self.expected.get(k, 0) != self.applied.get(k, 0))  # fmt: skip
        if wrong:
            raise ExportError(
                f"{len(wrong)} tensors of the adapter were not merged exactly once, such as {wrong[0]} "
                f"({self.applied.get(wrong[0], 0)} times instead of {self.expected.get(wrong[0], 0)}): this is a bug "
                "worth reporting with adapter_config.json."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """A tensor of the export under `key`: parameter `name` of the model (or a part), made from the tensor `stored`."""

    key: str
    name: str
    stored: str
    part: Part | None = None


def cast_layout(model_dir: Path, tensors: TensorSource, *, dtype: torch.dtype, base: Path | None = None) -> Layout:
    """A fully trained model: its own tensors, rounded once to `dtype`; copies of tied tensors are left out.

    `model_dir` holds config.json.  A ZeRO checkpoint has parameters, not tensors as files have them: where transformers
    fuses experts, the tensors of `base` tell how they are taken apart.
    """
    skeleton = read_skeleton(model_dir)
    precision = Precision(dtype=dtype, held=skeleton.held)
    copies = {copy for copy, origin in skeleton.tied.items() if _both_equal(tensors, copy, origin)}
    outputs = {name: _Output(key=name, name=name, stored=name) for name in tensors.names if name not in copies}
    if not isinstance(tensors, TensorFolder) and skeleton.converters:
        outputs = _taken_apart(skeleton, outputs, base)

    def cast(key: str) -> torch.Tensor:
        output = outputs[key]
        wanted = precision.of(output.name, tensors.dtype(output.stored))
        if output.part is None:
            return tensors.get(output.stored, dtype=wanted)
        begin, end = output.part.span(tensors.shape(output.stored))
        part = tensors.flat(output.stored, begin, end, wanted)
        return part.reshape(_shape(output, tensors.shape(output.stored)))

    return Layout(
        plan=tuple(
            TensorPlan(
                name=key,
                shape=_shape(output, tensors.shape(output.stored)),
                dtype=precision.of(output.name, tensors.dtype(output.stored)),
            )
            for key, output in outputs.items()
        ),
        produce=cast,
        changed=tuple(outputs),
        input_bytes=4 if isinstance(tensors, TensorFolder) else 0,  # partitions are read and cast piece by piece
    )


def merged_layout(
    base: Path,
    tensors: TensorFolder,
    adapter: Adapter,
    *,
    base_dtype: torch.dtype | None,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None,
    device: torch.device | None = None,
) -> Layout:
    """`base` (in the trainer's `base_dtype`, through 4 bit if `quantization`) + `adapter`, rounded once to `dtype`.

    What transformers keeps in fp32 is in fp32 on both sides.
    Merges on `device`, if not given where there is room.  Raises ExportError if an adapted or quantised parameter is
    not in the base's files.
    """
    skeleton = read_skeleton(base)
    adapter = named_for(adapter, skeleton.parameters)
    quantised = frozenset() if quantization is None else quantised_weights(base, quantization)
    largest = max(math.prod(tensors.shape(key)) for key in tensors.names)
    place, room = merge_place(largest * MERGE_BYTES_PER_ELEMENT)
    device = place if device is None else device
    precision = Precision(dtype=dtype, held=skeleton.held)
    loaded = None if base_dtype is None else Precision(dtype=base_dtype, held=skeleton.held)
    applied: dict[str, int] = {}
    counting = threading.Lock()

    def merged(output: _Output, update: Update | None) -> torch.Tensor:
        weight = tensors.get(output.stored, device)
        weight = weight if loaded is None else loaded.cast(output.name, weight)
        if output.name in quantised and quantization is not None:
            weight = round_trip(weight, quantization)
        if update is not None:
            weight = adapter.apply(update, weight, output.part, output.name.rpartition(".")[0] in skeleton.transposed)
        return precision.cast(output.name, weight)

    def produce(key: str) -> torch.Tensor:
        update = updates.get(of_key[key].name)
        tensor = merged(of_key[key], update)
        with counting:  # the experts of one parameter are made by several threads
            for used in () if update is None else update.keys:
                applied[used] = applied.get(used, 0) + 1
        return tensor

    outputs = _outputs(skeleton, tensors)
    updates = dict(adapter.updates)
    untied: list[str] = []
    for copy, origin in skeleton.tied.items():
        pair = outputs.get(copy), outputs.get(origin)
        if pair[0] and pair[1] and not _both_equal(tensors, pair[0][0].stored, pair[1][0].stored):
            continue  # stored with different values: transformers does not tie them either
        untied += _settle_tie(copy, origin, outputs, updates, merged)
    _check_names("adapted", set(adapter.updates) - set(outputs) - set(skeleton.tied), base)
    _check_names("quantised", quantised - set(outputs), base)

    of_key = {output.key: output for parts in outputs.values() for output in parts}
    shapes = {
        key: adapter.replaced_shape(updates.get(output.name)) or tensors.shape(output.stored)
        for key, output in of_key.items()
    }
    changed = tuple(key for key, output in of_key.items() if output.name in updates)
    expected: dict[str, int] = {}
    for used in (used for key in changed for used in updates[of_key[key].name].keys):
        expected[used] = expected.get(used, 0) + 1
    return Layout(
        plan=tuple(
            TensorPlan(
                name=key,
                shape=shape,
                dtype=precision.of(of_key[key].name, tensors.dtype(of_key[key].stored)),
            )
            for key, shape in shapes.items()
        ),
        produce=produce,
        changed=changed,
        untied=tuple(untied),
        vocab_size=_new_vocab_size(skeleton, of_key, shapes),
        device=device,
        memory_bytes=room if device == place else None,
        merge_bytes=MERGE_BYTES_PER_ELEMENT,
        expected=expected,
        applied=applied,
    )


def _outputs(skeleton: Skeleton, tensors: TensorFolder) -> dict[str, list[_Output]]:
    """Parameter -> the tensors of the files that make it: one, or one for each expert and piece."""
    outputs: dict[str, list[_Output]] = {}
    for key, place in skeleton.places(tensors.names).items():
        outputs.setdefault(place.name, []).append(_Output(key=key, name=place.name, stored=key, part=place.part))
    return outputs


def _taken_apart(skeleton: Skeleton, whole: dict[str, _Output], base: Path | None) -> dict[str, _Output]:
    """A ZeRO checkpoint's fused experts, as the tensors that the files of such models have."""
    if base is None:
        raise ExportError(
            "This checkpoint's experts are fused as transformers holds them; name the model that was trained with "
            "--base, so that they are written as its files have them."
        )
    with TensorFolder(base) as tensors:
        places = skeleton.places(tensors.names)
    apart = {
        key: _Output(key=key, name=place.name, stored=place.name, part=place.part)
        for key, place in places.items()
        if place.name in whole
    }
    fused = {output.name for output in apart.values()}
    return apart | {key: output for key, output in whole.items() if output.name not in fused}


def _shape(output: _Output, stored: tuple[int, ...]) -> tuple[int, ...]:
    if output.part is None:
        return stored
    return (stored[1] // output.part.pieces, *stored[2:])


def _settle_tie(
    copy: str,
    origin: str,
    outputs: dict[str, list[_Output]],
    updates: dict[str, Update],
    merged: Callable[[_Output, Update | None], torch.Tensor],
) -> list[str]:
    """Keep a tied pair as one tensor, or make it two where their updates differ; returns the names now untied.

    Only one of the pair trained (LoRA on the input embedding, a saved output head): the other must stay as it was.
    """
    kept = origin if origin in outputs else copy
    if kept not in outputs:
        return []
    other = copy if kept == origin else origin
    stored = outputs[kept][0].stored
    outputs.pop(other, None)
    if copy not in updates and origin not in updates:
        return []
    own = {name: _with_shared(name, updates.get(name), updates.get(twin)) for name, twin in _both_ways(copy, origin)}
    values = {name: merged(_Output(key=name, name=name, stored=stored), update) for name, update in own.items()}
    updates |= {name: update for name, update in own.items() if update is not None}
    if torch.equal(values[copy], values[origin]):
        updates.pop(other, None)
        return []
    outputs[other] = [_Output(key=other, name=other, stored=stored)]
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
            "transformers converts its weights on loading in a way that this merge cannot map back."
        )


def _new_vocab_size(
    skeleton: Skeleton, of_key: Mapping[str, _Output], shapes: Mapping[str, tuple[int, ...]]
) -> int | None:
    """Rows of the input embedding, if they differ from the base's."""
    before = skeleton.parameters[skeleton.embedding][0]
    after = {shapes[key][0] for key, output in of_key.items() if output.name == skeleton.embedding}
    return next((rows for rows in after if rows != before), None)


def _both_equal(tensors: TensorSource, copy: str, origin: str) -> bool:
    return copy in tensors and origin in tensors and torch.equal(tensors.get(copy), tensors.get(origin))
