"""Measure memory and speed of the cells of `matrix.py` on the GPUs of one host, as many at a time as there is room for.

    python benchmarks/planner/measure.py --out FOLDER --gpus 4 --budget_s 560 --device cuda

One lane per GPU imports the libraries once and forks a process for each cell (`worker.py`); a cell of k GPUs takes k
lanes.  Results are written after every cell to FOLDER/cells.json and FOLDER/rates.json; cells that are there already
are not run again, so a measurement that was cut off goes on where it stopped.  --device cpu tries it on tiny shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gauges import refuse_small_gpus
from matrix import Cell, cells, dry_cells
from options import options_parser, parse
from rows import copy_results, host_record, read, shared, tail, verdict

HERE = Path(__file__).resolve().parent
GRACE_S = 4.0  # from the first rank that runs out of memory to the end of those that wait for it


@dataclasses.dataclass(slots=True)
class Lane:
    """One worker process and its GPU."""

    index: int
    process: subprocess.Popen[str]
    ready: bool = False
    pid: int | None = None
    job: Job | None = None


@dataclasses.dataclass(slots=True)
class Job:
    """A task on one or more lanes."""

    name: str
    kind: str
    lanes: list[Lane]
    began: float
    limit_s: float
    files: list[Path]
    cell: Cell | None = None
    codes: dict[int, int] = dataclasses.field(default_factory=dict)
    killed: str | None = None


def gpu_of(lane: Lane) -> str:
    """The lane's GPU as CUDA names it, among those that this process may see."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = seen.split(",") if seen else []
    return names[lane.index] if lane.index < len(names) else str(lane.index)


class Measurement:
    script = HERE / "worker.py"

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device: str = options.device
        self.began = time.monotonic()
        self.out: Path = options.out
        self.work = self.out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = read(self.out / "cells.json")
        self.rates: dict[str, Any] = read(self.out / "rates.json")
        self.lanes: list[Lane] = []
        self.jobs: list[Job] = []
        self.selector = selectors.DefaultSelector()
        self.builder: subprocess.Popen[bytes] | None = None
        self.adam_tried = False

    # -- life

    def run(self) -> None:
        self.builder = self.build_cpu_adam()
        growers = self.grow_memory()
        self.start_lanes("all")
        self.await_ready()
        if not self.forks_work():
            print("a fork of a lane cannot use its GPU: every cell imports for itself", flush=True)
            self.stop_lanes()
            self.start_lanes("none")
            self.await_ready()
        self.calibrate()
        self.work_off(self.pending())
        self.stop_lanes()
        for process in growers:
            process.terminate()
        self.save()
        print(f"{len(self.results)} cells in {self.elapsed():.0f} s", flush=True)

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.options.budget_s - self.elapsed()

    def pending(self) -> list[Cell]:
        every = dry_cells() if self.device == "cpu" else cells()
        if self.options.only:
            every = tuple(cell for cell in every if any(word in cell.name for word in self.options.only))
        done = {
            name for name, row in self.results.items() if row["status"] in ("ok", "oom") and not shared(row["ranks"])
        }
        return [cell for cell in every if cell.name not in done and cell.world <= self.options.gpus]

    # -- helpers of the host

    def environment(self, **more: str) -> dict[str, str]:
        root = str(HERE.parent.parent)
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(self.out.absolute() / "extensions"))
        return {
            **os.environ,
            "PYTHONPATH": paths,
            "TORCH_EXTENSIONS_DIR": extensions,
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.options.threads),
            "DS_ACCELERATOR": self.device,
            **more,
        }

    def build_cpu_adam(self) -> subprocess.Popen[bytes]:
        code = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
        log = (self.work / "cpu_adam.log").open("wb")
        return subprocess.Popen([sys.executable, "-c", code], env=self.environment(), stdout=log, stderr=log)

    def grow_memory(self) -> list[subprocess.Popen[bytes]]:
        """Touch memory in the background: some virtual machines hand it out slowly; offloading would wait for it."""
        if not self.options.grow_gib:
            return []
        code = "import numpy, sys, time; numpy.empty(int(sys.argv[1]) << 30, numpy.uint8)[::4096] = 1"
        share = str(-(-self.options.grow_gib // 4))
        return [subprocess.Popen([sys.executable, "-c", code, share], env=self.environment()) for _ in range(4)]

    def start_lanes(self, preload: str) -> None:
        for index in range(self.options.gpus):
            log = (self.work / f"lane{index}.log").open("ab")
            process = subprocess.Popen(
                [sys.executable, str(self.script), "--preload", preload],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=self.environment(),
            )
            lane = Lane(index=index, process=process)
            self.lanes.append(lane)
            self.selector.register(process.stdout, selectors.EVENT_READ, lane)

    def stop_lanes(self) -> None:
        for job in list(self.jobs):
            self.kill(job, "the end of the measurement")
        for lane in self.lanes:
            self.selector.unregister(lane.process.stdout)
            lane.process.kill()
            lane.process.wait()
        self.lanes.clear()
        self.jobs.clear()

    def await_ready(self) -> None:
        while not all(lane.ready for lane in self.lanes):
            dead = [lane.index for lane in self.lanes if lane.process.poll() is not None]
            if dead:
                raise SystemExit(f"lane {dead[0]} ended while importing: see {self.work}/lane{dead[0]}.log")
            if self.left() < 0:
                raise SystemExit("the budget ended while the lanes were importing")
            self.poll(0.5)
        print(f"{self.elapsed():6.1f} s: {len(self.lanes)} lanes ready", flush=True)

    def forks_work(self) -> bool:
        # one after the other would cost a CUDA start each
        jobs = [self.start(f"probe{lane.index}", "probe", [lane], 60.0) for lane in self.lanes]
        self.finish(jobs)
        return all(not job.killed and set(job.codes.values()) == {0} for job in jobs)

    def calibrate(self) -> None:
        """Rates of one GPU, of 2 and of 4; once per folder."""
        count = len(self.lanes)
        self.rates.setdefault("host", host_record(self.options.gpus, self.options.threads))
        if self.options.note:
            self.rates["notes"] = [*self.rates.get("notes", ()), self.options.note]
        if "failed" in self.rates.get("one", {"failed": ""}):
            jobs = [self.start("one", "calibrate", self.lanes[:1], 120.0)]
            if count >= 4 and "collectives_2" not in self.rates:
                jobs.append(self.start("collectives_2", "collectives", self.lanes[2:4], 60.0))
            self.finish(jobs)
        for world in (2, 4, 8):
            if world <= count and "failed" in self.rates.get(f"collectives_{world}", {"failed": ""}):
                self.finish([self.start(f"collectives_{world}", "collectives", self.lanes[:world], 60.0)])
        self.save()
        print(f"{self.elapsed():6.1f} s: rates measured", flush=True)

    # -- jobs

    def work_off(self, waiting: list[Cell]) -> None:
        """Start the first cell that finds room; one of several GPUs holds back those behind it until it has room."""
        while waiting or self.jobs:
            cell = self.next_cell(waiting)
            free = self.free_lanes()
            if free and self.adam_is_due():
                self.start("adam", "adam", free[:1], 60.0)
                continue
            if cell is not None and len(free) >= cell.world and self.left() > self.options.least_s:
                waiting.remove(cell)
                self.start(cell.name, "cell", choose(free, cell.world), self.options.cell_s, cell)
                continue
            if not self.jobs:
                break
            self.poll(0.2)
            if self.left() < 0:
                break

    def adam_is_due(self) -> bool:
        """Whether CPUAdam is built and its rate not known; nothing that offloads runs beside its measurement."""
        built = self.builder is not None and self.builder.poll() == 0
        known = self.device == "cpu" or self.rates.get("one", {}).get("adam_parameters_per_s") or self.adam_tried
        busy = any(job.cell is not None and job.cell.offloads for job in self.jobs)
        due = built and not known and not busy
        self.adam_tried |= due
        return due

    def next_cell(self, waiting: list[Cell]) -> Cell | None:
        """The first that may start: offload waits until CPUAdam is built, and then for other cells that offload."""
        building = self.builder is not None and self.builder.poll() is None
        offloading = any(job.kind == "adam" or (job.cell is not None and job.cell.offloads) for job in self.jobs)
        for cell in waiting:
            if cell.offloads and (building or offloading):
                continue
            return cell
        return None

    def free_lanes(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.job is None]

    def start(self, name: str, kind: str, lanes: list[Lane], limit_s: float, cell: Cell | None = None) -> Job:
        port = free_port()
        files = [self.work / f"{name}.{rank}.json" for rank in range(len(lanes))]
        limit_s = min(limit_s, max(self.left() - 2, 5.0))
        job = Job(
            name=name, kind=kind, lanes=list(lanes), began=time.monotonic(), limit_s=limit_s, files=files, cell=cell
        )
        several = len(lanes) > 1
        for rank, lane in enumerate(lanes):
            files[rank].unlink(missing_ok=True)
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpu_of(other) for other in lanes)}
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(lanes))}
            ranks |= {"LOCAL_WORLD_SIZE": str(len(lanes)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            task = {
                "task": kind,
                "device": self.device,
                "env": (visible if self.device == "cuda" else {}) | (ranks if several else {}),
                "log": str(self.work / f"{name}.{rank}.log"),
                "result": str(files[rank]),
                "cell": dataclasses.asdict(cell) if cell else None,
                "steps": self.options.steps,
                "stop_after_s": limit_s * 0.75,
                "work": str(self.work),
            }
            lane.job = job
            lane.process.stdin.write(json.dumps(task) + "\n")
            lane.process.stdin.flush()
        self.jobs.append(job)
        return job

    def finish(self, jobs: list[Job]) -> None:
        while any(job in self.jobs for job in jobs):
            self.poll(0.2)

    def poll(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            line = key.fileobj.readline()
            if line:
                self.heard(key.data, json.loads(line))
            elif key.data.job is not None or not key.data.ready:
                raise SystemExit(f"lane {key.data.index} ended: see {self.work}/lane{key.data.index}.log")
        for job in list(self.jobs):
            self.watch(job)

    def heard(self, lane: Lane, message: dict[str, Any]) -> None:
        if "ready" in message:
            lane.ready = True
        elif "started" in message:
            lane.pid = message["started"]
        elif lane.job is not None:
            job, lane.job, lane.pid = lane.job, None, None
            job.codes[lane.index] = message["code"]
            if len(job.codes) == len(job.lanes):
                self.jobs.remove(job)
                self.record(job)

    def watch(self, job: Job) -> None:
        """End a job that is over its time, and the ranks that wait for one that has ended badly."""
        over = time.monotonic() - job.began - job.limit_s
        if over > 0 and job.killed is None:
            self.kill(job, f"stopped after {job.limit_s:.0f} s")
        gone_wrong = any(read(file).get("status", "ok") != "ok" for file in job.files if file.exists())
        gone_wrong |= any(code != 0 for code in job.codes.values())
        if gone_wrong and job.killed is None:
            stamps = [file.stat().st_mtime for file in job.files if file.exists()]
            if not stamps or time.time() - max(stamps) > GRACE_S:
                self.kill(job, "")

    def kill(self, job: Job, why: str) -> None:
        job.killed = why
        for lane in job.lanes:
            if lane.job is job and lane.pid is not None:
                try:
                    os.kill(lane.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def record(self, job: Job) -> None:
        ranks = [read(file) for file in job.files if file.exists()]
        took = round(time.monotonic() - job.began, 1)
        if job.kind in ("calibrate", "collectives"):
            self.rates[job.name] = ranks[0] if ranks else {"failed": tail(self.work / f"{job.name}.0.log")}
        elif job.kind == "adam":
            self.rates.setdefault("one", {}).update(ranks[0] if ranks else {})
        elif job.cell is not None:
            row = {"cell": dataclasses.asdict(job.cell), "tokens": job.cell.tokens, "seconds": took, "ranks": ranks}
            row |= verdict(ranks, len(job.lanes), job.killed, self.work / f"{job.name}.0.log")
            self.results[job.name] = row
            alone = row.get("allocated_gib")
            print(f"{self.elapsed():6.1f} s: {row['status']:8} {job.name}  {took} s  {alone} GiB", flush=True)
        self.save()

    def save(self) -> None:
        for name, value in (("cells", self.results), ("rates", self.rates)):
            path = self.out / f"{name}.json"
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            scratch.replace(path)
        if self.options.copy_to:
            copy_results(self.out, self.options.copy_to)


def choose(free: list[Lane], count: int) -> list[Lane]:
    """`count` free lanes, pairs from the same half where there is one."""
    if count == 2:
        for first in free:
            for second in free:
                if second.index == first.index + 1 and first.index % 2 == 0:
                    return [first, second]
    return free[:count]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_to_the_end(measurement: Measurement) -> None:
    """Measure; whatever happens, results are saved and no lane is left."""
    try:
        measurement.run()
    finally:
        measurement.save()
        for lane in measurement.lanes:
            lane.process.kill()


def main() -> None:
    refuse_small_gpus()
    run_to_the_end(Measurement(parse(options_parser(__doc__.splitlines()[0], gpus=4, cell_s=75.0, steps=5))))


if __name__ == "__main__":
    main()
