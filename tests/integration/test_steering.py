"""Scores of a generation evaluation choose the best checkpoint and stop a real Trainer early."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Trainer

from hf_dsvllm import callback as callback_module
from hf_dsvllm.arguments import DsvllmTrainingArguments
from hf_dsvllm.callback import SessionCallback
from hf_dsvllm.engine.sync import SyncResult
from hf_dsvllm.errors import EngineError
from hf_dsvllm.evaluation.rounds import Round, Rounds
from hf_dsvllm.evaluation.steering import Steering
from hf_dsvllm.ranks import Ranks
from tests.tiny import write_tiny_model

KEY = "eval_gen_questions_exact_match"
EVERY_SECOND_STEP: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
}  # fmt: skip


class Questions(Dataset):
    """Sixteen short random sequences."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(10, 60, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class PresetScores:
    """An evaluator that answers with given scores, one an evaluation; None stands for a failure.

    `lag`: how many steps later training is when a score is known.
    """

    def __init__(self, scores: list[float | None], lag: int) -> None:
        self.scores = scores
        self.lag = lag
        self.trainer: Any = None
        self.asked: list[Any] = []
        self.delivery = SimpleNamespace(
            wait_ready=lambda: None,
            rest_until_asked=lambda: None,
            sync=None,
            sleeps=True,
            waking=contextlib.nullcontext,
        )
        self.shut_door = lambda step: None
        self.rest = lambda: None

    def evaluate(self, asked: Any) -> Any:
        step = asked.step
        self.asked.append(asked)
        known_at = min(step + self.lag, self.trainer.state.max_steps)
        deadline = time.monotonic() + 60
        while self.trainer.state.global_step < known_at and time.monotonic() < deadline:
            time.sleep(0.001)
        score = self.scores.pop(0)
        if score is None:
            raise EngineError("the engine is gone")
        times = {"asked_at": None, "answered_at": None}
        return SimpleNamespace(step=step, scores={KEY: score}, line=lambda: f"step {step}: {score}", **times)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def collect_on_time(rounds: Rounds, trainer: Trainer, lag: int) -> None:
    """Make a score that is known at this step arrive at this step, however slow the machine is."""
    collect = rounds.collect

    def on_time(*, leave: int | None = None) -> list[Round]:
        if leave is None:
            leave = sum(step + lag > trainer.state.global_step for step in rounds.pending)
        return collect(leave=leave)

    rounds.collect = on_time  # type: ignore[method-assign]


def train(
    model_folder: Path,
    out: Path,
    scores: list[float | None],
    *,
    lag: int = 0,
    streams: bool = False,
    patience: int = 2,
    **given: Any,
) -> Trainer:
    args = DsvllmTrainingArguments(
        output_dir=str(out), max_steps=8, per_device_train_batch_size=2, use_cpu=True, report_to=[], learning_rate=1e-3,
        load_best_model_at_end=True, disable_tqdm=True, gen_eval_on_start=False, **given,
    )  # fmt: skip
    args.metric_for_best_model, args.greater_is_better = KEY, True  # refused where nothing is asked, as here
    evaluator = PresetScores(scores, lag)
    session: Any = SimpleNamespace(
        late=lag > 0, streams=streams, canary=None, ranks=Ranks(60.0), preset=None, ds_config=None, evaluates=True,
        run_dir=out, snapshot_dtype=torch.float32, evaluator=evaluator,
        start_record=lambda *_: None, stop_engine=lambda: None, finish=lambda *_: None,
        ready_engine=lambda _: None,
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=args,
        train_dataset=Questions(),
        eval_dataset=Questions(),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        # transformers' early stopping demands that the Trainer itself evaluates.
        callbacks=[] if given["eval_strategy"] == "no" else [EarlyStoppingCallback(early_stopping_patience=patience)],
    )
    evaluator.trainer = trainer
    callback = SessionCallback(session, trainer)
    args.gen_eval_steps = 2
    if lag:
        collect_on_time(callback._rounds, trainer, lag)
    trainer.add_callback(callback)
    trainer.callback_handler.callbacks.insert(0, trainer.callback_handler.callbacks.pop())
    trainer.add_callback(Steering(callback, trainer))
    trainer.train()
    trainer.asked = evaluator.asked
    return trainer


@pytest.mark.parametrize("trainer_evaluates", [False, True])
def test_the_best_score_is_saved_and_loaded_at_the_end(
    trainer_evaluates: bool, model_folder: Path, tmp_path: Path
) -> None:
    strategy = {"eval_strategy": "steps", "eval_steps": 2} if trainer_evaluates else {"eval_strategy": "no"}
    trainer = train(model_folder, tmp_path, [0.2, 0.6, 0.4, 0.5], save_strategy="best", **strategy)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.6, 4)
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())
    assert json.loads((tmp_path / "snapshots" / "best.json").read_text(encoding="utf-8"))["step"] == 4
    logged = {row["step"]: row[KEY] for row in trainer.state.log_history if KEY in row}
    assert logged == {2: 0.2, 4: 0.6, 6: 0.4, 8: 0.5}


def test_training_stops_early_when_the_score_no_longer_rises(model_folder: Path, tmp_path: Path) -> None:
    trainer = train(
        model_folder, tmp_path, [0.6, 0.5, 0.4, 0.3], save_strategy="best", eval_strategy="steps", eval_steps=2
    )
    assert trainer.state.global_step == 6


def test_a_score_at_an_epochs_end_counts_once(model_folder: Path, tmp_path: Path) -> None:
    """It is there before the epoch's own evaluation, which has no other."""
    trainer = train(
        model_folder,
        tmp_path,
        [0.2, 0.6, 0.4, 0.5],
        patience=1,
        save_strategy="epoch",
        eval_strategy="epoch",
        gradient_accumulation_steps=2,
    )
    assert trainer.state.epoch == 1.5, "stopped at step 6, not right after the best score"
    assert trainer.state.best_metric == 0.6


def test_the_users_own_evaluation_afterwards_has_the_scores_of_the_weights_that_are_loaded(
    model_folder: Path, tmp_path: Path
) -> None:
    trainer = train(
        model_folder, tmp_path, [0.2, 0.6, 0.4, 0.5], save_strategy="best", eval_strategy="steps", eval_steps=2
    )
    asked = len(trainer.asked)
    assert trainer.evaluate()[KEY] == 0.6
    assert len(trainer.asked) == asked, "nothing is published or asked any more"


def test_a_failed_evaluation_neither_stops_training_nor_counts_as_a_score(model_folder: Path, tmp_path: Path) -> None:
    strategy = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    # After a failure the Trainer's evaluation of the same step asks once more.
    trainer = train(model_folder, tmp_path, [0.2, None, None, 0.6, 0.5], **strategy)
    assert trainer.state.global_step == 8
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.6, 6)
    assert [row["step"] for row in trainer.state.log_history if KEY in row] == [2, 6, 8]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def test_late_scores_are_logged_under_their_own_step_and_choose_the_best(model_folder: Path, tmp_path: Path) -> None:
    trainer = train(model_folder, tmp_path, [0.2, 0.6, 0.4, 0.5], lag=3, **EVERY_SECOND_STEP)
    logged = [(row["step"], row[KEY], row["epoch"]) for row in trainer.state.log_history if KEY in row]
    assert logged == [(2, 0.2, 0.25), (4, 0.6, 0.5), (6, 0.4, 0.75), (8, 0.5, 1.0)]
    assert trainer.state.global_step == 8
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.6, 4)
    best = weights_of(tmp_path / "checkpoint-4")
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_the_best_is_loaded_from_its_snapshot_when_the_trainer_kept_no_checkpoint_of_it(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = train(model_folder, tmp_path, [0.2, 0.6, 0.4, 0.5], lag=3, save_total_limit=1, **EVERY_SECOND_STEP)
    assert not (tmp_path / "checkpoint-4").exists()
    assert "the weights of step 4" in capfd.readouterr().err
    best, last = weights_of(tmp_path / "snapshots" / "step-4"), weights_of(tmp_path / "checkpoint-8")
    now = trainer.model.state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in now.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in now.items())


def test_late_scores_stop_training_early(model_folder: Path, tmp_path: Path) -> None:
    trainer = train(model_folder, tmp_path, [0.6, 0.5, 0.4, 0.3], lag=1, **EVERY_SECOND_STEP)
    assert trainer.state.global_step == 7, "the second score that is no better is that of step 6, known at step 7"
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.6, 2)


def test_a_late_failure_neither_stops_training_nor_counts_as_a_score(model_folder: Path, tmp_path: Path) -> None:
    trainer = train(model_folder, tmp_path, [0.2, None, 0.6, 0.5], lag=1, **EVERY_SECOND_STEP)
    assert [row["step"] for row in trainer.state.log_history if KEY in row] == [2, 6, 8]
    assert trainer.state.best_global_step == 6


def test_streamed_weights_leave_a_snapshot_of_the_best_alone_and_go_by_disk_when_the_stream_fails(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def send(model: Any, sync: Any, *, step: int, **how: Any) -> SyncResult:
        if step == 6:
            raise EngineError("the stream broke off")
        return SyncResult(model_name="base", path_used="ipc", why="a test", seconds=0.0)

    monkeypatch.setattr(callback_module, "send", send)
    trainer = train(model_folder, tmp_path, [0.2, 0.6, 0.4, 0.5], streams=True, **EVERY_SECOND_STEP)
    by_path = {asked.step: "disk" if asked.snapshot else asked.sent.path_used for asked in trainer.asked}
    assert by_path == {2: "ipc", 4: "ipc", 6: "disk", 8: "ipc"}
    assert "step 6: the weights go to vLLM by disk: the stream broke off" in capfd.readouterr().err
    best = json.loads((tmp_path / "snapshots" / "best.json").read_text(encoding="utf-8"))
    assert (best["step"], best["score"]) == (4, 0.6)
    assert sorted(folder.name for folder in (tmp_path / "snapshots").glob("step-*")) == ["step-4"]
    best_weights = weights_of(tmp_path / "snapshots" / "step-4")
    assert all(torch.equal(tensor, best_weights[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_second_training_is_steered_by_its_own_scores(model_folder: Path, tmp_path: Path) -> None:
    trainer = train(model_folder, tmp_path, [0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4], **EVERY_SECOND_STEP)
    first = [row[KEY] for row in trainer.state.log_history if KEY in row]
    trainer.args.gen_eval_steps = None  # whenever the Trainer evaluates
    trainer.train()
    second = [row[KEY] for row in trainer.state.log_history if KEY in row]
    assert set(first) == {0.9, 0.8, 0.7}, "early stopping ends it there"
    assert 0.9 not in second
    assert trainer.state.best_metric < 0.8
