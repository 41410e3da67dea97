"""The benchmark of training speed, tried on CPUs: plain TRL and a preset side by side in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train_speed.py"
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not SCRIPT.exists(), reason="in the repository only")]
ARMS = ("two-plain-z3", "two-preset-zero3")


def measure(out: Path) -> str:
    """Run the two arms into `out`; what it printed."""
    line = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--gpus", "2", "--threads", "1"]
    line += ["--steps", "4", "--budget_s", "480", "--cell_s", "240", "--only", *ARMS]
    done = subprocess.run(line, capture_output=True, text=True, timeout=560, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return done.stdout


def test_plain_trl_and_a_preset_are_measured_side_by_side_once(tmp_path: Path) -> None:
    measure(tmp_path)
    rows: dict[str, Any] = {
        row["name"]: row for row in json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    }
    assert len(rows) == len(ARMS)
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    cells = json.loads((tmp_path / "cells.json").read_text(encoding="utf-8"))
    for name, row in rows.items():
        engines = {(rank["engine"], rank["zero_stage"]) for rank in cells[name]["ranks"]}
        assert engines == {("DeepSpeedEngine", 3)}
        assert row["real_tokens_per_second"] > 0
        assert row["real_share"] == 1.0
        assert row["predicted_seconds"] > 0
    # float32, the same data and seed: plain and preset learn the same
    losses = [cells[name]["ranks"][0]["losses"] for name in sorted(rows)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "plain TRL z3" in page
    assert "product, best" in page
    assert "already" in measure(tmp_path)


def test_a_measurement_that_is_killed_leaves_no_lane_and_no_arm(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--device", "cpu", "--gpus", "2", "--threads", "1"]
    line += ["--steps", "4000", "--budget_s", "480", "--cell_s", "400", "--only", ARMS[1]]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(line, stdout=log, stderr=log)
    found: list[psutil.Process] = []
    try:
        until = time.monotonic() + 240
        while len(list((tmp_path / "work").glob("two-*.log"))) < 2:  # one of each rank
            assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            assert time.monotonic() < until
            time.sleep(0.2)
        found = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(found, timeout=20)
        for each in left:
            each.kill()
    assert len(found) >= 4  # two lanes, two ranks
    assert not left
