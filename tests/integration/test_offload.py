"""Gradients that are added up where the GPU is, and copies that overlap, train like those that DeepSpeed makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, torchrun

SCRIPT = ROOT / "tests" / "scripts" / "summed.py"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["zero2_offload", "zero3_offload_optimizer", "zero3_offload"])
def test_offloaded_gradients_and_weights_are_the_same_whichever_way_they_go(preset: str, tmp_path: Path) -> None:
    found = {}
    for how in ("as-it-comes", "kept", "overlapped", "both"):
        env = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = torchrun(SCRIPT, nproc=2, args=[preset, str(tmp_path), how], timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        found[how] = [json.loads((tmp_path / f"{preset}-{how}-{rank}.json").read_text()) for rank in (0, 1)]
    usual = found.pop("as-it-comes")
    for how, ranks in found.items():
        for changed, before in zip(ranks, usual, strict=True):
            assert changed["used"]
            assert before["used"]
            assert changed["overlaps"] == changed["clipped"] == (how != "kept")
            assert len(changed["losses"]) == 4
            for name in ("losses", "norms", "weights"):
                assert changed[name] == before[name], (how, name)
            said = " ".join(changed["said"])
            assert ("cross to the host once a step" in said) == (how != "overlapped")
            assert ("while Adam works on the next" in said) == (how != "kept")
