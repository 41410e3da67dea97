"""What one task wants otherwise than the flags say: NAME.task.json beside NAME.jsonl."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import EvalFileError

__all__ = ["MAX_STOP_STRINGS", "TaskSettings", "read_settings", "settings_file"]

SUFFIX = ".task.json"
MAX_STOP_STRINGS = 4  # vLLM refuses more from 0.28 on, as OpenAI's API does


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """Each field None: as the flag says.  `stop`: texts that end an answer (they are cut off with what follows)."""

    metrics: tuple[str, ...] | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    samples: int | None = None
    stop: tuple[str, ...] = ()
    system_prompt: str | None = None


def settings_file(path: Path) -> Path:
    """orders.jsonl → orders.task.json."""
    return path.with_name(path.stem + SUFFIX)


def read_settings(path: Path) -> TaskSettings:
    """The settings beside the evaluation file `path`; none where there is no such file.

    Raises EvalFileError with every key that is unknown or has a wrong value.
    """
    file = settings_file(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return TaskSettings()
    except (OSError, UnicodeDecodeError) as error:
        raise EvalFileError(f"task settings {file} cannot be read: {error}") from error
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvalFileError(f"task settings {file} are not JSON: {error}") from None
    if not isinstance(given, dict):
        raise EvalFileError(f'task settings {file} hold a {type(given).__name__}; write an object, {{"samples": 4}}')
    reasons = [reason for key, value in given.items() if (reason := problem_of(key, value))]
    if reasons:
        raise EvalFileError("\n".join([f"task settings {file} cannot be used", *(f"  {reason}" for reason in reasons)]))
    lists = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in given.items() if key in LISTS}
    return TaskSettings(**(given | lists))


def problem_of(key: str, value: Any) -> str | None:
    """What is wrong with one entry."""
    if key not in WANTED:
        near = difflib.get_close_matches(key, WANTED, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]}?" if near else ""
        return f"{key!r} is no setting of a task.{guess} There are: {', '.join(WANTED)}."
    wanted, holds = WANTED[key]
    return None if holds(value) else f"{key} must be {wanted}, not {json.dumps(value, ensure_ascii=False)}"


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def texts(value: Any) -> bool:
    """A text or a non-empty list of them, none empty."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item for item in items)


def stops(value: Any) -> bool:
    return texts(value) and (isinstance(value, str) or len(value) <= MAX_STOP_STRINGS)


def text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


WANTED: Mapping[str, tuple[str, Any]] = {
    "metrics": ("the name of a metric or a list of names", texts),
    "max_new_tokens": ("a whole number from 1 on", whole),
    "temperature": ("a number from 0 on", share),
    "samples": ("a whole number from 1 on", whole),
    "stop": (f"a text or a list of at most {MAX_STOP_STRINGS} texts", stops),
    "system_prompt": ("a text", text),
}
LISTS = ("metrics", "stop")
