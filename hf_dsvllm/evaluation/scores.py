"""Answers of one task → its scores, prompt by prompt, and the rows that are kept of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hf_dsvllm import metrics
from hf_dsvllm.statistics import pass_at_k_scores
from hf_dsvllm.tasks import EvalTask

__all__ = ["Drawn", "TaskScores", "cut_at_stop", "score_task"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One answer: its text and why it ended ("stop", "length")."""

    text: str
    finish_reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """`columns`: score by metric and sample id, None where there is none; `rows`: one JSON object a prompt."""

    columns: Mapping[str, Mapping[str, float | None]]
    rows: Sequence[Mapping[str, Any]]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it (the engine ends there, but its tokens hold the string too)."""
    found = [position for word in stop if (position := text.find(word)) >= 0]
    return text[: min(found)] if found else text


def score_task(task: EvalTask, answers: Sequence[Sequence[Drawn]], *, step: int, model: str) -> TaskScores:
    """Score the answers to each prompt of `task`, all prompts having as many; a prompt's score is their mean.

    With several answers a prompt has `METRIC_pass_at_N` too, for metrics of right and wrong.  Raises EvalFileError as
    `metrics.score` does.
    """
    count = len(answers[0])
    repeated = [sample for sample in task.samples for _ in range(count)]
    texts = [drawn.text for drawn_of_prompt in answers for drawn in drawn_of_prompt]
    ids = [sample.id if count == 1 else f"{sample.id}, answer {n % count + 1}" for n, sample in enumerate(repeated)]
    columns: dict[str, list[float | None]] = {}
    single: dict[str, list[list[float | None]]] = {}
    for spec in task.metrics:
        metric = metrics.resolve(spec)
        flat = metrics.score(
            metric,
            texts,
            [sample.reference for sample in repeated],
            sample_ids=ids,
            prompts=[sample.prompt for sample in repeated],
        )
        grouped = [flat[first : first + count] for first in range(0, len(flat), count)]
        single[metric.name] = grouped
        columns[metric.name] = [mean(values) for values in grouped]
        if count > 1 and metric.right_or_wrong:
            columns[metrics.pass_at(metric.name, count)] = pass_at_k_scores(grouped, count)
    rows = [
        {
            "step": step,
            "id": sample.id,
            "prompt": sample.prompt,
            "reference": sample.reference,
            "answer": drawn[0].text,
            "finish_reason": drawn[0].finish_reason,
            "model": model,
            "scores": {name: values[place] for name, values in columns.items()},
        }
        | ({"samples": each(drawn, {name: values[place] for name, values in single.items()})} if count > 1 else {})
        for place, (sample, drawn) in enumerate(zip(task.samples, answers, strict=True))
    ]
    by_id = {
        name: {sample.id: value for sample, value in zip(task.samples, values, strict=True)}
        for name, values in columns.items()
    }
    return TaskScores(columns=by_id, rows=rows)


def each(drawn: Sequence[Drawn], scores: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    """Every answer to one prompt with its own scores."""
    return [
        {
            "answer": one.text,
            "finish_reason": one.finish_reason,
            "scores": {name: values[n] for name, values in scores.items()},
        }
        for n, one in enumerate(drawn)
    ]


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
