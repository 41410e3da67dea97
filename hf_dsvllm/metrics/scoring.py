"""Answers → scores → their mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_dsvllm.errors import EvalFileError
from hf_dsvllm.metrics.base import Metric, Question, shorten

__all__ = ["Summary", "score", "summarise"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Mean of `count` scores; `standard_error` of that mean, or None below two scores."""

    mean: float
    count: int
    standard_error: float | None


def score(
    metric: Metric,
    completions: Sequence[str],
    references: Sequence[str],
    *,
    sample_ids: Sequence[str] | None = None,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
) -> list[float | None]:
    """One score per completion, in order; `sample_ids` name the samples in errors (default: their positions).

    `prompts` are shown to a judge.  None stands for an answer that a judge could not be asked about.  Raises
    EvalFileError if the metric raises or returns something that is not a finite number.
    """
    names = list(sample_ids) if sample_ids is not None else [str(index) for index in range(len(references))]
    asked = prompts if prompts is not None else [None] * len(references)
    questions = [
        Question(sample_id=name, completion=completion, reference=reference, prompt=prompt)
        for completion, reference, name, prompt in zip(completions, references, names, asked, strict=True)
    ]
    if metric.batch is None:
        return [score_one(metric, question) for question in questions]
    results = metric.batch(questions)
    return [
        None if result is None else as_score(result, metric, question)
        for result, question in zip(results, questions, strict=True)
    ]


def score_one(metric: Metric, question: Question) -> float:
    """See `score`."""
    try:
        result = metric(question.completion, question.reference)
    except Exception as error:
        raise EvalFileError(
            f"metric {metric.name} failed on sample {question.sample_id} with {type(error).__name__}: {error} "
            f"(completion {shorten(question.completion)!r}, reference {shorten(question.reference)!r})"
        ) from error
    return as_score(result, metric, question)


def as_score(result: Any, metric: Metric, question: Question) -> float:
    """What a metric returned as a finite float.  Raises EvalFileError."""
    try:
        value = (
            float(result) if isinstance(result, bool | int | float | np.bool_ | np.integer | np.floating) else math.nan
        )
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise EvalFileError(
            f"metric {metric.name} returned {shorten(repr(result))} ({type(result).__name__}) for sample "
            f"{question.sample_id}; it must return a finite number or a bool"
        )
    return value


def summarise(scores: Sequence[float | None]) -> Summary:
    """mean = sum / n;  standard_error = sample standard deviation / sqrt(n), over the answers that have a score.

    Raises EvalFileError (a ValueError) if there is none.
    """
    known = [value for value in scores if value is not None]
    count = len(known)
    if count == 0:
        raise EvalFileError(f"none of {len(scores)} answers could be scored")
    mean = math.fsum(known) / count
    if count == 1:
        return Summary(mean=mean, count=1, standard_error=None)
    variance = math.fsum((value - mean) ** 2 for value in known) / (count - 1)
    return Summary(mean=mean, count=count, standard_error=math.sqrt(variance / count))
