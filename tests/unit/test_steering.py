"""The scores a Trainer steers by: passed on when they are there, never a crash or a new best when they are not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from hf_dsvllm.evaluation.rounds import Round
from hf_dsvllm.evaluation.steering import Steering, best_so_far, keep_best
from hf_dsvllm.fields import steers


def nothing_fresh() -> Any:
    return SimpleNamespace(fresh=[], passing_on=None, passed_on=set(), make_room_to_evaluate=lambda: None)


@pytest.mark.parametrize(
    ("greater", "best", "expected"), [(True, None, -math.inf), (False, None, math.inf), (True, 0.4, 0.4)]
)
def test_a_missing_score_is_never_a_new_best(greater: bool, best: float | None, expected: float) -> None:
    metrics = {"eval_loss": 1.0}
    args = SimpleNamespace(metric_for_best_model="gen_orders_json_equal", greater_is_better=greater)
    Steering(nothing_fresh(), None).on_evaluate(args, SimpleNamespace(best_metric=best), None, metrics=metrics)
    assert metrics == {"eval_loss": 1.0, "eval_gen_orders_json_equal": expected}


def test_a_score_that_is_there_stays() -> None:
    metrics = {"eval_gen_orders_json_equal": 0.7}
    args = SimpleNamespace(metric_for_best_model="eval_gen_orders_json_equal", greater_is_better=True)
    Steering(nothing_fresh(), None).on_evaluate(args, SimpleNamespace(best_metric=0.9), None, metrics=metrics)
    assert metrics == {"eval_gen_orders_json_equal": 0.7}


@pytest.mark.parametrize("wanted", [None, "eval_loss", "loss"])
def test_other_metrics_are_the_trainers_own_affair(wanted: str | None) -> None:
    metrics: dict[str, float] = {}
    args = SimpleNamespace(metric_for_best_model=wanted, greater_is_better=None)
    Steering(nothing_fresh(), None).on_evaluate(args, SimpleNamespace(best_metric=None), None, metrics=metrics)
    assert metrics == {}


def test_a_resumed_run_goes_on_from_the_best_score_on_disk(tmp_path: Path) -> None:
    pointer = tmp_path / "best.json"
    assert best_so_far(pointer, "eval_gen_a_exact_match", before=20) is None
    pointer.write_text(json.dumps({"step": 10, "metric": "eval_gen_a_exact_match", "score": 0.8}))
    assert best_so_far(pointer, "eval_gen_a_exact_match", before=20) == 0.8
    assert best_so_far(pointer, "eval_gen_a_exact_match", before=10) is None  # the same step, evaluated again
    assert best_so_far(pointer, "eval_gen_b_exact_match", before=20) is None
    pointer.write_text("{")
    assert best_so_far(pointer, "eval_gen_a_exact_match", before=20) is None


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("gen_a_exact_match", True),
        ("eval_gen_a_exact_match", True),
        ("eval_loss", False),
        ("regen_x", False),
        (None, False),
    ],
)
def test_only_a_generation_score_steers(wanted: str | None, expected: bool) -> None:
    assert steers(SimpleNamespace(metric_for_best_model=wanted)) == expected


def kept(run_dir: Path, rounds: list[dict[str, float]], known: dict[str, bool], **steering: Any) -> Any:
    """Metric and step of the best snapshot after these rounds, whose scores' directions are known so far."""
    args = SimpleNamespace(**{"metric_for_best_model": None, "greater_is_better": None} | steering)
    for step, scores in enumerate(rounds, start=1):
        done = Round(step=step, scores=scores, result=SimpleNamespace(higher_is_better=known))
        keep_best(run_dir, args, done, kind="full")
    pointer = run_dir / "snapshots" / "best.json"
    best = json.loads(pointer.read_text()) if pointer.exists() else {}
    return best.get("metric"), best.get("step")


PERPLEXITY, ACC = "eval_gen_wikitext_word_perplexity", "eval_gen_arc_easy_acc"
FALLING = [{PERPLEXITY: 30.0, ACC: 0.2}, {PERPLEXITY: 20.0, ACC: 0.4}, {PERPLEXITY: 25.0, ACC: 0.3}]


@pytest.mark.parametrize(
    ("known", "steering", "expected"),
    [
        ({PERPLEXITY: False, ACC: True}, {}, (PERPLEXITY, 2)),  # the first one, the lower the better
        ({PERPLEXITY: True}, {}, (PERPLEXITY, 1)),
        ({ACC: True}, {}, (ACC, 2)),  # the first of which it is known
        ({}, {}, (None, None)),
        ({}, {"metric_for_best_model": PERPLEXITY, "greater_is_better": False}, (PERPLEXITY, 2)),
        ({}, {"metric_for_best_model": ACC.removeprefix("eval_"), "greater_is_better": True}, (ACC, 2)),
        ({ACC: True}, {"metric_for_best_model": "eval_loss", "greater_is_better": False}, (ACC, 2)),
    ],
)
def test_the_best_snapshot_is_the_best_by_a_metric_whose_direction_is_known_or_given(
    known: dict[str, bool], steering: dict[str, Any], expected: tuple[str | None, int | None], tmp_path: Path
) -> None:
    assert kept(tmp_path, FALLING, known, **steering) == expected


class FakeTrainer:
    """A Trainer as far as steering touches it."""

    def __init__(self, *, is_best: bool) -> None:
        self.seen: list[dict[str, float]] = []
        self.is_best = is_best
        self.state = SimpleNamespace(global_step=4)
        self.callback_handler = SimpleNamespace(on_evaluate=self.on_evaluate)

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, scores: dict[str, float]) -> None:
        control.should_evaluate = False  # as transformers' CallbackHandler does
        self.seen.append(scores)

    def _determine_best_metric(self, metrics: dict[str, float], trial: None) -> bool:
        return self.is_best


@pytest.mark.parametrize(
    ("trainer_evaluates", "strategy", "is_best", "saved", "told"),
    [
        (False, "best", True, True, True),
        (False, "best", False, False, True),
        (False, "steps", True, False, True),
        (True, "best", True, False, False),  # the Trainer's own evaluation of this step will see the score
    ],
)
def test_a_score_between_the_trainers_evaluations_saves_and_stops_like_one_of_them(
    trainer_evaluates: bool, strategy: str, is_best: bool, saved: bool, told: bool
) -> None:
    fresh = {"eval_gen_a_exact_match": 0.5}
    scores = SimpleNamespace(fresh=[(4, fresh)], passing_on=None, passed_on=set(), make_room_to_evaluate=lambda: None)
    trainer = FakeTrainer(is_best=is_best)
    args = SimpleNamespace(metric_for_best_model="gen_a_exact_match", save_strategy=strategy, greater_is_better=True)
    control = TrainerControl(should_evaluate=trainer_evaluates)
    Steering(scores, trainer).on_step_end(args, trainer.state, control)
    assert control.should_save == saved
    assert trainer.seen == ([fresh] if told else [])
    assert scores.fresh == []


def test_a_late_score_takes_nothing_from_the_trainers_own_evaluation_of_that_step() -> None:
    scores = SimpleNamespace(
        fresh=[(2, {"eval_gen_a_exact_match": 0.5})],
        passing_on=None,
        passed_on=set(),
        make_room_to_evaluate=lambda: None,
    )
    trainer = FakeTrainer(is_best=False)
    args = SimpleNamespace(metric_for_best_model="gen_a_exact_match", save_strategy="steps", greater_is_better=True)
    control = TrainerControl(should_evaluate=True, should_save=True, should_log=True)
    Steering(scores, trainer).on_step_end(args, trainer.state, control)
    assert len(trainer.seen) == 1
    assert (control.should_evaluate, control.should_save, control.should_log) == (True, True, True)
