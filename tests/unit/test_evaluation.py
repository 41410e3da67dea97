"""One evaluation with a stand-in for the engine: what is asked, what is written, what a failure costs."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm import measure as measures
from hf_dsvllm import metrics
from hf_dsvllm.engine.client import Completion
from hf_dsvllm.engine.sync import SyncResult
from hf_dsvllm.errors import EngineError, EvalFileError
from hf_dsvllm.evaluation import evaluator as evaluation
from hf_dsvllm.evaluation.delivery import Asked
from hf_dsvllm.evaluation.evaluator import Evaluator, HarnessTasks, Sampling
from hf_dsvllm.harness import HarnessScores, TaskResult, Worker
from hf_dsvllm.live.snapshot import Snapshot
from hf_dsvllm.measure import RunMeasure
from hf_dsvllm.task_settings import TaskSettings
from hf_dsvllm.tasks import EvalSample, EvalTask

PROMPTS = 32
KEY = "eval_gen_letters_exact_match"


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "start", lambda self: None)


class Tokenizer:
    """One token a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids))


class Engine:
    """Answers every prompt with `text` and remembers how it was asked."""

    def __init__(self) -> None:
        self.text = "a"
        self.asked: list[dict[str, Any]] = []

    def generate(self, prompts: list[list[int]], **how: Any) -> list[Completion]:
        self.asked.append(how)
        ids = tuple(map(ord, self.text))
        return [
            Completion(prompt_index=place, sample_index=n, token_ids=ids, text="", finish_reason="stop", logprobs=None)
            for place in range(len(prompts))
            for n in range(how["n"])
        ]

    def close(self) -> None:
        pass

    def health(self) -> bool:
        return True


def task(**settings: Any) -> EvalTask:
    samples = tuple(EvalSample(id=str(n), prompt=f"{n}?", reference="a", line=n) for n in range(PROMPTS))
    return EvalTask(name="letters", samples=samples, metrics=("exact_match",), settings=TaskSettings(**settings))


def evaluator(run: Path, engine: Engine, **more: Any) -> Evaluator:
    spec = SimpleNamespace(
        served_name="base", tokenizer=None, model="model", max_model_len=64, sleep_mode=False, weight_transfer=None
    )
    server: Any = SimpleNamespace(
        uds=run / "socket", alive=True, pid=None, spec=spec, wait_ready=lambda _: None, close=lambda: None
    )
    sampling = Sampling(max_new_tokens=9, temperature=0.0, seed=5, timeout_s=60.0, stop_token_ids=(2,))
    made = Evaluator(
        server=server, tokenizer=Tokenizer(), sampling=sampling, run_dir=run, **({"tasks": [task()]} | more)
    )
    made.delivery.client = engine  # type: ignore[assignment]
    push = SyncResult(model_name="step-now", path_used="reload", why="a test", seconds=0.0)
    made.delivery.sync = SimpleNamespace(push=lambda *_: push)  # type: ignore[assignment]
    return made


def score_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evals" / "scores.jsonl").read_text().splitlines()]


def snapshot(run: Path, step: int) -> Snapshot:
    return Snapshot(path=run, kind="full", step=step)


def test_a_task_is_asked_by_its_own_settings_and_the_rest_by_the_arguments(tmp_path: Path) -> None:
    engine = Engine()
    tasks = [task(samples=3, temperature=0.5, max_new_tokens=4, stop=("#",))]
    evaluator(tmp_path, engine, tasks=tasks).evaluate(Asked(step=0))
    [how] = engine.asked
    assert (how["n"], how["temperature"], how["max_new_tokens"], how["stop"]) == (3, 0.5, 4, ("#",))
    assert (how["seed"], how["stop_token_ids"], how["model"]) == (5, (2,), "base")


def test_an_answer_is_cut_at_the_tasks_stop_string(tmp_path: Path) -> None:
    engine = Engine()
    engine.text = "a#and more"
    assert evaluator(tmp_path, engine, tasks=[task(stop=("#",))]).evaluate(Asked(step=0)).scores == {KEY: 1.0}


def test_each_score_is_held_against_the_first_and_the_best_on_the_console_and_on_disk(tmp_path: Path) -> None:
    engine = Engine()
    made = evaluator(tmp_path, engine)
    engine.text = "x"
    assert "over step" not in made.evaluate(Asked(step=0)).line()
    engine.text = "a"
    result = made.evaluate(Asked(step=10, snapshot=snapshot(tmp_path, 10)))
    assert f"{KEY} 100.0% ± 0.0% (+100.0 [+100.0, +100.0] over step 0)" in result.line()
    odd = dataclasses.replace(result, scores={KEY: 18.754, "other": 0.5}, standard_errors={KEY: 1.25, "other": None})
    assert f"{KEY} 18.75 ± 1.25 (" in odd.line()  # a perplexity, say
    assert "other 50.0% (" in odd.line()
    resumed = evaluator(tmp_path, engine).evaluate(Asked(step=20, snapshot=snapshot(tmp_path, 20)))
    assert "over step 0, the same as step 10)" in resumed.line()
    told = score_rows(tmp_path)[-1]["comparisons"][KEY]
    assert told["over_base"] == {"low": 1.0, "high": 1.0, "mean": 1.0}
    assert "as good as the best so far (step 10)" in told["sentence"]


def test_the_parts_of_an_evaluations_seconds_are_kept(tmp_path: Path) -> None:
    made = evaluator(tmp_path, Engine())
    began = time.time()
    made.evaluate(Asked(step=10, snapshot=snapshot(tmp_path, 10), phases={"snapshot": 1.5, "trainer's canary": 0.25}))
    [row] = score_rows(tmp_path)
    assert row["phases"] == {"snapshot": 1.5, "trainer's canary": 0.25, "engine's canary": 0.0}
    assert list(row["task_seconds"]) == ["letters"]
    assert row["task_seconds"]["letters"] <= row["generate_seconds"]
    assert began <= row["asked_at"] <= row["answered_at"] <= time.time()
    assert row["asleep_gib"] is None  # this engine does not sleep


def test_a_pause_for_an_evaluation_says_what_came_before_the_questions_and_after_the_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure, clock = RunMeasure(), SimpleNamespace(now=0.0)
    monkeypatch.setattr(measures.time, "time", lambda: clock.now)
    measure.evaluation_begins(0)  # of the untrained model, before any step: no pause
    for begun, ended in ((5.0, 6.0), (6.5, 7.0), (11.0, 12.0)):
        clock.now = begun
        measure.step_begins()
        clock.now = ended
        measure.step_ends()
        if ended == 7.0:
            measure.evaluation_begins(2)
            measure.evaluations.append(SimpleNamespace(step=2, asked_at=8.0, answered_at=10.0))
    record = measure.as_record()
    assert record["evaluation_pauses"] == [{"step": 2, "seconds": 4.0, "before_questions": 1.0, "after_answers": 1.0}]
    assert record["pause_seconds"] == 4.5


def test_a_metric_that_could_score_nothing_is_not_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(metric: metrics.Metric, *_: Any, **__: Any) -> list[float | None]:
        return [None if metric.name == "exact_match" else 1.0] * PROMPTS

    monkeypatch.setattr(metrics, "score", score)
    both = dataclasses.replace(task(), metrics=("exact_match", "contains"))
    result = evaluator(tmp_path, Engine(), tasks=[both]).evaluate(Asked(step=0))
    assert (result.scores, result.comparisons) == ({"eval_gen_letters_contains": 1.0}, {})
    assert "exact_match" in (tmp_path / "evals" / "step-000000.letters.jsonl").read_text()


def test_an_evaluation_without_any_score_fails_and_keeps_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(metrics, "score", lambda *_, **__: [None] * PROMPTS)
        made = evaluator(tmp_path, Engine())
        with pytest.raises(EvalFileError, match=f"none of {PROMPTS} answers could be scored"):
            made.evaluate(Asked(step=0))
    assert (tmp_path / "evals" / "step-000000.letters.jsonl").exists()
    assert not (tmp_path / "evals" / "scores.jsonl").exists()
    assert made.evaluate(Asked(step=10, snapshot=snapshot(tmp_path, 10))).scores == {KEY: 1.0}


def test_too_few_prompts_for_an_interval_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = task()
    few = EvalTask(name=few.name, samples=few.samples[:5], metrics=few.metrics)
    made = evaluator(tmp_path, Engine(), tasks=[few])
    for step in (0, 10, 20):
        made.evaluate(Asked(step=step, snapshot=snapshot(tmp_path, step)))
    assert capsys.readouterr().err.count("5 prompts have a score in both, an interval needs 30") == 1


def harness_scores(value: float) -> HarnessScores:
    rows = [{"id": str(n), "prompt": "", "reference": "", "answer": "", "finish_reason": "", "scores": {"acc": value}}
            for n in range(PROMPTS)]  # fmt: skip
    quiz = TaskResult(name="quiz", scores={"acc": value}, errors={"acc": 0.01}, rows=rows)
    group = TaskResult(name="many", scores={"acc": value}, errors={}, rows=())
    return HarnessScores(tasks=(quiz, group), parts=(TaskResult(name="part", scores={}, errors={}, rows=rows),))


def test_scores_of_lm_eval_stand_beside_ours_and_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def run_tasks(worker: Worker, names: tuple[str, ...], **how: Any) -> HarnessScores:
        asked.append({"names": names, **how})
        return harness_scores(0.25 if len(asked) == 1 else 0.75)

    monkeypatch.setattr(evaluation, "run_tasks", run_tasks)
    made = evaluator(tmp_path, Engine(), harness=HarnessTasks(names=("quiz", "many"), limit=7, trust_remote_code=True))
    made.evaluate(Asked(step=0))
    result = made.evaluate(Asked(step=10, snapshot=snapshot(tmp_path, 10)))
    assert result.scores == {KEY: 1.0, "eval_gen_quiz_acc": 0.75, "eval_gen_many_acc": 0.75}
    assert result.standard_errors["eval_gen_quiz_acc"] == 0.01
    assert result.standard_errors["eval_gen_many_acc"] is None
    assert result.comparisons["eval_gen_quiz_acc"].brief.startswith("+50.0")
    assert "eval_gen_many_acc" not in result.comparisons  # a group has no prompts of its own
    assert result.samples == 3 * PROMPTS
    assert (tmp_path / "evals" / "step-000010.part.jsonl").exists()
    row = json.loads((tmp_path / "evals" / "step-000010.quiz.jsonl").read_text().splitlines()[0])
    assert (row["step"], row["model"], row["scores"]) == (10, "step-now", {"acc": 0.75})
    assert (asked[0]["limit"], asked[0]["tokenizer"], asked[0]["model"]) == (7, "model", "training")
    assert asked[0]["key"] != asked[1]["key"]
    assert asked[0]["trust_remote_code"]


def test_directions_come_from_lm_eval_and_perplexities_are_not_compared_by_their_log_likelihoods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tasks(*_: Any, **__: Any) -> HarnessScores:
        quiz, group = harness_scores(0.5).tasks
        rows = [dict(row) | {"scores": {"perplexity": -2.0, "brier": 0.25}} for row in quiz.rows]
        scores = {"perplexity": 7.4, "brier": 0.25, "f1": 0.5}
        told = {"perplexity": False, "brier": False}
        return HarnessScores(tasks=(dataclasses.replace(quiz, scores=scores, rows=rows, higher_is_better=told), group))

    monkeypatch.setattr(evaluation, "run_tasks", run_tasks)
    made = evaluator(tmp_path, Engine(), harness=HarnessTasks(names=("quiz",)))
    made.evaluate(Asked(step=0))
    result = made.evaluate(Asked(step=10, snapshot=snapshot(tmp_path, 10)))
    brier, perplexity = "eval_gen_quiz_brier", "eval_gen_quiz_perplexity"
    assert result.higher_is_better == {KEY: True, brier: False, perplexity: False}
    assert set(result.comparisons) == {KEY, brier}
    assert made.history.lower_is_better >= {brier}


def test_lm_eval_that_fails_costs_its_own_scores_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_tasks(*_: Any, **__: Any) -> HarnessScores:
        raise EngineError("lm-eval was not done after 3 s.")

    monkeypatch.setattr(evaluation, "run_tasks", run_tasks)
    result = evaluator(tmp_path, Engine(), harness=HarnessTasks(names=("quiz",))).evaluate(Asked(step=0))
    assert result.scores == {KEY: 1.0}
    assert "no scores of lm-evaluation-harness. lm-eval was not done" in capsys.readouterr().err


def test_a_port_that_is_taken_is_no_reason_not_to_evaluate(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluator(tmp_path, Engine(), expose_port=free_port)
    second = evaluator(tmp_path, Engine(), expose_port=free_port)
    assert "the model in training cannot be asked: port" in capsys.readouterr().err
    assert second.door is None
    assert second.evaluate(Asked(step=0)).scores == {KEY: 1.0}
    first.close()


def test_an_engine_that_sleeps_between_evaluations_is_not_asked(tmp_path: Path) -> None:
    import httpx

    made = evaluator(tmp_path, Engine(), expose_port=0)
    assert made.door is not None
    made.delivery.server.spec.sleep_mode = True  # type: ignore[misc]
    slept: list[int] = []

    def sleep() -> None:
        answer = httpx.post(f"{made.door.url}/completions", json={}, headers={"Authorization": f"Bearer {key}"})  # type: ignore[union-attr]
        slept.append(answer.status_code)
        assert "sleeps between evaluations" in answer.text

    key = (tmp_path / "engine" / "expose.key").read_text()
    made.delivery.sync.rest = sleep  # type: ignore[method-assign, assignment]
    made.evaluate(Asked(step=0))
    assert slept == [503]
    made.close()


def test_weights_that_did_not_arrive_leave_the_door_shut(tmp_path: Path) -> None:
    import httpx

    made = evaluator(tmp_path, Engine(), expose_port=0)
    assert made.door is not None
    made.evaluate(Asked(step=0))
    key = (tmp_path / "engine" / "expose.key").read_text()

    def ask() -> httpx.Response:
        assert made.door is not None
        return httpx.post(f"{made.door.url}/completions", json={}, headers={"Authorization": f"Bearer {key}"})

    assert "does not answer" in ask().text  # open, but there is no engine on that socket

    def fail(*_: Any) -> SyncResult:
        raise EngineError("the reload failed")

    made.delivery.sync = SimpleNamespace(push=fail)  # type: ignore[assignment]
    with pytest.raises(EngineError):
        made.evaluate(Asked(step=10, snapshot=snapshot(tmp_path, 10)))
    assert "the weights of step 10 are on their way" in ask().text
    made.close()


def test_scores_that_came_late_say_at_which_step_they_were_known(tmp_path: Path) -> None:
    made = evaluator(tmp_path, Engine())
    made.evaluate(Asked(step=0, now=lambda: 0))
    made.evaluate(Asked(step=10, snapshot=snapshot(tmp_path, 10), now=lambda: 13))
    known = [(row["step"], row.get("late"), row.get("evaluated_at_step")) for row in score_rows(tmp_path)]
    assert known == [(0, None, None), (10, True, 13)]


@pytest.mark.parametrize("error", [EngineError("the deadline has passed"), RuntimeError("a metric of your own")])
def test_whatever_fails_the_engine_does_not_stay_awake_beside_training(error: Exception, tmp_path: Path) -> None:
    made = evaluator(tmp_path, Engine())
    made.delivery.server.spec.sleep_mode = True  # type: ignore[misc]
    slept: list[bool] = []
    made.delivery.sync.rest = lambda: slept.append(True)  # type: ignore[method-assign, assignment]

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    made.delivery.client.generate = fail  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        made.evaluate(Asked(step=0))
    assert slept == [True]
