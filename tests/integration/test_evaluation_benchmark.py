"""The benchmark of evaluation, tried on CPUs: training with vLLM beside it, taken apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "evaluation.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.vllm,
    pytest.mark.skipif(not SCRIPT.exists(), reason="in the repository only"),
]


def measure(out: Path) -> str:
    """Run the jobs into `out`; what was printed."""
    line = [sys.executable, str(SCRIPT), "one", "--out", str(out), "--device", "cpu", "--budget_s", "500"]
    line += ["--evaluations", "2", "--every", "2", "--length", "64", "--micro_batch_size", "1", "--prompts", "4"]
    line += ["--new_tokens", "4", "--only", "full"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=560, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return done.stdout


def test_training_beside_vllm_is_taken_apart_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    measure(tmp_path / "results")
    rows = json.loads((tmp_path / "results" / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert {name: row["status"] for name, row in rows.items()} == {"full": "ok"}
    evaluations = rows["full"]["evaluations"]
    assert [one["step"] for one in evaluations] == [0, 2, 4]
    assert [one["weights_path"] for one in evaluations] == ["start", "reload", "reload"]
    [pause] = rows["full"]["measured"]["evaluation_pauses"]  # after the last step there is none
    parts = evaluations[1]["phases"]
    assert {"snapshot", "trainer's canary", "reload", "reset", "engine's canary"} <= set(parts)
    assert parts["snapshot"] < pause["before_questions"] < pause["seconds"]
    assert evaluations[1]["task_seconds"]["first"] <= evaluations[1]["generate_seconds"]
    assert "POST /collective_rpc" in evaluations[1]["calls"]
    assert len(rows["full"]["measured"]["durations"]) == 4
    page = (tmp_path / "results" / "evaluation.md").read_text(encoding="utf-8")
    assert "| full | · | 2 | reload |" in page
    assert measure(tmp_path / "results") == ""
