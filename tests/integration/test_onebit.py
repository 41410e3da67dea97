"""The 1-bit optimizers in the last DeepSpeed that has them, on two gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dsvllm.presets.catalogue import LAST_DEEPSPEED_WITH_ONEBIT
from tests.conftest import ROOT, torchrun
from tests.integration.test_wheel import find_uv, torch_options

SCRIPT = ROOT / "tests" / "scripts" / "onebit.py"


@pytest.fixture(scope="module")
def older_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed's source, which builds nothing, in a folder of its own."""
    folder = tmp_path_factory.mktemp("deepspeed")
    wanted = f"deepspeed=={LAST_DEEPSPEED_WITH_ONEBIT}"
    line = [find_uv(), "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    line += ["--python", sys.executable, "--target", str(folder), *torch_options(), wanted]
    done = subprocess.run(line, env=os.environ | {"DS_BUILD_OPS": "0"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def train(preset: str, key: str, folder: Path, deepspeed: Path, bounded: str = "bounded") -> list[dict[str, object]]:
    """Both processes' losses, largest weight and sum of weights."""
    env = {"PYTHONPATH": f"{deepspeed}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env |= {"TORCH_EXTENSIONS_DIR": str(deepspeed / "extensions")}  # ops of two versions have the same names
    done = torchrun(SCRIPT, nproc=2, args=[preset, key, str(folder), bounded], timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "starting compressed communication" in done.stdout or preset == "zero_one_adam", done.stdout[-2000:]
    return [json.loads((folder / f"{preset}-{bounded}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("preset", "key", "most", "learnt"),
    [
        ("onebit_adam", "freeze_step", 2.0, 1.0),
        ("zero_one_adam", "var_freeze_step", 2.0, 1.0),
        ("onebit_lamb", "freeze_step", 1.5, 4.7),  # slow at this learning rate
    ],
)
def test_the_presets_train_on_two_processes(
    preset: str, key: str, most: float, learnt: float, tmp_path: Path, older_deepspeed: Path
) -> None:
    first, second = train(preset, key, tmp_path, older_deepspeed)
    assert first["sum"] == pytest.approx(second["sum"], rel=1e-9 if preset != "zero_one_adam" else 1e-4)
    losses = first["loss"]
    assert isinstance(losses, list)
    assert losses[0] > 4.7
    assert sum(losses[-5:]) / 5 < learnt
    assert first["largest"] < most


@pytest.mark.slow
@pytest.mark.distributed
def test_without_the_bound_weights_grow_without_measure(tmp_path: Path, older_deepspeed: Path) -> None:
    """If this fails, DeepSpeed bounds them itself and `onebit.bound_variance` can go."""
    first, _ = train("onebit_adam", "freeze_step", tmp_path, older_deepspeed, "as-it-comes")
    assert first["largest"] > 100
