"""How answers are scored."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from hf_dsvllm.errors import EvalFileError
from hf_dsvllm.metrics import BUILT_IN, Metric, resolve, score, summarise

CASES = [
    ("exact_match", " Paris\n", "Paris", True),
    ("exact_match", "paris", "Paris", False),
    ("exact_match", "", "Paris", False),
    ("normalized_match", "The  answer, is: PARIS!", "the answer is paris", True),
    ("normalized_match", "Straße", "STRASSE", True),
    ("normalized_match", "3.5", "35", False),
    ("normalized_match", "-5", "5", False),
    ("normalized_match", "it is -5.", "it is -5", True),
    ("normalized_match", "2020-05", "2020 05", True),
    ("contains", "I think it is Paris.", "Paris", True),
    ("contains", "I think it is paris.", "Paris", False),
    ("regex", "call 555-1234 now", r"\d{3}-\d{4}", True),
    ("regex", "call now", r"\d{3}-\d{4}", False),
    ("json_equal", ' {"b": 2, "a": 1.0}\n', '{"a":1,"b":2}', True),
    ("json_equal", '{"a": true}', '{"a":1}', False),
    ("json_equal", '{"a": [1, {"b": null}]}', '{"a":[1,{"b":null}]}', True),
    ("json_equal", '{"a": [1, 2]}', '{"a":[2,1]}', False),
    ("json_equal", '{"a": [1, 2]}', '{"a":[1]}', False),
    ("json_equal", 'Here it is: {"a": 1}', '{"a":1}', False),
    ("json_equal", '{"a": 1} done', '{"a":1}', False),
    ("json_equal", '{"a": 1, "a": 1}', '{"a":1}', False),
    ("json_equal", '{"a": NaN}', '{"a":null}', False),
    ("json_equal", '{"a": 1', '{"a":1}', False),
    ("json_equal", "[" * 100_000, "[]", False),
    ("json_equal", "1" * 10_000, "1", False),
    ("json_equal", '"1"', "1", False),
    ("number_match", "So 3 + 4 makes $1,200.00.", "1200", True),
    ("number_match", "1.2e3", "1200", True),
    ("number_match", "it is 7, not 8", "7", False),
    ("number_match", "-5", "5", False),
    ("number_match", "from 2020-05", "5", True),
    ("number_match", "none", "5", False),
    ("rouge_l", "The cat, it sat.", "the CAT it SAT", True),
    ("rouge_l", "a dog", "the cat", False),
    ("bleu", "the cat sat on the mat\n", "the cat sat on the mat", True),
    ("bleu", "dogs bark", "the cat sat on the mat", False),
    ("chrf", "straße 5", "straße 5", True),
    ("chrf", "xyz", "abc", False),
    ("code_tests", "def add(a, b):\n    return a + b", "assert add(1, 2) == 3", True),
    ("code_tests", "def add(a, b):\n    return a - b", "assert add(1, 2) == 3", False),
    ("number_match", "#### 72", "Natalia sold 48/2 = 24 clips. #### 72", True),
]


@pytest.mark.parametrize(("name", "completion", "reference", "expected"), CASES)
def test_built_in_metric_judges(name, completion, reference, expected):
    assert score(resolve(name), [completion], [reference]) == [float(expected)]


def test_every_built_in_metric_has_a_case_for_right_and_for_wrong():
    judged = {(name, expected) for name, _, _, expected in CASES}
    assert judged == {(name, verdict) for name in BUILT_IN for verdict in (True, False)}


@pytest.mark.parametrize(
    ("name", "reference", "part"),
    [
        ("regex", "(unclosed", "not a regular expression"),
        ("json_equal", "{broken", "not JSON"),
        ("json_equal", '{"a":1,"a":2}', "repeats a key"),
        ("number_match", "seven", "holds no number"),
        ("contains", "  ", "blank"),
        ("normalized_match", "...", "nothing but punctuation"),
        ("rouge_l", "…", "holds no word"),
        ("bleu", " ", "blank"),
        ("chrf", "", "blank"),
        ("code_tests", "", "needs tests"),
        ("code_tests", "assert add(1,", "not Python"),
    ],
)
def test_a_reference_that_the_metric_cannot_use_is_named(name, reference, part):
    assert part in resolve(name).check_reference(reference)


def test_an_unknown_metric_names_the_nearest_and_all_built_in_ones():
    with pytest.raises(EvalFileError, match="Did you mean exact_match") as caught:
        resolve("exactmatch")
    assert all(name in str(caught.value) for name in BUILT_IN)


def test_a_function_in_a_file_is_a_metric(tmp_path):
    file = tmp_path / "my_metrics.py"
    file.write_text(
        "import dataclasses\n\n@dataclasses.dataclass\nclass Box:\n    value: float\n\n"
        "def half(completion, reference):\n    return Box(0.5).value if completion else 0\n"
    )
    metric = resolve(f"{file}:half")
    assert metric.name == "half"
    assert score(metric, ["a", ""], ["", ""]) == [0.5, 0.0]


def test_a_function_in_a_package_is_a_metric(tmp_path, monkeypatch):
    (tmp_path / "scorers_for_test").mkdir()
    (tmp_path / "scorers_for_test" / "__init__.py").write_text("")
    (tmp_path / "scorers_for_test" / "text.py").write_text(
        "def same(completion, reference): return completion == reference"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score(resolve("scorers_for_test.text:same"), ["x"], ["x"]) == [1.0]


def test_a_function_that_is_not_there_names_the_nearest(tmp_path):
    file = tmp_path / "metrics.py"
    file.write_text("def fuzzy(completion, reference): return 1.0\n")
    with pytest.raises(EvalFileError, match="did you mean fuzzy"):
        resolve(f"{file}:fuzy")


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "metrics.py").write_text("")
    with pytest.raises(EvalFileError, match=r"Nearest there: metrics\.py"):
        resolve(f"{tmp_path}/metric.py:fuzzy")


def test_a_file_that_fails_to_import_quotes_its_own_error_every_time(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('no such dictionary')\n")
    for _ in range(2):
        with pytest.raises(EvalFileError, match="RuntimeError: no such dictionary"):
            resolve(f"{file}:score")


def test_a_package_that_is_not_there_says_how_to_name_a_file():
    with pytest.raises(EvalFileError, match=r"No module named 'nowhere_at_all'.*path/file\.py:function"):
        resolve("nowhere_at_all.scores:f")


def raising(completion: str, reference: str) -> float:
    raise KeyError("price")


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (raising, "KeyError: 'price'"),
        (lambda completion, reference: None, "returned None"),
        (lambda completion, reference: "1.0", "returned '1.0'"),
        (lambda completion, reference: math.nan, "returned nan"),
        (lambda completion, reference: 10**400, "finite number"),
    ],
)
def test_a_metric_that_fails_names_the_sample(function, part):
    with pytest.raises(EvalFileError) as caught:
        score(Metric(name="mine", function=function), ["answer"], ["truth"], sample_ids=["order-17"])
    assert part in str(caught.value)
    assert "order-17" in str(caught.value)


def test_numpy_numbers_are_numbers():
    results = iter([np.float32(0.5), np.bool_(True), np.int64(0)])
    metric = Metric(name="numpy", function=lambda completion, reference: next(results))
    assert score(metric, ["", "", ""], ["", "", ""]) == [0.5, 1.0, 0.0]


def test_a_batch_sees_prompts_and_ids_and_may_leave_an_answer_without_a_score():
    seen = []

    def judged(questions):
        seen.extend(questions)
        return [None if not question.completion else 0.5 for question in questions]

    metric = Metric(name="judged", function=lambda completion, reference: 0.0, batch=judged)
    scores = score(metric, ["a", ""], ["r", "r"], sample_ids=["x", "y"], prompts=["p", [{"role": "user"}]])
    assert scores == [0.5, None]
    assert [(question.sample_id, question.prompt) for question in seen] == [("x", "p"), ("y", [{"role": "user"}])]
    assert (summarise(scores).mean, summarise(scores).count) == (0.5, 1)
    with pytest.raises(EvalFileError, match="none of 1 answers could be scored"):
        summarise([None])


def test_what_a_batch_returns_is_checked_too():
    metric = Metric(name="judged", function=lambda completion, reference: 0.0, batch=lambda questions: [math.inf])
    with pytest.raises(EvalFileError, match="returned inf"):
        score(metric, ["a"], ["r"])


def test_completions_and_references_must_have_the_same_length():
    with pytest.raises(ValueError):
        score(resolve("exact_match"), ["a"], ["a", "b"])


def test_summary_is_mean_and_standard_error():
    summary = summarise([1.0, 0.0, 1.0, 1.0])
    assert (summary.mean, summary.count) == (0.75, 4)
    assert summary.standard_error == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert summarise([1.0]).standard_error is None
    with pytest.raises(ValueError):
        summarise([])


def test_tasks_and_metrics_do_not_import_torch():
    code = "import sys, hf_dsvllm.tasks, hf_dsvllm.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
