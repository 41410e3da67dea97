"""Reading files that another process may be writing, or that somebody broke: what can be read is, the rest is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "count",
    "fact",
    "mapping",
    "number",
    "numbers",
    "parse_line",
    "read_lines",
    "read_object",
    "say_skipped",
    "word",
]

HUGE = 1e100  # no figure of a run comes near it; differences of two such numbers are still finite


def read_object(path: Path, gaps: list[str], *, missing: str | None) -> dict[str, Any]:
    """The JSON object in `path`; {} with a sentence in `gaps` where there is none.  `missing` None: absence is fine."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            gaps.append(missing)
        return {}
    except (OSError, ValueError, RecursionError) as error:
        gaps.append(f"{path.name} cannot be read ({type(error).__name__}: {error}).")
        return {}
    if isinstance(value, dict):
        return value
    gaps.append(f"{path.name} holds no JSON object.")
    return {}


def read_lines(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file, a half-written last line and broken ones left out and counted in `gaps`."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        gaps.append(f"{path.name} cannot be read ({error.strerror}).")
        return []
    rows = [parse_line(line) for line in lines if line.strip()]
    say_skipped(path.name, sum(row is None for row in rows), gaps)
    return [row for row in rows if row is not None]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One line of JSONL; None if it is no whole object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def say_skipped(name: str, skipped: int, gaps: list[str]) -> None:
    if skipped:
        what = "1 line is" if skipped == 1 else f"{skipped:,} lines are"
        gaps.append(f"{name}: {what} half-written or broken and left out.")


def number(value: Any) -> float | None:
    """`value` as a float that can be drawn; None for NaN, infinities and the like (a bool is 0 or 1, as in metrics)."""
    if not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < HUGE else None


def count(value: Any) -> int | None:
    """`value` as a whole number from 0 on; None for anything else."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of an object."""
    found = {str(name): number(item) for name, item in mapping(value).items()}
    return {name: item for name, item in found.items() if item is not None}


def word(value: Any) -> str:
    """A text as it stands, "" for None, anything else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def fact(value: Any) -> str:
    """A value as a person reads it: whole numbers with commas."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else word(value)
