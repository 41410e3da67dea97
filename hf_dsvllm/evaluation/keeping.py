"""Rank 0's snapshots: which is the best and stays, which go, and the best one's way to the disk beside training."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_dsvllm.console import say
from hf_dsvllm.evaluation.rounds import Round
from hf_dsvllm.evaluation.steering import keep_best
from hf_dsvllm.live.behind import Behind
from hf_dsvllm.live.gather import put_away
from hf_dsvllm.live.snapshot import SNAPSHOTS, Snapshot, point_to_latest, prune
from hf_dsvllm.measure import RunMeasure

if TYPE_CHECKING:
    from hf_dsvllm.session import Session

__all__ = ["Keeping"]


class Keeping:
    """Used on rank 0, where `note` and `settle` never raise; on other ranks nothing is ever begun.

    `lost`: the step of the last snapshot that was begun and did not get to the disk.
    """

    def __init__(self, session: Session, trainer: Any, measure: RunMeasure) -> None:
        self.session = session
        self.trainer = trainer
        self.measure = measure
        self.lost: int | None = None
        self._behind: tuple[Behind, Round] | None = None

    def begin_behind(self, done: Round) -> Snapshot | None:
        """A copy of the weights that `done` scored on its way to the disk; None where all ranks have to write them."""
        self.measure.mark("between steps")  # the next one has the copy in it
        put_away(self.trainer.model_wrapped)
        behind = Behind.begin(
            self.trainer.model,
            self.session.run_dir,
            step=done.step,
            dtype=self.session.snapshot_dtype,
            tokenizer=self.trainer.processing_class,
            peak_bytes=self.measure.needed_bytes if self.measure.steps else 0,
            then=lambda snapshot: self._point_to(snapshot, done),
        )
        if behind is None:
            return None
        self._behind, self.lost = (behind, done), None
        self.measure.copy_held(behind.size_bytes)
        return behind.snapshot

    def settle(self, *, wait: bool) -> None:
        """Let go of the copy that was begun, and of older snapshots, once it is on the disk, or `wait` for that."""
        if self._behind is None or not (wait or self._behind[0].done):
            return
        (behind, done), self._behind = self._behind, None
        try:
            behind.finish()
        except Exception as error:  # whatever it is, training goes on
            self.lost = done.step
            say(f"step {done.step}: its weights, the best so far, could not be kept: {type(error).__name__}: {error}")
        del behind
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the copy's memory would count as what training reserves
        self.measure.copy_held(0)
        self.note(done, kept=True)

    def note(self, done: Round, *, kept: bool, answering: Collection[int] = ()) -> None:
        """Point to the weights of `done`, if they are `kept` on disk and the best; delete those that nobody needs.

        `answering`: steps whose snapshots vLLM still has to answer with.
        """
        run_dir, name = self.session.run_dir, f"step-{done.step}"
        if kept and (run_dir / SNAPSHOTS / name).is_dir():  # neither the untrained model nor streamed away
            self._keep_best(done)
        prune(run_dir, keep=[Path(name), *(Path(f"step-{step}") for step in answering)])

    def _point_to(self, snapshot: Snapshot, done: Round) -> None:
        """In the writing thread, so that nothing between the folder and what points to it can end the run."""
        try:
            point_to_latest(self.session.run_dir, snapshot, trained_to=done.step)
        except OSError as error:
            say(f"step {done.step}: {snapshot.path} is there, and the newest could not be noted: {error}")
        self._keep_best(done)

    def _keep_best(self, done: Round) -> None:
        kind = "adapter" if hasattr(self.trainer.model, "peft_config") else "full"
        try:
            keep_best(self.session.run_dir, self.trainer.args, done, kind=kind)
        except OSError as error:  # a full disk ends no training
            say(f"step {done.step}: whether its weights are the best could not be noted: {error}")
