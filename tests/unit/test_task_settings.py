"""NAME.task.json: what one task wants otherwise than the flags say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm.errors import EvalFileError
from hf_dsvllm.preflight import _sampling_problems
from hf_dsvllm.task_settings import TaskSettings
from hf_dsvllm.tasks import EvalTask, load_task

CHAT = {"prompt": [{"role": "user", "content": "Capital of France?"}], "reference": "Paris"}
OWN_SYSTEM = {"prompt": [{"role": "system", "content": "mine"}, *CHAT["prompt"]], "reference": "Paris"}
TEXT = {"prompt": "France:", "reference": " Paris"}


def load(tmp_path: Path, settings: Any, *rows: dict[str, Any], **options: Any) -> EvalTask:
    (tmp_path / "Capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or (CHAT,)))
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "Capitals.task.json").write_text(text)
    return load_task(tmp_path / "Capitals.jsonl", **options)


def error_of(tmp_path: Path, settings: Any, *rows: dict[str, Any]) -> str:
    with pytest.raises(EvalFileError) as caught:
        load(tmp_path, settings, *rows)
    return str(caught.value)


def test_every_setting_is_taken_from_the_file_beside(tmp_path: Path) -> None:
    settings = {"max_new_tokens": 8, "temperature": 0.7, "samples": 4, "stop": ["\n", "###"], "system_prompt": "Short."}
    task = load(tmp_path, {"metrics": ["contains", "rouge_l"], **settings})
    assert task.metrics == ("contains", "rouge_l")
    assert task.settings == TaskSettings(
        metrics=("contains", "rouge_l"), max_new_tokens=8, temperature=0.7, samples=4, stop=("\n", "###"),
        system_prompt="Short.",
    )  # fmt: skip


def test_what_it_leaves_open_the_flags_decide(tmp_path: Path) -> None:
    task = load(tmp_path, {"metrics": "contains"}, metrics=("exact_match",))
    assert task.metrics == ("contains",)
    assert task.settings == TaskSettings(metrics=("contains",))
    (tmp_path / "Capitals.task.json").unlink()
    assert load_task(tmp_path / "Capitals.jsonl", metrics=("regex",)).metrics == ("regex",)


def test_the_metrics_of_the_file_check_the_references(tmp_path: Path) -> None:
    assert "holds no number" in error_of(tmp_path, {"metrics": "number_match"})


def test_the_system_prompt_stands_in_front_unless_a_line_has_its_own(tmp_path: Path) -> None:
    first, second = load(tmp_path, {"system_prompt": "Be short."}, CHAT, OWN_SYSTEM).samples
    assert first.prompt == ({"role": "system", "content": "Be short."}, *CHAT["prompt"])
    assert second.prompt == tuple(OWN_SYSTEM["prompt"])
    assert "line 2: the task has a system_prompt, which needs chat messages" in error_of(
        tmp_path, {"system_prompt": "Be short."}, CHAT, TEXT
    )


def test_all_wrong_entries_are_reported_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    wrong = {"max_tokens": 8, "samples": 0, "temperature": True, "stop": ["a"] * 5, "system_prompt": "", "metrics": []}
    message = error_of(tmp_path, wrong)
    for words in (
        "'max_tokens' is no setting of a task. Did you mean max_new_tokens?",
        "samples must be a whole number from 1 on, not 0",
        "temperature must be a number from 0 on, not true",
        "stop must be a text or a list of at most 4 texts",
        "system_prompt must be a text",
        "metrics must be the name of a metric or a list of names, not []",
    ):
        assert words in message


@pytest.mark.parametrize(("text", "words"), [("{", "are not JSON"), ("[1]", "hold a list")])
def test_a_file_that_is_no_object_is_said(tmp_path: Path, text: str, words: str) -> None:
    assert words in error_of(tmp_path, text)


@pytest.mark.parametrize(
    ("settings", "samples", "temperature", "wrong"),
    [
        ({}, 1, 0.0, False),
        ({}, 4, 0.0, True),
        ({}, 4, 0.8, False),
        ({"samples": 4}, 1, 0.0, True),
        ({"samples": 4, "temperature": 0.8}, 1, 0.0, False),
        ({"temperature": 0}, 4, 0.8, True),
        ({"samples": 1}, 4, 0.0, False),
    ],
)
def test_several_answers_need_a_temperature(
    tmp_path: Path, settings: dict[str, Any], samples: int, temperature: float, wrong: bool
) -> None:
    args = SimpleNamespace(gen_eval_samples=samples, gen_eval_temperature=temperature)
    problems = _sampling_problems(args, [load(tmp_path, settings)])
    assert [problem.what for problem in problems] == (
        ["task capitals asks for 4 answers to each prompt at temperature 0, which are all the same"] if wrong else []
    )
