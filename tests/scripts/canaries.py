"""What the runs of test_canary.py do after each step: a snapshot, and the live model's own log-probabilities."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_dsvllm.evaluation.canary import Canary, canary_prompts
from hf_dsvllm.live.snapshot import publish

PROMPTS = canary_prompts([list(range(5 + k, 65 + 2 * k, 1 + k % 3)) for k in range(6)])


class AfterEachStep(TrainerCallback):
    """Publishes the weights; with `ask` also asks, before and after, and writes the numbers to canary.json."""

    def __init__(self, trainer: Any, folder: Path, *, ask: bool) -> None:
        self.trainer = trainer
        self.folder = folder
        self.canary = Canary(PROMPTS, dtype="float32") if ask else None
        self.found: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)

    def _look(self, step: int) -> None:
        if self.canary is not None:
            before = modes(self.trainer.model), torch.random.get_rng_state()
            first = self.canary.ask_trainer(self.trainer)
            assert modes(self.trainer.model) == before[0]
            assert torch.equal(torch.random.get_rng_state(), before[1])
        publish(self.trainer.model, self.folder, step=step, dtype=torch.float32)
        if self.canary is not None:
            assert self.canary.ask_trainer(self.trainer) == first, "asking or publishing changed something"
            self.found[str(step)] = first
            rank = os.environ["RANK"]
            (self.folder / f"canary.{rank}.json").write_text(json.dumps(self.found), encoding="utf-8")


def modes(model: Any) -> list[bool]:
    return [module.training for module in model.modules()]
