"""The scores a Trainer steers by: passed on when they are there, never a crash or a new best when they are not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_dsvllm.callback import MissingScore, best_so_far


@pytest.mark.parametrize(
    ("greater", "best", "expected"), [(True, None, -math.inf), (False, None, math.inf), (True, 0.4, 0.4)]
)
def test_a_missing_score_is_never_a_new_best(greater: bool, best: float | None, expected: float) -> None:
    metrics = {"eval_loss": 1.0}
    args = SimpleNamespace(metric_for_best_model="gen_orders_json_equal", greater_is_better=greater)
    MissingScore().on_evaluate(args, SimpleNamespace(best_metric=best), None, metrics=metrics)
    assert metrics == {"eval_loss": 1.0, "eval_gen_orders_json_equal": expected}


def test_a_score_that_is_there_stays() -> None:
    metrics = {"eval_gen_orders_json_equal": 0.7}
    args = SimpleNamespace(metric_for_best_model="eval_gen_orders_json_equal", greater_is_better=True)
    MissingScore().on_evaluate(args, SimpleNamespace(best_metric=0.9), None, metrics=metrics)
    assert metrics == {"eval_gen_orders_json_equal": 0.7}


@pytest.mark.parametrize("wanted", [None, "eval_loss", "loss"])
def test_other_metrics_are_the_trainers_own_affair(wanted: str | None) -> None:
    metrics: dict[str, float] = {}
    args = SimpleNamespace(metric_for_best_model=wanted, greater_is_better=None)
    MissingScore().on_evaluate(args, SimpleNamespace(best_metric=None), None, metrics=metrics)
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
