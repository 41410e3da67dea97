"""Stand-ins for a session and a Trainer: what tests of the callback on one rank are made of."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dsvllm import callback as callback_module
from hf_dsvllm.callback import SessionCallback
from hf_dsvllm.live.snapshot import Snapshot

KEY = "eval_gen_a_exact_match"


class OneOfTwoRanks:
    """A rank other than 0: what it hears is what rank 0 says, given in advance, else its own words."""

    def __init__(self) -> None:
        self.main_says: list[Any] = []

    def broadcast(self, value: Any) -> Any:
        return self.main_says.pop(0) if self.main_says else value


class Canary:
    """Counts its forwards."""

    def __init__(self) -> None:
        self.forwards = 0

    def ask_trainer(self, trainer: Any) -> Any:
        self.forwards += 1
        return ((0.0,),)


def made(run_dir: Path, **session: Any) -> SessionCallback:
    """A callback at step 4 of 8 with a session of stand-ins."""
    args = SimpleNamespace(
        metric_for_best_model=KEY, greater_is_better=True, load_best_model_at_end=False, gen_eval_steps=2,
        gen_eval_on_start=True, report_to=[],
    )  # fmt: skip
    state = SimpleNamespace(
        global_step=4, max_steps=8, best_model_checkpoint=None, best_metric=None, log_history=[],
        num_input_tokens_seen=0,
    )  # fmt: skip
    trainer: Any = SimpleNamespace(
        model=torch.nn.Linear(1, 1), model_wrapped=None, processing_class=None, args=args, state=state, logged=[]
    )
    defaults: dict[str, Any] = {
        "late": False, "streams": False, "evaluates": True, "canary": Canary(), "ranks": OneOfTwoRanks(),
        "run_dir": run_dir, "snapshot_dtype": torch.float32, "stop_engine": lambda: None,
        "evaluator": SimpleNamespace(
            evaluate=lambda asked: SimpleNamespace(scores={KEY: 0.5}, line=lambda: "scored"),
            delivery=SimpleNamespace(meet=lambda: None, waking=contextlib.nullcontext, sleeps=False),
        ),
        "finish": lambda *_: None,
    }  # fmt: skip
    return SessionCallback(SimpleNamespace(**(defaults | session)), trainer)  # type: ignore[arg-type]


def publishing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose weights were written, by a stand-in that writes nothing but a folder."""
    steps: list[int] = []

    def publish(model: Any, run_dir: Path, *, step: int, **how: Any) -> Snapshot:
        steps.append(step)
        path = run_dir / "snapshots" / f"step-{step}"
        path.mkdir(parents=True, exist_ok=True)
        return Snapshot(path=path, kind="full", step=step)

    monkeypatch.setattr(callback_module, "publish", publish)
    monkeypatch.setattr(callback_module, "log_through_trainer", lambda trainer, scores, step: None)
    return steps
