"""Which arguments the user gave, as far as can be told: one that equals its default may have been asked for."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["note_given", "was_given"]

_NAMES = "_given_names"


def note_given(args: Any, keywords: Mapping[str, Any]) -> None:
    """Remember the keywords `args` are made with, before their constructor fills in the rest."""
    vars(args)[_NAMES] = frozenset(keywords)


def was_given(args: Any, name: str, argv: Sequence[str] | None = None) -> bool:
    """Whether `name` was a keyword; if a parser made `args`, whether the command line or its file has it.

    A parser gives every field, whether its user did or not.  Files are TRL's `--config FILE` and transformers'
    SCRIPT.args.  A value set later, as in `args.name = …`, cannot be told from a default.
    """
    named = vars(args).get(_NAMES)
    if named is not None and not {field.name for field in dataclasses.fields(args) if field.init} <= named:
        return name in named
    argv = sys.argv if argv is None else argv
    return name in {*_flags(argv[1:]), *_of_config(argv[1:]), *_flags(_of_args_file(argv[0]))}


def _flags(words: Iterable[str]) -> set[str]:
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def _of_config(words: Sequence[str]) -> set[str]:
    """The keys of the YAML file after `--config`; what is wrong with it is the parser's to say."""
    import yaml

    if "--config" not in words[:-1]:
        return set()
    try:
        found = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return set(found) if isinstance(found, dict) else set()


def _of_args_file(script: str) -> list[str]:
    path = Path(script).with_suffix(".args") if script else None
    return path.read_text(encoding="utf-8").split() if path is not None and path.is_file() else []
