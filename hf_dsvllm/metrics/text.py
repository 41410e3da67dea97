"""Equal, or equal but for what does not matter, or found in the answer."""

from __future__ import annotations

import re
import unicodedata

from hf_dsvllm.metrics.base import Metric

__all__ = ["METRICS", "contains", "exact_match", "normalise", "normalized_match", "regex"]


def exact_match(completion: str, reference: str) -> bool:
    """Equal but for white space at both ends."""
    return completion.strip() == reference.strip()


def normalized_match(completion: str, reference: str) -> bool:
    """Equal after case folding, Unicode NFKC, and replacing punctuation and white space by single spaces.

    A minus sign before a digit and a point or comma between digits stay: -5 is not 5, and 3.5 is not 35.
    """
    return normalise(completion) == normalise(reference)


def contains(completion: str, reference: str) -> bool:
    """The stripped reference stands somewhere in the completion (case matters)."""
    return reference.strip() in completion


def regex(completion: str, reference: str) -> bool:
    """The reference is a Python regular expression that `re.search` finds in the completion."""
    return re.search(reference, completion) is not None


def normalise(text: str) -> str:
    """See `normalized_match`."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = []
    for index, character in enumerate(folded):
        if not unicodedata.category(character).startswith("P"):
            kept.append(character)
            continue
        before_digit = folded[index + 1 : index + 2].isdigit()
        after_word = folded[index - 1 : index].isalnum()
        after_digit = folded[index - 1 : index].isdigit()
        sign = character == "-" and before_digit and not after_word
        separator = character in ".," and before_digit and after_digit
        kept.append(character if sign or separator else " ")
    return " ".join("".join(kept).split())


def check_pattern(reference: str) -> str | None:
    try:
        re.compile(reference)
    except re.error as error:
        return f"the reference {reference!r} is not a regular expression: {error}"
    return None


def check_not_blank(reference: str) -> str | None:
    return None if reference.strip() else "the reference is blank, so `contains` would accept every answer"


def check_not_punctuation(reference: str) -> str | None:
    if normalise(reference) or not reference.strip():
        return None
    return f"the reference {reference!r} is nothing but punctuation, which normalized_match ignores"


METRICS = (
    Metric(name="exact_match", function=exact_match, right_or_wrong=True),
    Metric(
        name="normalized_match",
        function=normalized_match,
        check_reference=check_not_punctuation,
        right_or_wrong=True,
    ),
    Metric(name="contains", function=contains, check_reference=check_not_blank, right_or_wrong=True),
    Metric(name="regex", function=regex, check_reference=check_pattern, right_or_wrong=True),
)
