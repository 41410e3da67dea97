"""A dataset that cannot be had is said with its fix, before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_dsvllm.data import DataArguments, load_split
from hf_dsvllm.errors import ConfigError, Problem


def problem_of(**given: Any) -> Problem:
    with pytest.raises(ConfigError) as raised:
        load_split(DataArguments(**given), needs_test=False)
    (problem,) = raised.value.problems
    return problem


def test_a_dataset_that_is_not_on_the_hub_or_out_of_reach_is_one_problem() -> None:
    problem = problem_of(dataset_name="nobody/nothing-at-all")
    assert problem.what.startswith("the dataset 'nobody/nothing-at-all' cannot be had: ")
    assert "Hub" in problem.what
    assert "hf auth login" in problem.fix


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
        ConnectionError("no network"),
        FileNotFoundError("no such folder"),
        ValueError("BuilderConfig 'x' not found. Available: ['default']"),
    ],
)
def test_whatever_keeps_it_away_is_quoted(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert str(error) in problem_of(dataset_name="a/b").what


def test_a_broken_file_in_a_datasets_folder_is_told_by_its_cause(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    problem = problem_of(dataset_name=str(tmp_path))
    assert "cannot be had: " in problem.what
    assert "An error occurred while generating the dataset" not in problem.what
