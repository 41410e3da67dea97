"""Every fault of tests/scripts/fault_cases.py: what was promised comes of it, and nothing is left behind.

A real Trainer, the real session and supervisor, and a fake vLLM that dies like the real one; one process imports the
libraries once and forks a trainer for each fault.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm.engine import EngineClient
from hf_dsvllm.errors import EngineError
from tests.scripts.fault_cases import FAULTS, STEPS, Fault
from tests.scripts.launch import launch
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "scripts" / "faults.py"
FAKE = SCRIPT.with_name("killable_vllm.py")
LIMIT_S = 900.0


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What came of the faults that were selected."""
    names = {item.callspec.params["fault"].name for item in request.session.items
             if item.path == Path(__file__) and hasattr(item, "callspec")}  # fmt: skip
    folder = tmp_path_factory.mktemp("faults")
    spec = {"model": str(write_tiny_model(folder / "model")), "out": str(folder), "faults": sorted(names)}
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    process = launch(folder, [sys.executable, "-m", "tests.scripts.faults", str(folder / "spec.json")])
    try:
        assert process.wait(LIMIT_S) == 0, process.output()[-6000:]
        assert not process.left()
    finally:
        process.kill()
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_promised_comes_of_it_and_nothing_is_left(fault: Fault, results: Mapping[str, Any]) -> None:
    found = results[fault.name]
    said = found["output"]
    assert "harness" not in found, f"{found['harness']}\n{said[-6000:]}"
    assert found["ended"] == (0 if fault.ended == "trained" else fault.ended), said[-6000:]
    assert found["trained"] == (fault.ended == "trained")
    assert tuple(found["scored"]) == fault.scored, said[-6000:]
    for step in fault.scored:
        assert found["answers"][str(step)] == found["expected"][str(step)], f"step {step}: answers of other weights"
    for pattern in fault.says:
        assert re.search(pattern, said), f"{pattern!r} was not said:\n{said[-6000:]}"
    assert found["left"] == []


def test_there_are_more_than_twenty_faults_of_different_kinds() -> None:
    assert len(FAULTS) == len({fault.name for fault in FAULTS}) == len({fault.fault for fault in FAULTS}) >= 20
    assert all(max(fault.scored, default=0) <= STEPS for fault in FAULTS)


def test_a_server_that_goes_away_and_comes_back_answers_again(tmp_path: Path) -> None:
    model, control = write_tiny_model(tmp_path / "model"), tmp_path / "control"
    control.mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        client = EngineClient(Path(short, "s"), default_timeout_s=10.0)
        for life in range(2):
            with pytest.raises(EngineError, match="failed"):
                client.loaded_models()
            line = [sys.executable, "-I", "-S", str(FAKE), "--model", str(model), "--uds", f"{short}/s"]
            server = subprocess.Popen(line, env=os.environ | {"HF_DSVLLM_FAKE": str(control)}, start_new_session=True)
            try:
                for _ in range(1000):
                    if client.health():
                        break
                    time.sleep(0.01)
                assert client.loaded_models() == ("base",), f"life {life}"
            finally:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            Path(short, "s").unlink()
        client.close()
