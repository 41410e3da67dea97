"""Evaluation by generation on real shapes: what it costs training, how fast it answers, how long vLLM takes to start.

    python benchmarks/evaluation.py one --out runs/evaluation --budget_s 540      # jobs of one GPU, on all there are
    python benchmarks/evaluation.py four --out runs/evaluation --budget_s 540     # 2 to 4 GPUs a job, several calls
    python benchmarks/evaluation.py learn --out runs/evaluation --model FOLDER    # one GPU, a real model that learns
    python benchmarks/evaluation.py one four --out runs/evaluation --list
    python benchmarks/evaluation.py one --out runs/evaluation --device cpu --only full hf     # tries it, tiny shape

Training is recipes/sft.py with a stopwatch (watched.py), one process tree a job; answers are ways of generation.py.
Jobs start in order as GPUs become free.  OUT/evaluation.json and .md are written after each; one that is there as ok is
not run again, one that failed only with --again; a job for which no time was left is tried in the next call.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cells import HERE, last_error, read_json
from evaluation_jobs import SETS, Job, command, jobs_of, read_job, status_of, steps_of
from evaluation_table import page
from main_job import end_group, environment, keep_records, versions
from standin import SHAPES, write_jsonl, write_random_data

from hf_dsvllm.hardware import detect

GRACE_S, WRITE_S = 20.0, 200.0
LENGTH, MICRO_BATCH = 2048, 4
EVERY = 8  # steps between two evaluations, and after three of them the run ends
CACHES = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


# -- running -----------------------------------------------------------------------------------------------------------


class Bench:
    """Starts jobs on free GPUs, in order, and keeps the pages up to date."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.budget_s
        self.path: Path = options.out / "evaluation.json"
        earlier = read_json(self.path)
        self.rows: dict[str, Any] = earlier.get("rows", {})
        machine = detect()
        many = options.gpus or len(machine.gpus) or 1
        on_gpus = options.device == "cuda"
        self.free = [str(gpu.index) for gpu in machine.gpus][:many] if on_gpus else [f"cpu{n}" for n in range(many)]
        self.cpus = sorted(os.sched_getaffinity(0))
        self.gpu_gib = min((gpu.memory_bytes for gpu in machine.gpus), default=0) / 2**30
        self.of_each = max(1, len(self.cpus) // max(1, len(self.free)))
        self.lane = {gpu: place for place, gpu in enumerate(self.free)}
        call = {
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            "command": shlex.join(["python", "benchmarks/evaluation.py", *sys.argv[1:]]),
            "hardware": machine.describe(),
            "gpus": len(self.free),
            "versions": versions(),
        }
        self.calls = [*earlier.get("calls", []), call]
        self.running: list[tuple[Job, list[str], subprocess.Popen[bytes], float, float, str]] = []

    def run(self, jobs: Sequence[Job]) -> None:
        again = ("stopped", "exit") if self.options.again else ()
        done = {name for name, row in self.rows.items() if not row["status"].startswith(("not run", *again))}
        # A second start needs what the first has left on this host, which may be another than that of the call before.
        done -= {job.after for job in jobs if job.name not in done and not self.cache_of(job).exists()}
        waiting: list[Job] = []
        for job in jobs:
            if job.name in done:
                continue
            writes = Job(name=f"write-{job.shape}", kind="write", gpus=1, shape=job.shape, limit_s=WRITE_S, needs_s=60)
            runs = self.too_small(job) is None
            if job.shape and runs and writes not in waiting and not self.model_of(job).exists():
                waiting.append(writes)
            waiting.append(job)
        for shape in {job.shape for job in waiting if job.shape}:
            self.write_data(shape, max(steps_of(job, self.options) for job in waiting if job.shape == shape))
        while waiting or self.running:
            for job in self.candidates(waiting):
                if (how := self.may_start(job)) != "wait":
                    waiting.remove(job)
                    self.start(job, how)
                    break
            else:
                self.reap()
                time.sleep(0.2)

    def candidates(self, waiting: list[Job]) -> list[Job]:
        """The next one alone, for a later and smaller one would keep its GPUs; beside the long one any that fits."""
        return list(waiting) if "learn" in {job.name for job, *_ in self.running} else waiting[:1]

    def model_of(self, job: Job) -> Path:
        folder: Path = self.options.fast / f"model-{job.shape}"
        return folder / "config.json"

    def cache_of(self, job: Job) -> Path:
        """The folder of its compiled code."""
        folder: Path = self.options.work / "caches" / job.cache
        return folder

    def too_small(self, job: Job) -> str | None:
        """Why a job cannot run on this host, or None."""
        if job.gpus > len(self.lane):
            return f"it needs {job.gpus} GPUs"
        if self.options.device == "cuda" and job.gpu_gib > self.gpu_gib:
            return f"it needs a GPU of {job.gpu_gib:.0f} GiB"
        return None

    def left(self) -> float:
        return self.deadline - time.monotonic() - GRACE_S

    def may_start(self, job: Job) -> str:
        """ "start", "wait", or why it will not be run."""
        if (why := self.too_small(job)) is not None:
            return f"not run, {why}"
        if job.kind == "learn" and self.options.model is None:
            return "not run, --model is missing"
        if self.left() < job.needs_s:
            return f"not run, it needs {job.needs_s:.0f} s and {max(0.0, self.left()):.0f} s were left"
        busy = {running.name for running, *_ in self.running}
        if len(self.free) < job.gpus or busy & {job.after, f"write-{job.shape}"}:
            return "wait"
        if job.kind in ("train", "ask") and not self.model_of(job).exists():
            return "not run, its model was not written"
        if job.after and not self.cache_of(job).exists():
            return f"not run, {job.after} has left no compiled code here"
        return "start"

    def start(self, job: Job, how: str) -> None:
        if how != "start":
            self.keep(job, {"status": how})
            return
        gpus, self.free = self.free[: job.gpus], self.free[job.gpus :]
        run = self.options.fast / "runs" / job.name
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        line = command(job, self.options, run)
        if job.kind == "write":
            line += ["--out", str(run / "model")]
        process = self.popen(line, gpus, job.cache, job.name, cold=job.cold)
        limit = min(job.limit_s, self.left())
        self.running.append((job, gpus, process, time.monotonic(), limit, shlex.join(line)))

    def popen(self, line: list[str], gpus: list[str], cache: str, log: str, *, cold: bool) -> subprocess.Popen[bytes]:
        folder = self.options.work / "caches" / cache
        if cold:
            shutil.rmtree(folder, ignore_errors=True)
        mine = [cpu for gpu in gpus for cpu in self.cpus[self.lane.get(gpu, 0) * self.of_each :][: self.of_each]]
        env = environment(self.options)
        if self.options.device == "cuda" or cache != "shared":  # tried on CPUs, it starts faster with what is there
            env |= {name: str(folder / name.lower()) for name in CACHES}
        env["OMP_NUM_THREADS"] = str(max(1, self.of_each))
        if self.options.device == "cuda":
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        logs = self.options.work / "logs" / log
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "log.txt").open("wb") as output:
            return subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, mine),
            )  # fmt: skip

    def reap(self) -> None:
        for entry in list(self.running):
            job, gpus, process, started, limit, line = entry
            seconds = time.monotonic() - started
            if process.poll() is None and seconds < limit:
                continue
            failure = None if process.poll() == 0 else f"exit code {process.poll()}"
            if process.poll() is None:
                end_group(process)
                cut = "not run to its end: the call was, " if limit < job.limit_s else ""  # the next call tries it
                failure = f"{cut}stopped after {limit:.0f} s"
                self.wait_free(gpus)
            self.running.remove(entry)
            self.free = sorted([*self.free, *gpus])
            self.finish(job, failure, seconds, line)

    def wait_free(self, gpus: Sequence[str]) -> None:
        """Until nothing is left on the GPUs of a job that was ended: its vLLM goes some seconds after it."""
        if self.options.device != "cuda":
            return
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(int(gpu)) for gpu in gpus]
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and any(map(pynvml.nvmlDeviceGetComputeRunningProcesses, handles)):
            time.sleep(0.2)

    def finish(self, job: Job, failure: str | None, seconds: float, line: str) -> None:
        run, logs = self.options.fast / "runs" / job.name, self.options.work / "logs" / job.name
        log = (logs / "log.txt").read_text(encoding="utf-8", errors="replace")
        if job.kind == "write":
            if failure is None:
                (run / "model").rename(self.model_of(job).parent)
            else:
                print(f"{job.name}: {failure}: {last_error(log)}", flush=True)
            return
        row = read_job(job, run)
        if job.kind == "learn":
            keep_learnt(run, self.options.out / "learn")
        keep_records(run, logs)
        head = {
            "status": status_of(job, row, failure, log),
            "kind": job.kind,
            "way": job.way,
            "gpus": job.gpus,
            "trainers": job.trainers,
        }
        more = {"shape": job.shape, "like": job.like, "seconds": round(seconds, 1), "line": self.public(line)}
        self.keep(job, row | head | more)

    def public(self, text: str) -> str:
        """`text` without the folders of this machine."""
        folders = {str(self.options.fast): "FAST", str(self.options.work): "WORK", f"{HERE.parent}/": ""}
        names = folders | {sys.executable: "python"}
        if self.options.model:
            names = {str(self.options.model): "MODEL"} | names
        for folder, word in names.items():
            text = text.replace(folder, word)
        return text

    def keep(self, job: Job, row: dict[str, Any]) -> None:
        """Write everything; a job that was not run keeps the row of an earlier call."""
        if not (row["status"].startswith("not run") and job.name in self.rows):
            self.rows[job.name] = row | {"status": self.public(row["status"])}
        print(f"{job.name}: {row['status']} ({row.get('seconds', 0):.0f} s)", flush=True)
        content = {"calls": self.calls, "rows": self.rows}
        self.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(page(content), encoding="utf-8")
        if self.options.copy_to:
            for file in self.options.out.glob("*.*"):
                shutil.copy(file, self.options.copy_to / file.name)

    def write_data(self, shape: str, steps: int) -> None:
        options = self.options
        samples = 4 * steps * options.micro_batch_size
        folder = options.work / f"data-{shape}"
        sizes = {"samples": samples, "length": options.length, "prompts": options.prompts}
        _, prompts = write_random_data(SHAPES[shape], folder, **sizes)
        write_jsonl(folder / "first.jsonl", [json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])])
        (folder / "first.task.json").write_text('{"max_new_tokens": 1}\n', encoding="utf-8")


def keep_learnt(run: Path, kept: Path) -> None:
    """The report page, every answer and what the page was made of; beside the folder an archive of it."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for file in [*run.glob("*.html"), *run.glob("*.json"), *run.glob("checkpoint-*/trainer_state.json")]:
        shutil.copy(file, kept / file.name)
    if (run / "evals").is_dir():
        shutil.copytree(run / "evals", kept / "evals")
    shutil.make_archive(str(kept), "gztar", kept)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers: tuple[tuple[str, Callable[[str], Any], Any], ...] = (
        ("budget_s", float, 540.0), ("gpus", int, 0), ("evaluations", int, 3), ("every", int, EVERY),
        ("micro_batch_size", int, MICRO_BATCH), ("length", int, LENGTH), ("prompts", int, 128), ("new_tokens", int, 64),
        ("samples", int, 8000),
    )  # fmt: skip
    parser.add_argument("sets", nargs="+", choices=SETS)
    for name, kind, default in numbers:
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--only", nargs="*", default=[], help="names of jobs")
    parser.add_argument("--again", action="store_true", help="also those that failed or took too long")
    parser.add_argument("--list", action="store_true", help="print the jobs and end")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="logs, data, compiled code; default OUT/../evaluation-work")
    parser.add_argument("--fast", type=Path, help="models and runs, in memory; default WORK")
    parser.add_argument("--copy_to", type=Path, help="a folder that gets all of OUT after every job")
    parser.add_argument("--model", type=Path, help="for learn: a model folder")
    parser.add_argument("--preset", default="zero2", help="for learn")
    parser.add_argument("--vllm_args", default="", help="more arguments for vLLM, as one string")
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.work = (options.work or options.out.parent / f"{options.out.name}-work").absolute()
    options.fast = (options.fast or options.work).absolute()
    return options


def main() -> None:
    options = parse()
    jobs = jobs_of(options)
    if unknown := set(options.only) - {job.name for job in jobs}:
        raise SystemExit(f"no jobs of these sets: {', '.join(sorted(unknown))}; --list names all")
    if options.list:
        for job in jobs:
            print(f"{job.name:20} {job.gpus} GPU  {job.shape or '·':5} {job.kind:5} {shlex.join(job.flags)}")
        return
    for folder in (options.out, options.work, options.fast):
        folder.mkdir(parents=True, exist_ok=True)
    Bench(options).run(jobs)


if __name__ == "__main__":
    main()
