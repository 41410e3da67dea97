"""Master weights in bf16 learn what fp32 ones learn, at a learning rate whose updates bf16 alone rounds away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, torchrun

SCRIPT = ROOT / "tests" / "scripts" / "lowmem.py"


def trained(preset: str, how: str, out: Path) -> list[dict[str, Any]]:
    env = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = torchrun(SCRIPT, nproc=2, args=[preset, str(out), how], timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{preset}-{how}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.distributed
def test_master_weights_in_bf16_learn_what_fp32_ones_do(tmp_path: Path) -> None:
    (wide, _), (usual, _) = (trained(preset, "as-it-comes", tmp_path) for preset in ("zero2", "zero2_lowmem"))
    rounded = trained("zero2_lowmem", "rounded", tmp_path)
    assert [each["rounds"] for each in (wide, usual, *rounded)] == [False, False, True, True]
    assert rounded[0]["masters"] == "torch.bfloat16"
    assert "small updates are not lost" in rounded[0]["said"][0]
    learnt, by_rounding, expected = (each["losses"][0] - each["losses"][-1] for each in (rounded[0], usual, wide))
    assert expected > 0.5
    assert learnt == pytest.approx(expected, rel=0.02)
    assert by_rounding < 0.5 * expected, "rounded to the nearest, as DeepSpeed has it"
