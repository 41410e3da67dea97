"""The scores of earlier evaluations by prompt, so that a new one can be held against the first and the best of them.

A resumed run finds them again in evals/step-*.TASK.jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.metrics import score_key as metric_key
from hf_dsvllm.metrics import summarise
from hf_dsvllm.statistics import Comparison, Reference, compare

__all__ = ["ANSWERS", "EVALS", "ScoreHistory", "answers_file", "metric_key"]

EVALS = "evals"
ANSWERS = re.compile(r"step-(\d+)\.(.+)\.jsonl")
Column = Mapping[str, float | None]


def answers_file(run_dir: Path, step: int, task: str) -> Path:
    """Where the answers of one task at one step are kept."""
    return run_dir / EVALS / f"step-{step:06d}.{task}.jsonl"


class ScoreHistory:
    """Of each metric the scores at step 0 and at the best step so far, prompt by prompt."""

    def __init__(self, run_dir: Path, *, lower_is_better: Collection[str] = ()) -> None:
        """`lower_is_better`: metric keys of which the lowest mean is the best."""
        self.run_dir = run_dir
        self.lower_is_better = frozenset(lower_is_better)
        self._base: dict[str, Reference] = {}
        self._best: dict[str, tuple[float, Reference]] = {}
        self._last_step: int | None = None

    def compare(self, step: int, columns: Mapping[str, Column]) -> dict[str, Comparison]:
        """The scores of `step` by metric key and prompt, against step 0 and the best earlier step; then remembered.

        A metric with nothing to be held against, or without a single score, is left out.
        """
        if self._last_step is None or step <= self._last_step:  # the first evaluation of a process, or one again
            self._read(before=step)
        self._last_step = step
        found: dict[str, Comparison] = {}
        for key, column in columns.items():
            base, best = self._base.get(key), self._best.get(key)
            if (base or best) and any(value is not None for value in column.values()):
                found[key] = compare(
                    column,
                    base=base,
                    best=best[1] if best else None,
                    higher_is_better=key not in self.lower_is_better,
                )
            self._remember(step, key, column)
        return found

    def _remember(self, step: int, key: str, column: Column) -> None:
        if all(value is None for value in column.values()):
            return
        reference = Reference(step=step, scores=dict(column))
        if step == 0:
            self._base[key] = reference
        mean, earlier = summarise(list(column.values())).mean, self._best.get(key)
        better = earlier is None or (mean < earlier[0] if key in self.lower_is_better else mean > earlier[0])
        if better:
            self._best[key] = (mean, reference)

    def _read(self, *, before: int) -> None:
        """Start again from the files of the steps before `before`."""
        self._base, self._best = {}, {}
        named = ((ANSWERS.fullmatch(path.name), path) for path in (self.run_dir / EVALS).glob("step-*.jsonl"))
        files = sorted((int(found[1]), found[2], path) for found, path in named if found)
        for step, task, path in files:
            if step < before:
                for metric, column in read_columns(path).items():
                    self._remember(step, metric_key(task, metric), column)


def read_columns(path: Path) -> dict[str, dict[str, float | None]]:
    """Scores by metric and prompt of one file; lines that are broken or hold none are passed over."""
    columns: dict[str, dict[str, float | None]] = {}
    for row in read_rows(path):
        scores = row.get("scores")
        for metric, value in scores.items() if isinstance(scores, dict) else ():
            number = float(value) if isinstance(value, int | float) else None
            columns.setdefault(str(metric), {})[str(row.get("id"))] = number
    return columns


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole objects of a JSONL file; none of a file that is not there."""
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError:
        return
