"""Answers → scores by prompt: means over several answers, pass@N, and what is kept of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_dsvllm.evaluation.scores import Drawn, TaskScores, cut_at_stop, score_task
from hf_dsvllm.tasks import EvalSample, EvalTask

SAMPLES = tuple(
    EvalSample(id=name, prompt=f"{name}?", reference=name, line=n) for n, name in enumerate(("a", "b"), start=1)
)
OWN = """
def graded(completion: str, reference: str) -> float:
    return len(completion) / 10


def strict(completion, reference) -> bool:
    return completion == reference
"""


def scored(*answers: tuple[str, ...], metrics: tuple[str, ...] = ("exact_match",)) -> TaskScores:
    task = EvalTask(name="t", samples=SAMPLES, metrics=metrics)
    drawn = [[Drawn(text=text, finish_reason="stop") for text in texts] for texts in answers]
    return score_task(task, drawn, step=3, model="m")


def test_one_answer_a_prompt_is_a_row_without_samples() -> None:
    scores = scored(("a",), ("x",))
    assert scores.columns == {"exact_match": {"a": 1.0, "b": 0.0}}
    assert scores.rows[1] == {
        "step": 3, "id": "b", "prompt": "b?", "reference": "b", "answer": "x", "finish_reason": "stop", "model": "m",
        "scores": {"exact_match": 0.0},
    }  # fmt: skip


def test_several_answers_score_their_mean_and_pass_if_one_is_right() -> None:
    scores = scored(("a", "x", "a", "a"), ("x", "x", "x", "x"))
    assert scores.columns == {"exact_match": {"a": 0.75, "b": 0.0}, "exact_match_pass_at_4": {"a": 1.0, "b": 0.0}}
    assert [one["scores"]["exact_match"] for one in scores.rows[0]["samples"]] == [1.0, 0.0, 1.0, 1.0]
    assert [one["answer"] for one in scores.rows[0]["samples"]] == ["a", "x", "a", "a"]
    assert scores.rows[0]["answer"] == "a"


def test_pass_at_n_is_only_for_metrics_of_right_and_wrong(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    metrics = ("rouge_l", f"{tmp_path}/own.py:graded", f"{tmp_path}/own.py:strict")
    assert set(scored(("a", "b"), ("a", "b"), metrics=metrics).columns) == {
        "rouge_l", "graded", "strict", "strict_pass_at_2",
    }  # fmt: skip


def test_an_answer_without_a_score_stays_out_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dsvllm import metrics

    judged = [1.0, None, None, None]
    monkeypatch.setattr(metrics, "score", lambda *_, **__: judged)
    scores = scored(("a", "x"), ("x", "x"))
    assert scores.columns["exact_match"] == {"a": 1.0, "b": None}
    assert scores.columns["exact_match_pass_at_2"] == {"a": None, "b": None}


def test_an_answer_ends_before_its_first_stop_string() -> None:
    assert cut_at_stop("one###two\nthree", ("\n", "###")) == "one"
    assert cut_at_stop("one", ("\n",)) == "one"
    assert cut_at_stop("one\n", ()) == "one\n"
