"""The TrainerCallback that ties snapshots, engine and scores to the Trainer's log, best checkpoint and early stop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch.distributed import DistError
from transformers import TrainerCallback

from hf_dsvllm._compat import log_through_trainer, note_best
from hf_dsvllm.console import is_main_process, say
from hf_dsvllm.errors import DsvllmError, EngineError
from hf_dsvllm.evaluation.delivery import FREE, GONE, Asked
from hf_dsvllm.evaluation.keeping import Keeping
from hf_dsvllm.evaluation.rounds import Round, Rounds
from hf_dsvllm.evaluation.sample_tables import log_samples
from hf_dsvllm.evaluation.steering import is_best, load_best, loaded_step, why_undecided
from hf_dsvllm.fields import metric_key, steers
from hf_dsvllm.live.gather import put_away
from hf_dsvllm.live.snapshot import SNAPSHOTS, Snapshot, adapters_act, point_to_latest, prune, publish
from hf_dsvllm.live.stream import make_room, send
from hf_dsvllm.measure import RunMeasure
from hf_dsvllm.ranks import from_all, is_distributed
from hf_dsvllm.wiring import check_wiring, read_wiring

if TYPE_CHECKING:
    from hf_dsvllm.engine.sync import SyncResult, WeightSync
    from hf_dsvllm.evaluation.canary import LogProbs
    from hf_dsvllm.session import Session

__all__ = ["SessionCallback"]

T = TypeVar("T")
logger = logging.getLogger(__name__)
FAILURES_BEFORE_GIVING_UP = 3
# Late rounds that may be under way when another is due: one is answered, one is ready to follow.
UNDER_WAY = 2


class SessionCallback(TrainerCallback):
    """Checks the wiring at the start, evaluates by generation on the way, exports at the end.

    Every hook runs on every rank; what only rank 0 does is followed by a broadcast, so that no rank goes on alone.
    `fresh` holds the scores that `steering.Steering` has not passed on yet, `passed_on` names those it has, by step.
    """

    def __init__(self, session: Session, trainer: Any) -> None:
        self.session = session
        self.trainer = trainer
        self.late, self.streams = session.late, session.streams
        self.measure = RunMeasure()
        self.fresh: list[tuple[int, dict[str, float]]] = []
        self.passing_on: dict[str, float] | None = None
        self.passed_on: set[tuple[int, str]] = set()
        self._rounds = Rounds(lambda asked: session.evaluator.evaluate(asked), session.ranks)
        self._evaluated: dict[int, dict[str, float]] = {}
        self._failures = 0
        self._published: Snapshot | None = None
        self._training, self._ended_with = False, -1
        self._trained_before = self._sharded = self._told_undecided = self._moved = self._sleeps = False
        self._keeping = Keeping(session, trainer, self.measure)

    # -- hooks -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keeping.settle(wait=True)  # of a training before, which something ended
        self._published = self.passing_on = None
        self._evaluated, self.fresh, self._failures = {}, [], 0  # a second train() begins with nothing of the first
        self.passed_on, self._training, self._moved = set(), True, False
        self._rounds.abandon()
        self.session.ready_engine(self.trainer)
        # Rank 0 knows where vLLM runs, and what it was started for.
        sleeps = self.session.evaluates and is_main_process() and self.session.evaluator.delivery.sleeps
        known = self.session.ranks.broadcast((self.late, self.session.streams, sleeps))
        self.late, self.streams, self._sleeps = known
        wiring = read_wiring(self.trainer)
        self._sharded = wiring.zero_stage == 3
        check_wiring(wiring, self.session.preset, self.session.ds_config, resumed=state.global_step > 0)
        say(f"running: {wiring.line()}")
        self.session.start_record(self.trainer, wiring)
        if self.session.evaluates and args.gen_eval_on_start:
            # The engine started from the very model a fresh run starts from; others must publish their own.
            changed = self._trained_before or state.global_step > 0 or any(from_all(adapters_act(self.trainer.model)))
            self._evaluate(publish_first=changed)
        elif self.session.evaluates:
            self._together(lambda: self.session.evaluator.delivery.rest_until_asked() if is_main_process() else None)
        self._trained_before = True
        self.measure.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure.step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure.step_ends()
        self.measure.count_skipped(self.trainer)
        if not self.session.evaluates:
            return
        self._keeping.settle(wait=False)
        last = state.global_step >= state.max_steps or control.should_training_stop
        every = args.gen_eval_steps
        with_trainers_own = control.should_evaluate and (every is None or steers(args))
        # At the last step here and not at the end of training: by then the Trainer may have loaded the best weights.
        due = (every is not None and state.global_step % every == 0) or (last and not with_trainers_own)
        if due or self._moved:
            self._evaluate_when_free(last)
        self._take(self._rounds.collect(leave=0 if last else None))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not self.session.evaluates or metrics is None or metrics is self.passing_on:
            return
        if not self._training:  # the user's own evaluate(), before training or of the weights it ended with
            metrics.update(self._evaluated.get(self._ended_with, {}))
            return
        if args.gen_eval_steps is None or steers(args):
            step = state.global_step
            if step not in self._evaluated and step not in self._rounds.pending:
                self._evaluate_when_free(step >= state.max_steps)
                self.fresh = [score for score in self.fresh if score[0] != step]
            # The Trainer reads this very dictionary for metric_for_best_model and early stopping.
            scores = self._evaluated.get(step, {})
            # One that has been passed on already would count twice in early stopping.
            metrics.update({key: score for key, score in scores.items() if (step, key) not in self.passed_on})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.measure.look_at(logs or {}, self.trainer)
        if self._training and is_main_process():
            self.measure.record_so_far(self.session.run_dir / "measured.json", state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure.stop(state)
        loaded = loaded_step(args, state)  # before late scores make another step the best: the Trainer is done loading
        self._take(self._rounds.collect(leave=0))
        self._settle()
        for step, scores in self.fresh if steers(args) else ():
            if metric_key(args) in scores:  # a judge may have been away
                note_best(self.trainer, scores, step=step)
        self._training = False
        put_away(self.trainer.model_wrapped)
        best = load_best(self.trainer.model, args, state, self.session.run_dir, loaded, self.session.ranks)
        if best is not None:
            self._published = best  # written once more, it would be removed first, and lost on a full disk
        step = self._ended_with = loaded if best is None else best.step
        if self.session.evaluates and step == state.global_step and step not in self._evaluated:
            self._evaluate(wait=True)  # something stopped training between two steps
            self._settle()
        snapshot, error = self._together(lambda: self._last_snapshot(step))
        if self.session.evaluates and error is None:
            prune(self.session.run_dir, keep=[])
        self._rounds.close()
        self.session.stop_engine()
        if error is not None or snapshot is None:
            self.session.end_without_weights(error or "this process could not take part in writing them")
        self.session.finish(self.measure, snapshot)

    def make_room_to_evaluate(self) -> None:
        """Before the Trainer's own evaluation, whose batches may take more memory than training: rank 0's copy ends."""
        self._keeping.settle(wait=True)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _publish(self, step: int) -> Snapshot:
        put_away(self.trainer.model_wrapped)  # the Trainer's own evaluation may have come before
        self._published = publish(
            self.trainer.model,
            self.session.run_dir,
            step=step,
            dtype=self.session.snapshot_dtype,
            tokenizer=self.trainer.processing_class,
        )
        return self._published

    def _last_snapshot(self, step: int) -> Snapshot:
        """The snapshot of `step`, whose weights the model has, written unless it is there; the latest of the run."""
        snapshot = self._published
        if snapshot is None or snapshot.step != step:
            snapshot = self._publish(step)
        point_to_latest(self.session.run_dir, snapshot, trained_to=self.trainer.state.global_step)
        return snapshot

    def _settle(self) -> None:
        """Wait for the best weights on their way to the disk; all ranks learn whether they got there; collective.

        The others wait for rank 0's word as long as a disk takes, and not in a collective of the Trainer's.
        """
        self._keeping.settle(wait=True)
        if self.session.evaluates and self.streams:
            lost = self.session.ranks.broadcast(self._keeping.lost)
            if self._published is not None and self._published.step == lost:
                self._published = None

    def _evaluate_when_free(self, last: bool) -> None:
        """Begin a round, where scores are late at the first step at which vLLM takes weights without being waited for.

        Writing 8B would hold training up longer than the steps it moves by.  One that falls due meanwhile is the same.
        """
        state = self._engine_state() if self.late and self.streams and not last else FREE
        if state in (FREE, GONE):
            self._moved = False
            self._evaluate(wait=last)
        elif not self._moved:
            self._moved = True
            step = self.trainer.state.global_step
            say(f"step {step}: vLLM {state}; this evaluation moves to the first step at which it is free")

    def _engine_state(self) -> str:
        """What vLLM does where scores are late: FREE, GONE, or what it is busy with; collective."""
        self._take(self._rounds.collect())
        if self._rounds.pending:
            return f"is still busy with step {self._rounds.pending[0]}"
        asked = is_main_process() and self._failures < FAILURES_BEFORE_GIVING_UP  # after that there is no evaluator
        return self.session.ranks.broadcast(self.session.evaluator.delivery.state if asked else GONE)

    def _evaluate(self, *, publish_first: bool = True, wait: bool = False) -> None:
        """Begin a round on all ranks, and unless rounds are late see it through; a failure is said, never raised."""
        if self._failures >= FAILURES_BEFORE_GIVING_UP:
            return
        self._settle()  # a copy has the memory that vLLM wakes into, and its score is the one to beat
        step = self.trainer.state.global_step
        if self.late:
            self._make_room()
        training = self.trainer.model.training
        self.measure.evaluation_begins(step)
        started = time.monotonic()
        phases: dict[str, float] = {}
        snapshot: Snapshot | None = None
        ours, error = self._ask_trainer(phases, waking=publish_first and self.streams and self._sleeps)
        sent: SyncResult | None = None
        sending = time.monotonic()
        if error is None and publish_first and self.streams:
            sent, error = self._together(lambda: self._send(step, wait))
            phases |= {} if sent is None else {"stream": time.monotonic() - sending}
        if error is None and publish_first and not self.session.ranks.broadcast(sent is not None):
            snapshot, error = self._together(lambda: self._publish(step))
            if error is not None:
                self._published = None  # on every rank, whichever failed: publishing again takes all of them
            phases["snapshot"] = time.monotonic() - sending
        self.trainer.model.train(training)
        if error is not None:
            if self.streams:  # which may have woken the engine
                self._together(lambda: self.session.evaluator.rest() if is_main_process() else None)
            self._take([Round(step=step, scores={}, error=error)])
            return
        spent = time.monotonic() - started
        asked = Asked(
            step=step,
            snapshot=snapshot,
            sent=sent,
            ours=ours,
            publish_seconds=spent,
            phases=phases,
            now=lambda: int(self.trainer.state.global_step),
            late=self.late and not wait,
        )
        self._rounds.begin(asked)
        if wait or not self.late:
            self._take(self._rounds.collect(leave=0))

    def _ask_trainer(self, phases: dict[str, float], *, waking: bool) -> tuple[LogProbs | None, str | None]:
        """The trainer's own numbers for the canary, an engine that sleeps woken meanwhile; and main's error."""
        canary = self.session.canary
        if canary is None:
            return None, None
        began = time.monotonic()
        if waking:
            make_room()
        with self.session.evaluator.delivery.waking() if waking and is_main_process() else contextlib.nullcontext():
            found = self._together(lambda: canary.ask_trainer(self.trainer))
        phases["trainer's canary"] = time.monotonic() - began
        return found

    def _together(self, work: Callable[[], T]) -> tuple[T | None, str | None]:
        """What `work` returns on this rank, and main's error on every rank: known to all before anything else begins.

        Under ZeRO-3 whatever follows may be collective, and a rank alone in it would wait for ever.  A GPU out of
        memory there has left the others in the middle of a gathering, where no word reaches them: it ends this rank,
        and the launcher the others.
        """
        found: T | None = None
        error: str | None = None
        try:
            found = work()
        except Exception as problem:  # whatever it is: the other ranks wait in the broadcast, and training goes on
            if self._sharded and is_distributed() and isinstance(problem, torch.OutOfMemoryError | DistError):
                raise
            if not isinstance(problem, DsvllmError | OSError | SafetensorError):  # the last: also of a full disk
                logger.exception("unexpected error while weights were prepared or written")
            error = f"{type(problem).__name__}: {problem}"
        return found, self.session.ranks.broadcast(error)

    def _send(self, step: int, wait: bool) -> SyncResult | None:
        """The live weights from GPU to GPU into the engine, collective; None, and said why, if they must go by disk.

        Where scores are late nobody waits for an engine that is not there: a folder does, and another thread.
        """
        if not self.late or wait:
            self._take(self._rounds.collect(leave=0))
        elif (state := self._engine_state()) != FREE:
            say(f"step {step}: the weights go to vLLM by disk: it {state}")
            return None
        sync: WeightSync | None = None
        error: str | None = None
        if is_main_process():
            try:
                self.session.evaluator.delivery.wait_ready()
                self.session.evaluator.shut_door(step)
                sync = self.session.evaluator.delivery.sync
            except Exception as problem:  # whatever it is, the other ranks wait in the broadcast
                error = str(problem) or type(problem).__name__
        error = self.session.ranks.broadcast(error)
        try:
            if error is not None:
                raise EngineError(error)
            adapters = hasattr(self.trainer.model, "peft_config")
            dtype = self.session.snapshot_dtype
            put_away(self.trainer.model_wrapped)
            return send(self.trainer.model, sync, step=step, dtype=dtype, merge_adapters=adapters)
        except EngineError as problem:
            say(f"step {step}: the weights go to vLLM by disk: {problem}")
            return None

    def _make_room(self) -> None:
        """Wait until another late round may begin: more of them would only pile up snapshots."""
        if len(self._rounds.pending) < UNDER_WAY:
            return
        started = time.monotonic()
        self._take(self._rounds.collect(leave=UNDER_WAY - 1))
        say(
            f"step {self.trainer.state.global_step}: training waited {time.monotonic() - started:.1f} s for an earlier "
            "evaluation. A larger --gen_eval_steps or a smaller --gen_eval_limit avoids that."
        )

    def _take(self, rounds: Sequence[Round]) -> None:
        """Log, keep and count what rounds have brought; on every rank."""
        for done in rounds:
            if done.error is not None:
                self._failures += 1
                given_up = self._failures == FAILURES_BEFORE_GIVING_UP  # later ones were under way before it
                what = "failed and is skipped; giving up on it" if given_up else "failed and is skipped"
                say(f"step {done.step}: generation evaluation {what}. {done.error}")
                if given_up:
                    self.session.stop_engine()  # it would hold its memory to the end of the run for nothing
                continue
            if self._failures < FAILURES_BEFORE_GIVING_UP:  # after that the engine is gone, whatever was under way
                self._failures = 0
            scores = dict(done.scores)
            self._evaluated[done.step] = scores
            self.fresh.append((done.step, scores))
            log_through_trainer(self.trainer, scores, step=done.step)
            if self.streams:
                self._publish_a_best(done)
            if is_main_process():
                self._keep(done)

    def _publish_a_best(self, done: Round) -> None:
        """A snapshot of streamed weights whose score is the best so far; collective.

        Late ones are none: the model's weights have moved on (and where scores steer, nothing is streamed late).
        """
        args, run_dir = self.trainer.args, self.session.run_dir
        if self.late or done.step != self.trainer.state.global_step or not done.step:
            return
        wanted = is_main_process() and not (run_dir / SNAPSHOTS / f"step-{done.step}").is_dir()
        if not self.session.ranks.broadcast(wanted and is_best(run_dir, args, done)):
            return
        snapshot, error = self._together(lambda: self._keeping.begin_behind(done) if is_main_process() else None)
        snapshot = self.session.ranks.broadcast(snapshot)
        if error is None and snapshot is not None:
            self._published = snapshot
        elif error is None:
            _, error = self._together(lambda: self._publish(done.step))
        if error is not None:
            self._published = None
            say(f"step {done.step}: its weights, the best so far, could not be kept: {error}")

    def _keep(self, done: Round) -> None:
        """Say the scores, keep the best snapshot and those still to be answered, delete the others; rank 0."""
        now = self.trainer.state.global_step
        self.measure.evaluations.append(done.result)
        say(done.result.line() + ("" if done.step == now else f", known at step {now}"))
        log_samples(self.trainer.args, self.session.run_dir, done.step)
        kept = not (self.streams and self.late)  # one of those that went by disk once is no best
        if kept and not self._told_undecided and (why := why_undecided(self.trainer.args, done)) is not None:
            self._told_undecided = True
            say(why)
        self._keeping.note(done, kept=kept, answering=self._rounds.pending)
        if self.late and self.streams and not self._rounds.pending:
            self.session.evaluator.delivery.meet()
