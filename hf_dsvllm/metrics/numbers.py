"""The number an answer ends with."""

from __future__ import annotations

import re
from decimal import Decimal

from hf_dsvllm.metrics.base import Metric

__all__ = ["METRICS", "last_number", "number_match"]

NUMBER = re.compile(
    r"(?:(?<![0-9])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}\b)?"
)


def number_match(completion: str, reference: str) -> bool:
    """The last number of the completion equals the last number of the reference (1,200 = 1200.0 = 1.2e3)."""
    expected, found = last_number(reference), last_number(completion)
    return found is not None and found == expected


def last_number(text: str) -> Decimal | None:
    """The last decimal number in `text`; commas may separate thousands."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def check_number(reference: str) -> str | None:
    return (
        None if NUMBER.search(reference) else f"the reference {reference!r} holds no number, which number_match needs"
    )


METRICS = (Metric(name="number_match", function=number_match, check_reference=check_number, right_or_wrong=True),)
