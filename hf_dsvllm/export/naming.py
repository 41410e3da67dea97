"""What the tensors in a model's files are called in the model, and which of its parameters share their values.

transformers renames some tensors on loading and fuses the experts of a mixture into one parameter; adapters and ZeRO
checkpoints speak of parameters, files of tensors.  transformers' own rules are asked, on a model without memory.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.precision import held_in_fp32

__all__ = ["Part", "Place", "Skeleton", "read_skeleton"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a fused parameter [experts, rows, columns] a tensor in the files is: piece `piece` of `pieces`."""

    expert: int
    piece: int
    pieces: int

    def rows(self, fused_rows: int) -> slice:
        """Its rows in the fused weight of its expert."""
        rows = fused_rows // self.pieces
        return slice(self.piece * rows, (self.piece + 1) * rows)

    def span(self, fused: tuple[int, ...]) -> tuple[int, int]:
        """Where it begins and ends in the flattened parameter of shape [experts, rows, columns]."""
        _, rows, columns = fused
        mine = self.rows(rows)
        return (self.expert * rows + mine.start) * columns, (self.expert * rows + mine.stop) * columns


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The parameter that a tensor in the files becomes, as a whole or as a part of it."""

    name: str
    part: Part | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """What a model without memory tells: its parameters, `{copy: origin}` of the tied ones, how files name them.

    `transposed` are modules whose fused weights are [experts, in, out] instead of [experts, out, in]; `held` is
    `held_in_fp32` of the model.
    """

    parameters: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    prefix: str
    embedding: str
    transposed: frozenset[str]
    held: tuple[str, ...]
    renamings: Sequence[Any]
    converters: Sequence[Any]

    def place(self, key: str) -> Place:
        """Key in a file -> parameter; ExportError for a conversion that a merge cannot take apart again."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, dict(self.parameters))
        if pattern is None:
            return Place(name=name)
        converter = next(each for each in self.converters if pattern in each.source_patterns)
        return Place(name=name, part=_part(key, pattern, converter))

    def places(self, keys: Iterable[str]) -> dict[str, Place]:
        """`place` of every key."""
        return {key: self.place(key) for key in keys}


def read_skeleton(folder: Path) -> Skeleton:
    """Build the model of `folder`/config.json on the meta device: names, shapes and ties, no memory.

    Raises ExportError for a model with Python code of its own, which is not run here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    model = _on_meta(folder)
    transforms = get_model_conversion_mapping(model)
    embedding = model.get_input_embeddings()
    return Skeleton(
        parameters={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tied=dict(model.all_tied_weights_keys),
        prefix=model.base_model_prefix,
        embedding=next(f"{name}.weight" for name, module in model.named_modules() if module is embedding),
        transposed=frozenset(name for name, module in model.named_modules() if getattr(module, "is_transposed", False)),
        held=held_in_fp32(model),
        renamings=[each for each in transforms if not isinstance(each, WeightConverter)],
        converters=[each for each in transforms if isinstance(each, WeightConverter)],
    )


def _on_meta(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        if "auto_map" not in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            raise
        raise ExportError(
            f"{folder} is a model with Python code of its own, which is not run here: it cannot be merged or exported. "
            "Its weights stay as they were saved; --export_to none leaves the export out."
        ) from error


def _part(key: str, pattern: str, converter: Any) -> Part:
    """Experts stacked along the first dimension, their pieces (gate, up) joined along the second; nothing else."""
    operations = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    stacked = operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    if not stacked or found is None or not found.groups():
        raise ExportError(
            f"transformers converts {key} on loading by {[name for name, _ in operations]}, which this merge cannot "
            "take apart again; merge this adapter with PEFT itself."
        )
    patterns = list(converter.source_patterns)
    return Part(expert=int(found[1]), piece=patterns.index(pattern), pieces=len(patterns))
