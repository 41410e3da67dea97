"""The samples of an evaluation in TensorBoard (real), W&B and trackio (stand-ins with their calls)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm.evaluation.sample_tables import MAX_TEXT, log_samples, read_samples

PROMPT = [{"role": "user", "content": "a | b <i>"}]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "evals").mkdir()
    for task in ("orders", "sums"):
        rows = [
            {"step": 20, "id": str(n), "prompt": PROMPT, "reference": "r", "answer": "one\ntwo " + "x" * 900,
             "scores": {"exact_match": 0.5, "judge": None}}
            for n in range(3)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "evals" / f"step-000020.{task}.jsonl").write_text(text)
    return tmp_path


def arguments(run: Path, *backends: str) -> Any:
    return SimpleNamespace(report_to=list(backends), output_dir=str(run))


def test_the_first_samples_of_each_task_are_read(run: Path) -> None:
    rows = read_samples(run, 20, limit=2)
    assert [(row["task"], row["id"]) for row in rows] == [
        ("orders", "0"),
        ("orders", "1"),
        ("sums", "0"),
        ("sums", "1"),
    ]
    assert read_samples(run, 30) == []


def test_tensorboard_shows_them_as_a_table(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in list((run / "evals").glob("step-000020.*")):
        shutil.copy(file, file.with_name(file.name.replace("000020", "000040")))
    for step in (20, 40):
        log_samples(arguments(run, "tensorboard"), run, step)
    [folder] = (run / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    assert [tag.removesuffix("/text_summary") for tag in tags] == ["gen_eval_samples/orders", "gen_eval_samples/sums"]
    told = events.Tensors(tags[0])
    assert [event.step for event in told] == [20, 40]
    text = told[0].tensor_proto.string_val[0].decode()
    head, rule, first = text.splitlines()[:3]
    assert head == "| id | prompt | reference | answer | exact_match | judge |"
    assert rule.count("---") == 6
    assert "user: a \\| b &lt;i&gt;" in first
    assert "one<br>two" in first
    assert first.endswith("| 0.5 | – |")
    assert len(first) < 2 * MAX_TEXT


class FakeBackend:
    """wandb or trackio as far as tables go."""

    def __init__(self, run: Any = "a run") -> None:
        self.run = run
        self.logged: list[dict[str, Any]] = []

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


@pytest.mark.parametrize("backend", ["wandb", "trackio"])
def test_backends_with_tables_get_one_a_task_on_the_trainers_axis(
    run: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeBackend()
    monkeypatch.setitem(sys.modules, backend, fake)
    log_samples(arguments(run, backend), run, 20)
    [values] = fake.logged
    assert values["train/global_step"] == 20
    columns, data = values["gen_eval_samples/sums"]
    assert columns == ["id", "prompt", "reference", "answer", "exact_match", "judge"]
    assert data[0][:2] == ["0", "user: a | b <i>"]
    assert data[0][4:] == [0.5, None]


def test_a_backend_that_is_absent_or_fails_costs_a_warning_and_the_others_get_theirs(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeBackend()
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "trackio", fake)
    log_samples(arguments(run, "wandb", "mlflow", "trackio"), run, 20)
    assert len(fake.logged) == 1
    assert "did not reach wandb: ModuleNotFoundError" in caplog.text


def test_wandb_without_a_run_is_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeBackend(run=None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log_samples(arguments(run, "wandb"), run, 20)
    log_samples(arguments(run, "wandb"), run, 30)
    assert fake.logged == []
