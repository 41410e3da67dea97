"""The TrainerCallback that ties snapshots, engine and scores to the Trainer's log, best checkpoint and early stop."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hf_dsvllm._compat import log_through_trainer, note_best
from hf_dsvllm.console import is_main_process, say
from hf_dsvllm.errors import DsvllmError
from hf_dsvllm.files import write_json
from hf_dsvllm.measure import RunMeasure
from hf_dsvllm.snapshot import SNAPSHOTS, Snapshot, prune, publish
from hf_dsvllm.wiring import check_wiring, read_wiring

if TYPE_CHECKING:
    from hf_dsvllm.session import Session

__all__ = ["SessionCallback", "Steering", "broadcast", "steers"]

logger = logging.getLogger(__name__)
FAILURES_BEFORE_GIVING_UP = 3


class SessionCallback(TrainerCallback):
    """Checks the wiring at the start, evaluates by generation on the way, exports at the end.

    Every hook runs on every rank; what only rank 0 does is followed by a broadcast, so that no rank goes on alone.
    """

    def __init__(self, session: Session, trainer: Any) -> None:
        self.session = session
        self.trainer = trainer
        self.measure = RunMeasure()
        self._evaluated: dict[int, dict[str, float]] = {}
        self._failures = 0
        self._published: Snapshot | None = None
        self.fresh_scores: dict[str, float] = {}

    # -- hooks -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._published = None
        wiring = read_wiring(self.trainer)
        check_wiring(wiring, self.session.preset, self.session.ds_config)
        say(f"running: {wiring.line()}")
        self.session.start_record(self.trainer, wiring)
        if self.session.evaluates and args.gen_eval_on_start:
            # The engine started from the very model a fresh run starts from; a resumed run must publish its own.
            self._evaluate(publish_first=state.global_step > 0)
        self.measure.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure.step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure.step_ends()
        every = args.gen_eval_steps
        if not self.session.evaluates or every is None or state.global_step % every:
            return
        self.fresh_scores = self._evaluate()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not self.session.evaluates or metrics is None or metrics is self.fresh_scores:
            return
        if args.gen_eval_steps is None or steers(args):
            # The Trainer reads this very dictionary for metric_for_best_model and early stopping.
            metrics.update(self._evaluated.get(state.global_step) or self._evaluate())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        grad_norm = (logs or {}).get("grad_norm")
        if isinstance(grad_norm, int | float) and not math.isfinite(grad_norm):
            self.measure.skipped_steps += 1
            say(
                f"step {state.global_step}: the gradient norm is {grad_norm}; DeepSpeed skips such a step without a "
                f"word ({self.measure.skipped_steps} seen so far). Lower the learning rate or check the data."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure.stop(state)
        if self.session.evaluates and state.global_step not in self._evaluated:
            self._evaluate()
        snapshot = self._published
        # With load_best_model_at_end the weights are no longer those of the last step.
        if snapshot is None or snapshot.step != state.global_step or args.load_best_model_at_end:
            snapshot = self._publish()
        self.session.stop_engine()
        self.session.finish(self.measure, snapshot)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _publish(self) -> Snapshot:
        self._published = publish(
            self.trainer.model,
            self.session.run_dir,
            step=self.trainer.state.global_step,
            dtype=self.session.snapshot_dtype,
            tokenizer=self.trainer.processing_class,
        )
        return self._published

    def _evaluate(self, *, publish_first: bool = True) -> dict[str, float]:
        """One evaluation on all ranks; {} when it failed, which is said and never stops training."""
        step = self.trainer.state.global_step
        if self._failures >= FAILURES_BEFORE_GIVING_UP:
            return {}
        scores: dict[str, float] = {}
        error: str | None = None
        training = self.trainer.model.training
        try:
            started = time.monotonic()
            snapshot = self._publish() if publish_first else None
            published = time.monotonic() - started
            if is_main_process():
                result = self.session.evaluator.evaluate(step, snapshot, published)
                scores = dict(result.scores)
                self.measure.evaluations.append(result)
                say(result.line())
                if publish_first:
                    self._keep_best(scores, step)
        except Exception as problem:  # whatever it is: the other ranks wait in the broadcast, and training goes on
            if not isinstance(problem, DsvllmError | OSError):
                logger.exception("unexpected error in generation evaluation")
            error = f"{type(problem).__name__}: {problem}"
        self.trainer.model.train(training)
        scores, error = broadcast((scores, error))
        if error is not None:
            self._failures += 1
            self._published = None  # on every rank, whichever failed: publishing again takes all of them
            given_up = "; giving up on it" if self._failures >= FAILURES_BEFORE_GIVING_UP else ""
            say(f"step {step}: generation evaluation failed and is skipped{given_up}. {error}")
            return {}
        self._failures = 0
        self._evaluated[step] = scores
        log_through_trainer(self.trainer, scores)
        return scores

    def _keep_best(self, scores: dict[str, float], step: int) -> None:
        """Point snapshots/best.json to the best step by the steering metric, or by the first one logged; rank 0."""
        args = self.trainer.args
        wanted = args.metric_for_best_model if steers(args) else next(iter(scores), None)
        key = wanted if wanted in scores else f"eval_{wanted}"
        if key not in scores:
            return
        better = args.greater_is_better is not False or not steers(args)
        pointer = self.session.run_dir / SNAPSHOTS / "best.json"
        earlier = best_so_far(pointer, key, before=step)
        if earlier is None or (scores[key] > earlier if better else scores[key] < earlier):
            kind = "adapter" if hasattr(self.trainer.model, "peft_config") else "full"
            best = {"path": f"step-{step}", "step": step, "kind": kind, "metric": key, "score": scores[key]}
            write_json(pointer, best)
        prune(self.session.run_dir, keep=[Path(f"step-{step}")])


class Steering(TrainerCallback):
    """Comes last, when the Trainer's own callbacks have decided: makes scores count, and their absence harmless."""

    def __init__(self, scores: SessionCallback, trainer: Any) -> None:
        self.scores = scores
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give early stopping and the best checkpoint a score that came between the Trainer's own evaluations."""
        fresh = self.scores.fresh_scores
        if fresh and steers(args) and not control.should_evaluate:
            self.trainer.callback_handler.on_evaluate(args, state, control, fresh)
            if note_best(self.trainer, fresh) and args.save_strategy == "best":
                control.should_save = True
        self.scores.fresh_scores = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """The Trainer raises KeyError without its metric; after a failed evaluation the best value so far stands in.

        It is never a new best, and early stopping has already passed over the gap.
        """
        wanted = args.metric_for_best_model or ""
        key = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
        if metrics is None or not key.startswith("eval_gen_") or key in metrics:
            return
        worst = -math.inf if args.greater_is_better is not False else math.inf
        metrics[key] = worst if state.best_metric is None else state.best_metric


def steers(args: Any) -> bool:
    """Whether a generation score decides which checkpoint is best."""
    return (args.metric_for_best_model or "").removeprefix("eval_").startswith("gen_")


def best_so_far(pointer: Path, key: str, *, before: int) -> float | None:
    """The score in best.json, if it is of the same metric and an earlier step (a resumed run goes on from it)."""
    try:
        best = json.loads(pointer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return best["score"] if best.get("metric") == key and best["step"] < before else None


def broadcast(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
