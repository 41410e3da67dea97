"""Answers that are JSON."""

from __future__ import annotations

import json
from typing import Any

from hf_dsvllm.metrics.base import Metric

__all__ = ["METRICS", "json_equal", "parse_json", "same_json"]


def json_equal(completion: str, reference: str) -> bool:
    """The whole completion parses as JSON and equals the reference: 1 equals 1.0, true is not 1, key order is free.

    Text around the JSON, NaN, Infinity and a repeated key make the completion wrong.
    """
    expected = parse_json(reference)
    try:
        return same_json(parse_json(completion), expected)
    except (ValueError, RecursionError):
        return False


def parse_json(text: str) -> Any:
    """Strict JSON: raises ValueError on NaN, Infinity, a repeated key, or anything after the value."""
    return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=object_without_repeats)


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object repeats a key")
    return value


def same_json(left: Any, right: Any) -> bool:
    """Deep equality in which true and 1 differ, although Python calls them equal."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same_json(a, b) for a, b in zip(left, right, strict=True))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def check_json(reference: str) -> str | None:
    try:
        parse_json(reference)
    except (ValueError, RecursionError) as error:
        return f"the reference is not JSON, which json_equal needs: {error}"
    return None


METRICS = (Metric(name="json_equal", function=json_equal, check_reference=check_json, right_or_wrong=True),)
