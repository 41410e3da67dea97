"""Rounds of evaluation: begun at a step by all ranks, answered in a thread of rank 0, their scores on every rank.

Whoever needs the scores at once waits for them; with a GPU of its own, or on another host, vLLM answers while training
goes on, and the scores of a step arrive some steps later.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from hf_dsvllm.console import is_main_process
from hf_dsvllm.errors import DsvllmError
from hf_dsvllm.evaluation.delivery import Asked
from hf_dsvllm.ranks import Ranks

__all__ = ["Round", "Rounds"]

logger = logging.getLogger(__name__)
POLL_S = 0.5  # a wait without a limit would keep Ctrl-C from the main thread


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A finished evaluation of `step`: scores by metric key, or the error that ended it; `result` on rank 0 only."""

    step: int
    scores: Mapping[str, float]
    error: str | None = None
    result: Any = None


class _Line:
    """What goes to one thread and comes back from it; one that is `over` is asked nothing more."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[Round] = queue.SimpleQueue()
        self.over = False


class Rounds:
    """The evaluations under way, in order; `pending` is the same on every rank."""

    def __init__(self, evaluate: Callable[[Asked], Any], ranks: Ranks) -> None:
        """`evaluate` returns a result with `scores`; called on rank 0, in a thread."""
        self.evaluate = evaluate
        self.ranks = ranks
        self.pending: list[int] = []
        self._line = _Line()
        self._thread: threading.Thread | None = None

    def begin(self, asked: Asked) -> None:
        """Ask for an evaluation; on every rank, no waiting."""
        self.pending.append(asked.step)
        if not is_main_process():
            return
        if self._thread is None:
            # A daemon: an interrupted run must not wait for answers nobody will read.
            self._thread = threading.Thread(
                target=self._work, args=(self._line,), name="generation evaluation", daemon=True
            )
            self._thread.start()
        self._line.asked.put(asked)

    def collect(self, *, leave: int | None = None) -> list[Round]:
        """The rounds that have finished since the last call, oldest first; collective, free when none is pending.

        `leave`: wait until at most so many are pending; None never waits.
        """
        if not self.pending:
            return []
        found: list[Round] = self._finished(leave) if is_main_process() else []
        bare = [dataclasses.replace(done, result=None) for done in found]
        told: list[Round] = self.ranks.broadcast(bare)
        self.pending = self.pending[len(told) :]
        return found if is_main_process() else told

    def close(self) -> None:
        """End the thread, all of whose rounds are collected; a later `begin` starts another."""
        if self._thread is not None:
            self._line.asked.put(None)
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        """Forget every round under way, of a training that was interrupted; on every rank, no waiting."""
        self._line.over = True
        self._line.asked.put(None)
        self.pending, self._line, self._thread = [], _Line(), None

    def _finished(self, leave: int | None) -> list[Round]:
        found = []
        while len(found) < len(self.pending):
            must_wait = leave is not None and len(self.pending) - len(found) > leave
            try:
                found.append(self._line.done.get(timeout=POLL_S) if must_wait else self._line.done.get_nowait())
            except queue.Empty:
                if not must_wait:
                    break
        return found

    def _work(self, line: _Line) -> None:
        while (asked := line.asked.get()) is not None and not line.over:
            try:
                result = self.evaluate(asked)
                done = Round(step=asked.step, scores=dict(result.scores), result=result)
            except Exception as problem:  # whatever it is: the ranks wait for an answer, and training goes on
                if not isinstance(problem, DsvllmError | OSError):
                    logger.exception("unexpected error in generation evaluation")
                done = Round(step=asked.step, scores={}, error=f"{type(problem).__name__}: {problem}")
            line.done.put(done)
