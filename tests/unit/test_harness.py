"""lm-evaluation-harness in a process of its own: what it is asked, what comes back, and its end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from hf_dsvllm import harness
from hf_dsvllm.errors import EngineError
from hf_dsvllm.harness import child, job

TASK = {
    "task": "tiny",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A stand-in for lm-eval's process with `body` as its work; returns its log."""
    file = tmp_path / "child.py"
    file.write_text(f"import json, os, sys, time\njob = json.loads(sys.stdin.readline())\n{body}\n")
    monkeypatch.setattr(job, "CHILD", file)
    return tmp_path / "log"


def run(log: Path, **more: Any) -> harness.HarnessScores:
    given = {"url": "http://127.0.0.1:1/v1", "key": "k", "model": "training", "tokenizer": "t", "max_length": 64}
    given |= {"limit": None, "seed": 1, "timeout_s": 60.0}
    with harness.Worker(log) as worker:
        return harness.run_tasks(worker, ("tiny",), **(given | more))


def test_names_come_one_by_one_or_with_commas_and_files_by_their_whole_path() -> None:
    assert harness.names_of(["gsm8k,arc_easy", " arc_easy", ""]) == ("gsm8k", "arc_easy")
    assert harness.names_of(["x.yaml"]) == (str(Path.cwd() / "x.yaml"),)
    assert harness.names_of(None) == ()


def test_scores_errors_and_prompts_come_back_under_safe_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {
        "tasks": {
            "Tiny-Task": {
                "scores": {"acc": 0.5, "exact_match_strict-match": 0.25},
                "errors": {"acc": 0.1},
                "higher_is_better": {"exact_match_strict-match": True},
            }
        },
        "rows": {
            "Tiny-Task": [{"id": "0", "scores": {"exact_match_strict-match": 1.0}}],
            "part": [{"id": "0", "scores": {}}],
        },
    }
    log = ending(tmp_path, monkeypatch, f"open(job['out'], 'w').write(json.dumps({result!r}))")
    scores = run(log)
    [task] = scores.tasks
    assert (task.name, task.scores) == ("tiny_task", {"acc": 0.5, "exact_match_strict_match": 0.25})
    assert task.errors == {"acc": 0.1}
    assert task.higher_is_better == {"exact_match_strict_match": True}
    assert task.rows == [{"id": "0", "scores": {"exact_match_strict_match": 1.0}}]
    assert [part.name for part in scores.parts] == ["part"]


def test_it_gets_the_key_by_its_pipe_and_nothing_of_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.delenv("no_proxy", raising=False)
    told = tmp_path / "told"
    body = f"open({str(told)!r}, 'w').write(json.dumps([dict(os.environ), job]))\nsys.exit(1)"
    with pytest.raises(EngineError):
        run(ending(tmp_path, monkeypatch, body), key="sesame")
    env, asked = json.loads(told.read_text())
    assert asked["key"] == "sesame"  # neither its command line nor its environment, which others may read
    assert "sesame" not in json.dumps(env)
    assert "RANK" not in env
    assert "MASTER_PORT" not in env
    assert env["no_proxy"] == "intranet,127.0.0.1"
    assert env["CUDA_VISIBLE_DEVICES"] == ""


def test_one_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"exit code 5\): boom"):
        run(ending(tmp_path, monkeypatch, "print('boom', flush=True)\nsys.exit(5)"))
    body = "open(job['out'], 'w').write(json.dumps({'error': 'ValueError: no such metric'}))"
    with pytest.raises(EngineError, match="ValueError: no such metric"):
        run(ending(tmp_path, monkeypatch, body))


def test_one_process_does_one_job_after_another_and_ends_with_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "while job:\n"
    body += "    open(job['out'] + 'x', 'w').write(json.dumps({'pid': os.getpid()}))\n"
    body += "    os.replace(job['out'] + 'x', job['out'])\n"
    body += "    job = json.loads(sys.stdin.readline())"
    with harness.Worker(ending(tmp_path, monkeypatch, body)) as worker:
        first, second = (worker.do({"kind": "run"}, 60.0)["pid"] for _ in range(2))
        assert first == second
        assert psutil.pid_exists(first)
    assert not psutil.pid_exists(first)


def test_after_a_failure_the_next_job_has_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = harness.Worker(ending(tmp_path, monkeypatch, "sys.exit(5)"))
    with pytest.raises(EngineError):
        worker.do({"kind": "run"}, 60.0)
    ending(tmp_path, monkeypatch, "open(job['out'], 'w').write('{}')")
    assert worker.do({"kind": "run"}, 60.0) == {}
    worker.close()
    worker.close()


def test_one_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    body = f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    with pytest.raises(EngineError, match="not done after 1 s"):
        run(ending(tmp_path, monkeypatch, body), timeout_s=1.0)
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))


def test_it_ends_with_the_pipe_that_the_trainer_holds() -> None:
    done = subprocess.run([sys.executable, child.__file__], stdin=subprocess.DEVNULL, check=False, timeout=60)
    assert done.returncode == child.ENDED_WITH_PARENT


def test_without_lm_eval_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [problem] = harness.check_tasks(("gsm8k",))
    assert "pip install 'hf-dsvllm[lm-eval]'" in problem.fix


def test_tasks_that_have_loaded_once_are_not_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_loaded", {})
    monkeypatch.setattr(job, "installed", lambda: True)
    counted = tmp_path / "counted"
    answers = [
        {"unknown": {"a": []}, "failed": {}, "found": {}, "shown": []},
        {"unknown": {}, "failed": {}, "found": {"A-1": 1}, "shown": ["A-1"]},
    ]
    for answer, problems, times in zip((*answers, answers[0]), (1, 0, 0), (1, 2, 2), strict=True):
        body = f"open({str(counted)!r}, 'a').write('x')\nopen(job['out'], 'w').write(json.dumps({answer!r}))"
        ending(tmp_path, monkeypatch, body)
        assert len(harness.check_tasks(("a",))) == problems
        assert len(counted.read_text()) == times
        assert harness.logged_tasks(("a",)) == (None if problems else ("a_1",))


def test_a_task_file_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    [problem] = harness.check_tasks((str(tmp_path / "x.yaml"),))
    assert "there is no file" in problem.what


@pytest.mark.slow
@pytest.mark.skipif(not harness.installed(), reason="lm-eval is not installed")
def test_unknown_tasks_and_missing_data_are_found_before_training(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n')
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}))
    bad.write_text(yaml.safe_dump(TASK | {"task": "bad", "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}))
    unknown, *failed = harness.check_tasks((str(good), "gsm8kk", str(bad), "gsm8k"))
    assert "there is no task 'gsm8kk'" in unknown.what
    assert "gsm8k" in unknown.fix
    assert [problem.what.partition(" cannot be loaded")[0] for problem in failed] == [
        f"gen_eval_lm_eval: task {bad}",
        "gen_eval_lm_eval: task gsm8k",  # its data set is on the hub, which tests never reach
    ]


def test_filters_stand_side_by_side_in_one_row() -> None:
    sample = {"doc_id": 4, "target": "7", "arguments": [("2 + 5 =", {})], "metrics": ["exact_match"]}
    strict = sample | {"filter": "strict-match", "exact_match": 0.0, "filtered_resps": ["[invalid]"]}
    flexible = sample | {"filter": "flexible-extract", "exact_match": 1.0, "filtered_resps": ["7"]}
    [row] = child.rows([strict, flexible])
    assert (row["id"], row["prompt"], row["reference"]) == ("4", "2 + 5 =", "7")
    assert row["scores"] == {"exact_match_strict-match": 0.0, "exact_match_flexible-extract": 1.0}


def test_scores_and_their_errors_are_told_apart() -> None:
    told = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict-match": 0,
        "perplexity,none": "N/A",
    }
    expected: dict[str, Any] = {"scores": {"acc": 0.5, "exact_match_strict-match": 0.0}, "errors": {"acc": 0.1}}
    results: dict[str, Any] = {"results": {"x": told}}
    assert child.task_result("x", results) == expected | {"higher_is_better": {}}
    results["higher_is_better"] = {"x": {"acc": None, "exact_match": False, "perplexity": False}}
    assert child.task_result("x", results) == expected | {"higher_is_better": {"exact_match_strict-match": False}}
