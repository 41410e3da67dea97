"""Gradients that are added up where the GPU is train like those that go to the host and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, torchrun

SCRIPT = ROOT / "tests" / "scripts" / "summed.py"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["zero2_offload", "zero3_offload_optimizer", "zero3_offload"])
def test_sums_of_micro_batches_are_the_same_wherever_they_lie(preset: str, tmp_path: Path) -> None:
    found = {}
    for how in ("kept", "as-it-comes"):
        env = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = torchrun(SCRIPT, nproc=2, args=[preset, str(tmp_path), how], timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        found[how] = [json.loads((tmp_path / f"{preset}-{how}-{rank}.json").read_text()) for rank in (0, 1)]
    for kept, usual in zip(*found.values(), strict=True):
        assert kept["used"]
        assert usual["used"]
        assert "cross to the host once a step" in kept["said"][0]
        assert len(kept["losses"]) == 4
        assert kept["losses"] == usual["losses"]
        assert kept["norms"] == usual["norms"]
