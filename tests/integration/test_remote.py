"""A vLLM server that somebody else runs answers while training goes on, gets the weights, and runs on afterwards."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import httpx
import pytest

from hf_dsvllm.engine.spec import EngineSpec, command, environment
from tests.conftest import ROOT
from tests.scripts.launch import Launched, launch
from tests.tiny import write_tiny_model
from tests.waiting import wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "a key of the test"
READY_S = 300


def serve(folder: Path, model: Path, port: int) -> Launched:
    """vLLM on the CPU at a TCP port with a key, as its owner would start it for others to feed."""
    spec = EngineSpec(
        model=model,
        python=Path(sys.executable),
        device="cpu",
        dtype="float32",
        max_model_len=256,
        max_lora_rank=8,
        kv_cache_bytes=2**30,
        cpu_threads=1,
        extra_args=("--host", "127.0.0.1", "--port", str(port)),
    )
    line = command(spec, folder / "unused.sock")
    at = line.index("--uds")
    line = [*line[:at], *line[at + 2 :]]
    given = environment(spec, os.environ) | {"VLLM_API_KEY": KEY}
    (folder / "served").mkdir()
    changed = [f"{name}={value}" for name, value in given.items() if os.environ.get(name) != value]
    return launch(folder / "served", ["env", *changed, *line])


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def test_somebody_elses_server_is_fed_and_asked_while_training_goes_on(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Untied: on CPUs only our own servers know how to pack a tied output head again.
    model = write_tiny_model(tmp_path / "model", tied=False)
    turns = [[("user", f"count from {n}"), ("assistant", f"{n + 1} {n + 2}")] for n in range(16)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "run"
    server = serve(tmp_path, model, free_port)
    try:
        wait_for(lambda: answers(free_port), server.ended, timeout_s=READY_S)
        monkeypatch.setenv("HF_DSVLLM_API_KEY", KEY)
        asked = ["--gen_eval_file", str(data), "--gen_eval_limit", "6", "--gen_eval_steps", "2"]
        asked += ["--gen_eval_max_new_tokens", "8", "--gen_eval_server", f"http://127.0.0.1:{free_port}"]
        short = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]
        short += ["--save_strategy", "no", "--report_to", "none", "--use_cpu", "true", "--export_to", "none"]
        named = ["--ds_preset", "none", "--model_name_or_path", str(model), "--train_file", str(data)]
        line = [sys.executable, str(ROOT / "recipes" / "sft.py"), *named, "--output_dir", str(out), *short, *asked]
        run = launch(tmp_path, line)
        assert run.wait(READY_S) == 0, run.output()[-6000:]
        assert run.left() == []
        scores = [json.loads(line) for line in (out / "evals" / "scores.jsonl").read_text().splitlines()]
        assert [(row["step"], row["weights_path"]) for row in scores] == [(0, "start"), (2, "reload"), (4, "reload")]
        assert all(row["proof"].startswith("weights proven") for row in scores), [row["proof"] for row in scores]
        assert "while training goes on" in run.output()
        assert not (out / "engine").exists(), "a server of our own was started"
        assert answers(free_port), "the server is not ours to stop"
        assert KEY not in "".join(file.read_text(errors="replace") for file in out.rglob("*.json*"))
    finally:
        server.kill()
