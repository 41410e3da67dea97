"""Scores that decide: the best checkpoint, early stopping, and which snapshot is kept as the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_dsvllm._compat import note_best, quiet_early_stopping
from hf_dsvllm.fields import metric_key, steers
from hf_dsvllm.files import write_json
from hf_dsvllm.snapshot import SNAPSHOTS

if TYPE_CHECKING:
    from hf_dsvllm.callback import SessionCallback

__all__ = ["BestSnapshot", "Steering", "best_snapshot", "keep_best"]

POINTER = "best.json"
BestSnapshot = dict[str, Any]


class Steering(TrainerCallback):
    """Comes last, when the Trainer's own callbacks have decided: makes scores count, and their absence harmless."""

    def __init__(self, scores: SessionCallback, trainer: Any) -> None:
        self.scores = scores
        self.trainer = trainer
        if scores.late:
            quiet_early_stopping()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give early stopping and the best checkpoint the scores that arrived between the Trainer's evaluations."""
        fresh, self.scores.fresh = self.scores.fresh, []
        if not steers(args):
            return
        for step, scores in fresh:
            if step == state.global_step and control.should_evaluate:
                continue  # the Trainer's own evaluation of this step will see them
            metrics = dict(scores)
            self.scores.passing_on = metrics
            self.trainer.callback_handler.on_evaluate(args, state, control, metrics)
            self.scores.passing_on = None
            if note_best(self.trainer, metrics, step=step) and args.save_strategy == "best":
                control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """The Trainer raises KeyError without its metric: the best so far stands in for a score that failed or is late.

        It is never a new best, and early stopping has already passed over the gap.
        """
        key = metric_key(args)
        if metrics is None or not key.startswith("eval_gen_") or key in metrics:
            return
        worst = -math.inf if args.greater_is_better is not False else math.inf
        metrics[key] = worst if state.best_metric is None else state.best_metric


def keep_best(run_dir: Path, args: Any, scores: Mapping[str, float], snapshot_name: str, step: int, kind: str) -> None:
    """Point snapshots/best.json to the best step by the steering metric, or by the first one logged; rank 0.

    `kind`: "adapter" or "full".  A step whose score is missing changes nothing.
    """
    key = metric_key(args) if steers(args) else next(iter(scores), "")
    if key not in scores:
        return
    better = args.greater_is_better is not False or not steers(args)
    pointer = run_dir / SNAPSHOTS / POINTER
    earlier = best_so_far(pointer, key, before=step)
    if earlier is None or (scores[key] > earlier if better else scores[key] < earlier):
        best: BestSnapshot = {"path": snapshot_name, "step": step, "kind": kind, "metric": key, "score": scores[key]}
        write_json(pointer, best)


def best_so_far(pointer: Path, key: str, *, before: int) -> float | None:
    """The score in best.json, if it is of the same metric and an earlier step (a resumed run goes on from it)."""
    best = read_pointer(pointer)
    return best["score"] if best is not None and best.get("metric") == key and best["step"] < before else None


def best_snapshot(run_dir: Path, args: Any) -> BestSnapshot | None:
    """What best.json says, if it was chosen by the metric that steers this run and its folder is there."""
    best = read_pointer(run_dir / SNAPSHOTS / POINTER)
    if best is None or best.get("metric") != metric_key(args):
        return None
    return best if (run_dir / SNAPSHOTS / best["path"]).is_dir() else None


def read_pointer(pointer: Path) -> BestSnapshot | None:
    try:
        best = json.loads(pointer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return best if isinstance(best, dict) else None
