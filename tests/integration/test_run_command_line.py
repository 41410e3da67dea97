"""`hf-dsvllm run` as typed: evaluation by vLLM under ZeRO-3, other launchers, exit codes, signals, a pasted dry run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.scripts.any.cases import HERE, SHORT, write_place
from tests.scripts.launch import launch
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
RUN = (sys.executable, "-m", "hf_dsvllm", "run")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("command"))


def finished(folder: Path, command: Sequence[str], *, timeout_s: float = 240) -> tuple[int, str]:
    """Exit code and output of a command that leaves no process behind."""
    run = launch(folder, command)
    try:
        code = run.wait(timeout_s)
        assert run.left() == []
        return code, run.output()
    finally:
        run.kill()


def clm(place: Path, out: Path, *more: str) -> list[str]:
    named = ["--model_name_or_path", str(place / "model"), "--train_file", str(place / "texts.jsonl")]
    return [str(HERE / "clm.py"), *named, "--output_dir", str(out), *SHORT, *more]


@pytest.mark.vllm
def test_trl_sft_under_zero3_is_evaluated_by_vllm_and_exported(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = ["--model_name_or_path", str(place / "model"), "--dataset_name", str(place / "sft"), "--max_length", "64"]
    ours = ["--ds_preset", "zero3", "--gen_eval_file", str(place / "questions.jsonl"), "--gen_eval_max_new_tokens", "8"]
    command = [*RUN, "--num_processes", "2", "trl", "sft", *script, *SHORT, "--output_dir", str(out), *ours]
    code, log = finished(tmp_path, command)
    assert code == 0, log[-6000:]
    assert "running: DeepSpeedEngine, ZeRO stage 3, 2 processes" in log
    assert "vLLM answers questions" in log
    scores = [json.loads(line) for line in (out / "evals" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in scores] == [0, 2], log[-6000:]
    report = json.loads((out / "export" / "export_report.json").read_text(encoding="utf-8"))
    assert report["verification"] is not None, report
    assert (out / "model.safetensors").is_file()


def test_accelerate_launch_starts_a_rank_by_itself(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    accelerate = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    quiet = ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    script = [str(HERE / "own_loss.py"), str(place / "model"), str(out), "--ds_preset", "lora", "--export_to", "none"]
    code, log = finished(tmp_path, [sys.executable, "-m", *accelerate, *quiet, "-m", "hf_dsvllm.run", *script])
    assert code == 0, log[-6000:]
    assert "adapters in 14 layers" in log
    assert (out / "adapter_model.safetensors").is_file()


def test_the_exit_code_of_a_script_comes_through_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "end.py").write_text("import sys\nsys.exit(5)\n", encoding="utf-8")
    command = [*RUN, "--num_processes", "2", str(tmp_path / "end.py"), "--ds_preset", "zero2"]
    assert finished(tmp_path, command)[0] == 5


def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path) -> None:
    command = [*RUN, str(tmp_path / "none.py"), "--ds_preset", "zero3"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "does not exist" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_dry_run_can_be_pasted_and_trains_without_us(place: Path, tmp_path: Path) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    command = [*RUN, "--dry_run", *clm(place, tmp_path / "out", *saving, "--ds_preset", "zero2")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (tmp_path / "pasted.sh").write_text(text, encoding="utf-8")
    (tmp_path / "hf_dsvllm").mkdir()
    (tmp_path / "hf_dsvllm" / "__init__.py").write_text("raise ImportError('not without us')", encoding="utf-8")
    paths = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
    pasted = subprocess.run(
        ["bash", "pasted.sh"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths},
    )  # fmt: skip
    assert pasted.returncode == 0, pasted.stderr[-6000:]
    assert pasted.stdout.count("{'loss'") == 2
    assert list((tmp_path / "out" / "checkpoint-2").glob("global_step2/*optim_states.pt")), "DeepSpeed did not train"


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("number", "expected", "processes"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1), (signal.SIGKILL, -9, 1)]
)
def test_a_signal_leaves_no_rank_and_no_engine(
    number: int, expected: int, processes: int, place: Path, tmp_path: Path
) -> None:
    ours = ["--ds_preset", "lora", "--max_steps", "100000", "--gen_eval_file", str(place / "questions.jsonl")]
    ours += ["--no_gen_eval_on_start"]
    run = launch(tmp_path, [*RUN, "--num_processes", str(processes), *clm(place, tmp_path / "out", *ours)])
    try:
        wait_for(lambda: "'loss'" in run.output(), run.ended, timeout_s=200)
        assert any("supervisor" in " ".join(process.cmdline()) for process in run.left()), "no engine was started"
        run.process.send_signal(number)
        assert run.wait(120) == expected, run.output()[-6000:]
        wait_for(lambda: run.left() == [], timeout_s=60)
    finally:
        run.kill()
