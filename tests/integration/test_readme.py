"""The Python example of the README, as it stands there: it trains, is evaluated by vLLM, and leaves a proven export."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dsvllm.engine import list_engines
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.vllm]
TIMEOUT_S = 500


def python_example() -> str:
    found = re.search(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    return found[1]


def test_the_readmes_script_trains_evaluates_and_exports(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "my-model")
    rows = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(16)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    (tmp_path / "example.py").write_text(python_example(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = tmp_path / "runs" / "sft"
    scores = [json.loads(line) for line in (run / "evals" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in scores] == [0, 100]
    assert [row["weights_path"] for row in scores] == ["start", "merge + reload"]
    report = json.loads((run / "export" / "export_report.json").read_text(encoding="utf-8"))
    assert report["kind"] == "adapter"
    assert report["verification"] is not None
    assert [record for record in list_engines() if record.state != "elsewhere"] == []
