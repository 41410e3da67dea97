"""evals/step-*.TASK.jsonl → the prompts worth looking at, each with its answers at a few steps.

A page of 10,000 prompts is read by nobody: what is shown is bounded, chosen by what changed, and said.  Files are
read line by line; of prompts that are not shown only the score is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hf_dsvllm.report.records import Answer, Sample, TaskAnswers
from hf_dsvllm.report.tolerant import mapping, number, parse_line, say_skipped, word

__all__ = ["MAX_TASKS", "read_tasks", "spread"]

FILE = re.compile(r"step-(\d+)\.(.+)\.jsonl")
MAX_TASKS = 12
MAX_STEPS = 5  # side by side
MAX_SAMPLES = 48  # on the page; with several tasks each has its share, but at least:
MIN_SAMPLES = 4
GROUPS = ("got worse", "got better", "score nothing", "keep their score")


def read_tasks(evals: Path, best_step: int | None) -> tuple[tuple[TaskAnswers, ...], tuple[str, ...]]:
    """The tasks of a run in the order of their names, at most `MAX_TASKS`, and sentences about what is left out."""
    files: dict[str, dict[int, Path]] = {}
    for path in sorted(evals.glob("step-*.jsonl")):
        if found := FILE.fullmatch(path.name):
            files.setdefault(found[2], {})[int(found[1])] = path
    shown = sorted(files)[:MAX_TASKS]
    limit = max(MIN_SAMPLES, MAX_SAMPLES // max(1, len(shown)))
    tasks = tuple(read_task(name, files[name], best_step, limit) for name in shown)
    left = sorted(files)[MAX_TASKS:]
    if not files:
        return (), ("There are no answers (evals/step-*.jsonl): the first evaluation has not ended, or there is none.",)
    return tasks, (f"{len(left)} more tasks are not shown: {', '.join(left[:20])}.",) if left else ()


def read_task(name: str, files: Mapping[int, Path], best_step: int | None, limit: int) -> TaskAnswers:
    """The answers of one task; `files` by step."""
    gaps: list[str] = []
    steps = chosen_steps(sorted(files), best_step)
    with contextlib.ExitStack() as stack:
        books = {}
        for step in steps:
            with contextlib.suppress(OSError):  # replaced or removed since it was listed
                books[step] = AnswerFile(stack.enter_context(files[step].open("rb")), files[step].name, gaps)
        books = {step: book for step, book in books.items() if book.scores}
        if not books:
            return TaskAnswers(task=name, total=0, steps=(), steps_total=len(files), samples=(), gaps=tuple(gaps))
        first, last = books[min(books)], books[max(books)]
        ids, why = chosen_samples(first.scores, last.scores, limit)
        gaps += why
        samples = tuple(read_sample(key, books) for key in ids)
        return TaskAnswers(
            task=name, total=len(last.scores), steps=tuple(books), steps_total=len(files), samples=samples,
            gaps=tuple(gaps),
        )  # fmt: skip


class AnswerFile:
    """One open file of answers: `scores` (mean over the metrics, None unscored) by sample id; rows read on demand."""

    def __init__(self, file: BinaryIO, name: str, gaps: list[str]) -> None:
        self.file = file
        self.scores: dict[str, float | None] = {}
        self._offsets: dict[str, int] = {}
        skipped = offset = 0
        for line in file:
            row = parse_line(line)
            if row is not None and "id" in row:
                key = word(row["id"])
                self.scores[key] = mean(sample_scores(row).values())
                self._offsets[key] = offset
            elif line.strip():
                skipped += 1
            offset += len(line)
        say_skipped(name, skipped, gaps)

    def row(self, key: str) -> dict[str, Any] | None:
        """The line of a sample; None where this step has none."""
        if key not in self._offsets:
            return None
        self.file.seek(self._offsets[key])
        return parse_line(self.file.readline())


def sample_scores(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {str(metric): number(value) for metric, value in mapping(row.get("scores")).items()}


def mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def read_sample(key: str, books: Mapping[int, AnswerFile]) -> Sample:
    rows = {step: row for step, book in books.items() if (row := book.row(key)) is not None}
    newest = rows[max(rows)]
    answers = tuple(
        Answer(
            step=step,
            text=word(row.get("answer")),
            finish_reason=word(row.get("finish_reason")),
            scores=sample_scores(row),
            others=tuple(other_answers(row)),
        )
        for step, row in rows.items()
    )
    return Sample(
        id=key, prompt=tuple(messages(newest.get("prompt"))), reference=word(newest.get("reference")), answers=answers
    )


def other_answers(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float | None]]]:
    """Text and scores of every answer but the first, where several were drawn."""
    drawn = row.get("samples")
    for one in drawn[1:] if isinstance(drawn, list) else ():
        told = mapping(one)
        yield word(told.get("answer")), sample_scores(told)


def messages(prompt: Any) -> Iterator[tuple[str, str]]:
    """(role, text) of each message; a text prompt has no role."""
    if not isinstance(prompt, list):
        yield "", word(prompt)
        return
    for message in prompt:
        told = mapping(message)
        text = word(told.get("content")) if "content" in told else word(message)
        if told.get("tool_calls"):
            text = f"{text}\n{word(told['tool_calls'])}".strip()
        yield word(told.get("role")), text


def chosen_steps(steps: Sequence[int], best: int | None) -> list[int]:
    """At most `MAX_STEPS` of the recorded steps: the first, the best, the last, others evenly between."""
    kept = set(spread(steps, MAX_STEPS))
    if best in steps and best not in kept:
        kept.discard(min((step for step in kept if step not in (steps[0], steps[-1])), key=lambda s: abs(s - best)))
        kept.add(best)
    return sorted(kept)


def spread(values: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` (2 or more) of the values at even distances, the first and the last among them."""
    if len(values) <= limit:
        return list(values)
    return [values[round(place * (len(values) - 1) / (limit - 1))] for place in range(limit)]


def chosen_samples(
    first: Mapping[str, float | None], last: Mapping[str, float | None], limit: int
) -> tuple[list[str], list[str]]:
    """Ids to show: all if they are few, else in turn from those that got worse, got better, score nothing, the rest."""
    if len(last) <= limit:
        return list(last), []
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    for key, now in last.items():
        before = first.get(key)
        if before is not None and now is not None and now != before:
            groups["got worse" if now < before else "got better"].append(key)
        else:
            groups["keep their score" if now else "score nothing"].append(key)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    kept = set(itertools.islice((key for key in turns if key is not None), limit))
    parts = [
        f"{sum(key in kept for key in keys):,} of {len(keys):,} that {name}" for name, keys in groups.items() if keys
    ]
    why = (
        f"{len(kept):,} of {len(last):,} prompts are shown, from the first step shown to the last: {', '.join(parts)}."
    )
    return [key for keys in groups.values() for key in keys if key in kept], [why]
