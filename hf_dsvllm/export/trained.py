"""What training knows and its weights do not say: when the model stops, how it draws its tokens, the data it saw.

TRL's `eos_token` and the Trainer's `align_special_tokens` change the live model.  An adapter's files have none of that,
and an export with the base's own settings would write past the end it was trained to write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import write_json

__all__ = ["GENERATION_CONFIG", "check_trained", "trained_record", "with_special_tokens", "write_generation_config"]

GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Names that `load_dataset` gives to data of any origin.
NAMELESS = (None, "arrow", "csv", "default", "generator", "json", "pandas", "parquet", "text")


def trained_record(trainer: Any) -> dict[str, Any]:
    """`generation` and `data` of run.json, from a trainer whose training begins."""
    config = trainer.model.config.get_text_config()
    generation = getattr(trainer.model, "generation_config", None)
    dataset = trainer.train_dataset
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return {
        "generation": {
            "special_tokens": {key: getattr(config, key, None) for key in SPECIAL_TOKENS},
            "config": None if generation is None else json.loads(generation.to_json_string()),
        },
        "data": {
            "name": None if name in NAMELESS else name,
            "rows": len(dataset) if hasattr(dataset, "__len__") else None,
        },
    }


def with_special_tokens(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json with the special tokens as trained; models of several parts keep them in `text_config`."""
    if generation is None:
        return dict(config)
    tokens, nested = generation["special_tokens"], config.get("text_config")
    return {**config, "text_config": {**nested, **tokens}} if isinstance(nested, dict) else {**config, **tokens}


def write_generation_config(folder: Path, generation: Mapping[str, Any] | None, file: Path | None) -> None:
    """As trained, if that is on record, else a copy of `file`, if there is one."""
    if generation is not None and generation["config"] is not None:
        write_json(folder / GENERATION_CONFIG, generation["config"])
    elif file is not None:
        (folder / GENERATION_CONFIG).write_bytes(file.read_bytes())


def check_trained(folder: Path, generation: Mapping[str, Any] | None) -> None:
    """transformers reads the special tokens and the generation config as trained; ExportError otherwise."""
    if generation is None:
        return
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    pairs = {key: (getattr(config, key, None), value) for key, value in generation["special_tokens"].items()}
    if generation["config"] is not None:
        found = GenerationConfig.from_pretrained(folder).to_diff_dict()
        trained = GenerationConfig.from_dict(dict(generation["config"])).to_diff_dict()
        pairs |= {
            f"generation_config.{key}": (found.get(key), trained.get(key)) for key in found.keys() | trained.keys()
        }
    wrong = {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and "transformers_version" not in key}
    if wrong:
        said = ", ".join(f"{key}={found!r} instead of {trained!r}" for key, (found, trained) in sorted(wrong.items()))
        raise ExportError(f"transformers reads the export otherwise than it was trained: {said}.")
