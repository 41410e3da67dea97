"""The benchmark of evaluation: its jobs are flags that exist, its page says what was measured and what was not."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm.fields import added_fields

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are in the repository only")
OURS = ("evaluation", "evaluation_jobs", "evaluation_table", "main_job", "cells", "report", "standin")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules, whose folder is no package; the planner's benchmark has a `report` as well."""
    before = list(sys.path)
    others = {name: sys.modules.pop(name) for name in OURS if name in sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    import evaluation
    import evaluation_jobs
    import evaluation_table

    yield SimpleNamespace(evaluation=evaluation, jobs=evaluation_jobs, table=evaluation_table)
    sys.path[:] = before
    for name in OURS:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def options(tmp_path: Path, **more: Any) -> Namespace:
    given = {"sets": ["one", "four", "learn"], "device": "cuda", "only": [], "vllm_args": "--attention-backend X"}
    given |= {"work": tmp_path, "fast": tmp_path, "evaluations": 4, "every": 8, "length": 64, "micro_batch_size": 2}
    return Namespace(**given | {"new_tokens": 4, "samples": 8000, "preset": "zero2", "model": tmp_path} | more)


def test_every_job_is_named_once_and_starts_with_flags_that_exist(bench: SimpleNamespace, tmp_path: Path) -> None:
    jobs = bench.jobs.jobs_of(options(tmp_path))
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    assert {job.like for job in jobs} | {job.after for job in jobs} <= {*names, None}
    for job in jobs:
        words = " ".join(bench.jobs.command(job, options(tmp_path), tmp_path / "run")).replace("=", " ").split()
        flags = {word[2:] for word in words if word.startswith(("--gen_eval", "--ds_", "--vllm_", "--export_"))}
        assert flags <= {*added_fields()}, job.name
        assert not set(bench.jobs.OURS) & set(words), job.name
        evaluates = job.kind != "ask" and "--no_evaluation" not in job.flags
        assert ("--gen_eval_file" in words) == evaluates, job.name


def test_a_job_cut_by_the_call_is_tried_again_and_no_model_is_written_for_what_cannot_run(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(index=0, memory_bytes=80 << 30)
    monkeypatch.setattr(
        bench.evaluation, "detect", lambda: SimpleNamespace(gpus=[gpu, gpu], describe=lambda: "2 x H100")
    )
    started: list[str] = []
    monkeypatch.setattr(bench.evaluation.Bench, "write_data", lambda self, shape, steps: None)
    monkeypatch.setattr(
        bench.evaluation.Bench, "start", lambda self, job, how: started.append(job.name if how == "start" else how)
    )
    given = options(tmp_path, budget_s=600.0, gpus=0, out=tmp_path, again=False, copy_to=None)
    run = bench.evaluation.Bench(given)
    run.rows = {
        "start-eager-cold": {"status": "ok"},
        "lora": {"status": "not run to its end: the call was, stopped after 90 s: …"},
        "qlora": {"status": "stopped after 240 s: …"},
    }
    jobs = [job for job in bench.jobs.jobs_of(given) if job.kind != "learn"]
    assert run.too_small(next(job for job in jobs if job.name == "full")) == "it needs a GPU of 90 GiB"
    (tmp_path / "model-8b").mkdir()
    (tmp_path / "model-8b" / "config.json").touch()
    run.run(jobs)
    assert {"lora", "start-eager-cold"} <= set(started), "the first start again: its compiled code is not on this host"
    assert "qlora" not in started
    assert not [name for name in started if name.startswith("write-")]


def measured(step_s: float, pauses: list[float], evaluated: list[dict[str, float]]) -> dict[str, Any]:
    durations = [step_s] * (len(pauses) + 1)
    return {
        "durations": durations,
        "pauses": pauses,
        "median_step_seconds": step_s,
        "gpu": "NVIDIA H200",
        "evaluation_pauses": evaluated,
    }


def evaluation(step: int, **more: Any) -> dict[str, Any]:
    phases = {"stream": 0.4, "connect": 0.45, "update": 0.2, "trainer's canary": 0.1, "engine's canary": 0.2}
    given = {"step": step, "weights_path": "ipc", "phases": phases, "task_seconds": {"first": 0.05, "prompts": 2.0}}
    given |= {"wait_seconds": 3.0, "generate_seconds": 2.0, "asleep_gib": 1.5, "calls": {"POST /wake_up": [2, 0.1]}}
    return given | more


def test_the_page_says_what_an_evaluation_cost_and_why_there_is_no_result(bench: SimpleNamespace) -> None:
    waited = {"step": 2, "seconds": 3.0, "before_questions": 0.9, "after_answers": 0.3}
    shared = {
        "status": "ok", "kind": "train", "like": None, "trainers": 1,
        "evaluations": [evaluation(0, weights_path="start"), evaluation(2)],
        "measured": measured(1.0, [0.1, 3.0], [waited]),
    }  # fmt: skip
    spare = shared | {
        "like": "alone",
        "evaluations": [evaluation(0, weights_path="start"), *map(evaluation, (4, 8))],
        "measured": measured(1.0, [0.1] * 3 + [9.0] + [0.1] * 3 + [0.6] + [0.1],
                             [{"step": 4, "seconds": 9.0}, {"step": 8, "seconds": 0.6}]),
    }  # fmt: skip
    alone = {"status": "ok", "kind": "train", "evaluations": [], "measured": measured(1.0, [0.1] * 9, [])}
    ask = {
        "status": "ok",
        "kind": "ask",
        "card": "NVIDIA H200",
        "prompts": 512,
        "new_tokens": 256,
        "layers": 10,
        "seconds": 9.0,
    }
    eager = ask | {"tokens_per_second": 900.0, "start_seconds": 60.0, "decode_step_seconds": 0.03}
    compiled = ask | {"tokens_per_second": 1800.0, "start_seconds": 130.0, "decode_step_seconds": 0.01}
    hf = ask | {"tokens_per_second": 90.0, "batch": 256, "tried": {"64": 50.0, "256": 90.0}}
    other = eager | {"card": "NVIDIA H100 80GB HBM3", "tokens_per_second": 600.0, "start_seconds": None}
    failed = {"status": "exit code 1: RuntimeError: CUDA out of memory", "kind": "train", "evaluations": []}
    rows = {"full": shared, "spare": spare, "alone": alone, "hf": hf, "14b": failed, "other": other}
    rows |= {"start-eager-cold": eager, "start-compiled-cold": compiled}
    call = {"date": "now", "hardware": "4 x H200", "gpus": 4, "versions": {"vllm": "0.26"}, "command": "python …"}
    page = bench.table.page({"calls": [call], "rows": rows})
    # 0.9 s to the first question, 0.05 s to its token, of it 0.3 s for the canary
    assert "| full | H200 | 2 | ipc | 0.95 | 0.30 | 2.0 | 0.30 | 1.50 | 0.200 |" in page
    # 0.6 s of which 0.1 s is every step's; the first stall, 9 s, waited for vLLM and is apart; 0.5 / (50 × 1 s) twice
    assert "| spare | H200 | 1 | 1.000 | 1.000 | 9.00 | 0.45 | 0.50 | 0.60 | 1.0% | 1.0% |" in page
    assert "10.00 × | 20.00 × |" in page
    # figures of another card are not compared
    assert "| other | H100 80GB HBM3 | 1 | 512 × 256 | · | · | 600 | 600 | · | · |" in page
    assert "LAUNCH_S = (0.0300 - 0.0100) / 10 layers = 2.00e-03; COMPILE_S = 130.0 - 60.0 = 70" in page
    assert "* 14b: exit code 1: RuntimeError: CUDA out of memory" in page
