"""Scores that decide: the best checkpoint, early stopping, and which snapshot is kept as the best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_dsvllm._compat import note_best, quiet_early_stopping
from hf_dsvllm.console import is_main_process, say
from hf_dsvllm.errors import WiringError
from hf_dsvllm.evaluation.rounds import Round
from hf_dsvllm.fields import metric_key, steers
from hf_dsvllm.files import write_json
from hf_dsvllm.live.restore import restore
from hf_dsvllm.live.snapshot import SNAPSHOTS, Snapshot

if TYPE_CHECKING:
    from hf_dsvllm.callback import SessionCallback
    from hf_dsvllm.ranks import Ranks

__all__ = [
    "BestSnapshot",
    "Steering",
    "beats",
    "best_snapshot",
    "deciding_key",
    "is_best",
    "keep_best",
    "load_best",
    "loaded_step",
    "score_at",
    "why_undecided",
]

POINTER = "best.json"
WANTED = ("should_evaluate", "should_save", "should_log")  # of this step, of TrainerControl
BestSnapshot = dict[str, Any]


class Steering(TrainerCallback):
    """Comes last, when the Trainer's own callbacks have decided: makes scores count, and their absence harmless."""

    def __init__(self, scores: SessionCallback, trainer: Any) -> None:
        self.scores = scores
        self.trainer = trainer
        quiet_early_stopping()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give early stopping and the best checkpoint the scores that arrived between the Trainer's evaluations."""
        fresh, self.scores.fresh = self.scores.fresh, []
        if control.should_evaluate:
            self.scores.make_room_to_evaluate()
        wanted = {name: getattr(control, name) for name in WANTED}
        if not steers(args):
            return
        for step, scores in fresh:
            if step == state.global_step and control.should_evaluate:
                continue  # the Trainer's own evaluation of this step will see them
            metrics = dict(scores)
            self.scores.passed_on.add((step, metric_key(args)))
            self.scores.passing_on = metrics
            self.trainer.callback_handler.on_evaluate(args, state, control, metrics)
            self.scores.passing_on = None
            # The handler takes this for the evaluation the Trainer still has to make, and logs in it for its own.
            for name, before in wanted.items():
                setattr(control, name, getattr(control, name) or before)
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


def keep_best(run_dir: Path, args: Any, done: Round, *, kind: str) -> None:
    """Point snapshots/best.json to the step of `done`, if its score is the best; rank 0.

    `kind`: "adapter" or "full".
    """
    key = deciding_key(args, done)
    if is_best(run_dir, args, done):
        path, score = f"step-{done.step}", done.scores[key]
        best: BestSnapshot = {"path": path, "step": done.step, "kind": kind, "metric": key, "score": score}
        write_json(run_dir / SNAPSHOTS / POINTER, best)


def is_best(run_dir: Path, args: Any, done: Round) -> bool:
    """Whether no earlier step scored as well by the metric that decides; a score that is missing is not."""
    key = deciding_key(args, done)
    if key not in done.scores:
        return False
    higher = args.greater_is_better is not False if steers(args) else done.result.higher_is_better[key]
    return beats(done.scores[key], best_so_far(run_dir / SNAPSHOTS / POINTER, key, before=done.step), higher=higher)


def beats(score: float, other: float | None, *, higher: bool) -> bool:
    """Whether `score` is the better one, `higher`: of a metric of which more is better; None is worse than any."""
    return other is None or (score > other if higher else score < other)


def score_at(args: Any, state: Any, step: int) -> float | None:
    """What the metric that steers was at `step`, by the Trainer's history, which a resumed run has from its start."""
    key = metric_key(args)
    return next((row[key] for row in reversed(state.log_history) if row.get("step") == step and key in row), None)


def deciding_key(args: Any, done: Round) -> str:
    """The metric that steers the run, or else the first one logged of which it is known whether more is better.

    "" where no metric is such a one.  Rank 0, for `done.result`.
    """
    if steers(args):
        return metric_key(args)
    known = done.result.higher_is_better if done.result is not None else {}
    return next((key for key in done.scores if key in known), "")


def why_undecided(args: Any, done: Round) -> str | None:
    """Why no weights can be noted as the best, None if they can; rank 0."""
    key, scores = deciding_key(args, done), ", ".join(done.scores)
    if not done.scores or key in done.scores:
        return None
    if key:
        return f"step {done.step}: {key}, which chooses the best, is not among the scores: {scores}"
    return (
        f"no best snapshot is kept: whether more of {scores} is better is not known. "
        f"--metric_for_best_model {next(iter(done.scores))}, with --greater_is_better false where less is better"
    )


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


def loaded_step(args: Any, state: Any) -> int:
    """The step whose weights the Trainer ends with: the last, or the best one it has a checkpoint of."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return int(state.global_step)
    return int(Path(state.best_model_checkpoint).name.rpartition("-")[2])


def load_best(model: Any, args: Any, state: Any, run_dir: Path, loaded: int, ranks: Ranks) -> Snapshot | None:
    """With load_best_model_at_end: the best snapshot into `model`, unless the weights of its step are `loaded`.

    Returns that snapshot, None where the model keeps its weights; collective.  The Trainer can only load a step it
    wrote a checkpoint of; the best score may belong to one between them, or to one whose checkpoint save_total_limit
    has deleted.
    """
    if not (args.load_best_model_at_end and steers(args)):
        return None
    best = ranks.broadcast(best_snapshot(run_dir, args) if is_main_process() else None)
    if best is None or best["step"] == loaded:
        return None
    if not beats(best["score"], score_at(args, state, loaded), higher=args.greater_is_better is not False):
        return None
    folder = run_dir / SNAPSHOTS / best["path"]
    try:
        restore(model, folder, best["kind"])
    except WiringError as error:
        say(f"the best weights, of step {best['step']}, stay in {folder}; those of step {loaded} are kept: {error}")
        return None
    say(f"the weights of step {best['step']} ({best['metric']} {best['score']:.4g}) are loaded from its snapshot")
    return Snapshot(path=folder, kind=best["kind"], step=int(best["step"]))


def read_pointer(pointer: Path) -> BestSnapshot | None:
    try:
        best = json.loads(pointer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return best if isinstance(best, dict) else None
