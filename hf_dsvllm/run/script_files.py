"""The files a script takes its arguments from: YAML or JSON, and `<script>.args`; without framework, as far as we look.

YAML and JSON stand after `--config`, or are the script's only argument, as transformers' examples have it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_dsvllm.errors import Problem

__all__ = ["ConfigFile", "args_file", "config_file", "read_mapping"]

SUFFIXES = (".yaml", ".yml", ".json")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """`typed` is its name as it stands on the command line."""

    typed: str
    values: dict[str, Any]

    def text_without(self, names: Sequence[str], more: Mapping[str, Any]) -> str:
        """Its values but `names`, and `more`, in its own format."""
        kept = {key: value for key, value in self.values.items() if key not in names} | more
        if self.typed.endswith(".json"):
            return json.dumps(kept, indent=2)
        return str(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)).rstrip()


def config_file(script_args: Sequence[str]) -> tuple[ConfigFile | None, list[Problem]]:
    """The YAML or JSON file of the script's arguments; None without one."""
    words = list(script_args)
    after = next((words[n + 1] for n, word in enumerate(words[:-1]) if word == "--config"), None)
    joined = next((word.partition("=")[2] for word in words if word.startswith("--config=")), None)
    typed = after or joined or (words[0] if len(words) == 1 and Path(words[0]).is_file() else "")
    if not typed.endswith(SUFFIXES):
        return None, []
    values, problems = read_mapping(Path(typed), f"--config {typed}" if after or joined else typed)
    return ConfigFile(typed=typed, values=values), problems


def read_mapping(file: Path, called: str) -> tuple[dict[str, Any], list[Problem]]:
    """The file's keys and values, {} for one that holds something else."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {}, [Problem(f"{called} cannot be read: {error}", "correct the file or its name")]
    return (content if isinstance(content, dict) else {}), []


def args_file(file: Path | None) -> tuple[str, list[str]]:
    """`<script>.args`, which HfArgumentParser puts in front of the command line: its name and its words."""
    found = file.with_suffix(".args") if file is not None else None
    if found is None or not found.is_file():
        return "", []
    return str(found), found.read_text(encoding="utf-8").split()
