"""What a metric is: a named function of an answer and its reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["BATCH_S", "BatchFunction", "Metric", "Question", "ScoreFunction", "shorten"]

BATCH_S = 300.0  # bound of one batch: the other ranks wait meanwhile, 1800 s at most (transformers' ddp_timeout)
ScoreFunction = Callable[[str, str], float | bool]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One answer to score; `prompt` is what was asked (text or chat messages), or None where it is not known."""

    sample_id: str
    completion: str
    reference: str
    prompt: str | Sequence[Mapping[str, Any]] | None = None


BatchFunction = Callable[[Sequence[Question]], Sequence[float | bool | None]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A named scoring function; `check_reference` returns why a reference cannot be used, or None.

    `right_or_wrong`: every score is 1 or 0, so that pass@k means something.

    `batch`, where there is one, scores many answers at a time (for metrics that wait for other processes); it gives
    None for an answer it could not score.
    """

    name: str
    function: ScoreFunction
    check_reference: Callable[[str], str | None] | None = None
    batch: BatchFunction | None = None
    right_or_wrong: bool = False

    def __call__(self, completion: str, reference: str) -> float | bool:
        return self.function(completion, reference)


def shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
