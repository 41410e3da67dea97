"""What a run took: seconds in training steps, tokens per second, peak memory; read from the process itself."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import resource
import statistics
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.console import say
from hf_dsvllm.files import write_json
from hf_dsvllm.ranks import from_all

__all__ = ["RunMeasure", "gib_of_others"]

logger = logging.getLogger(__name__)
GIB = 1 << 30
SAID_EACH, SAID_EVERY = 3, 100  # skipped steps that are spoken of: the first ones, then every so many
TRAINING = ("steps", "between steps", "end")
BESIDE = "beside a snapshot"  # what they are called while a copy is held that training would not need
RECORD_EVERY_S = 30.0


@dataclasses.dataclass(slots=True)
class RunMeasure:
    """Stopwatch and memory gauge of one process.  `durations`: seconds of each step, evaluation left out.

    `skipped_steps` did not change the weights; `unsound`: one did, by gradients that are no numbers.  `pauses`: seconds
    between two steps; `evaluation_pauses`: those in which an evaluation began, with what came before its first question
    and after its last answer, where training waited for it.
    """

    durations: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    skipped_steps: int = 0
    unsound: bool = False
    evaluations: list[Any] = dataclasses.field(default_factory=list)
    host_peaks: list[float] = dataclasses.field(default_factory=list)
    phases: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    pauses: list[float] = dataclasses.field(default_factory=list)
    evaluation_pauses: list[dict[str, float]] = dataclasses.field(default_factory=list)
    needed_bytes: int = 0  # the most PyTorch has reserved since training began, without copies beside it
    _copy_bytes: int = 0
    _recorded_at: float = -math.inf
    _begun: float | None = None
    _ended_at: float | None = None  # by time.time(), as evaluations record theirs
    _evaluating: int | None = None

    def mark(self, phase: str) -> None:
        """Close a phase: its peaks since the last mark; of a phase that comes again the highest is kept."""
        training = phase in TRAINING
        phase = BESIDE if self._copy_bytes and training else phase
        now = {"host_gib": host_peak_gib()}
        if torch.cuda.is_available():
            now["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
            now["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
            if training:
                self.needed_bytes = max(self.needed_bytes, torch.cuda.max_memory_reserved() - self._copy_bytes)
            torch.cuda.reset_peak_memory_stats()
        before = self.phases.get(phase, {})
        self.phases[phase] = {name: round(max(value, before.get(name, 0.0)), 3) for name, value in now.items()}

    def copy_held(self, size_bytes: int) -> None:
        """A copy of the weights is beside training since the last `mark`; 0 once its memory is free again."""
        if not size_bytes:
            self.mark("between steps")
        self._copy_bytes = size_bytes

    def start(self) -> None:
        """Training begins; what came before, the evaluation of the untrained model too, is no part of it."""
        self.mark("before training")
        self._ended_at = self._evaluating = None

    def evaluation_begins(self, step: int) -> None:
        """After `step`, whose pause is then one of `evaluation_pauses`."""
        self._evaluating = step

    def step_begins(self) -> None:
        if self.durations:
            self.mark("between steps")
        self._pause_ends(time.time())
        self._begun = time.monotonic()

    def _pause_ends(self, now: float) -> None:
        evaluated, self._evaluating = self._evaluating, None
        if self._ended_at is None:
            return
        self.pauses.append(now - self._ended_at)
        if evaluated is None:
            return
        row = {"step": evaluated, "seconds": round(self.pauses[-1], 4)}
        last = self.evaluations[-1] if self.evaluations else None
        if last is not None and last.step == evaluated and last.asked_at and last.answered_at:
            row["before_questions"] = round(last.asked_at - self._ended_at, 4)
            row["after_answers"] = round(now - last.answered_at, 4)
        self.evaluation_pauses.append(row)

    def step_ends(self) -> None:
        if self._begun is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.durations.append(time.monotonic() - self._begun)
            self._begun, self._ended_at = None, time.time()
            self.mark("steps")

    def count_skipped(self, trainer: Any) -> None:
        """After a step: whether it left the weights as they were, which DeepSpeed does where a gradient is inf or NaN.

        In fp16 that is how the loss scale is found: counted, and not spoken of.
        """
        if not trainer.accelerator.optimizer_step_was_skipped:
            return
        self.skipped_steps += 1
        if not trainer.args.fp16 and (self.skipped_steps <= SAID_EACH or self.skipped_steps % SAID_EVERY == 0):
            say(
                f"step {trainer.state.global_step}: a gradient is inf or NaN, and DeepSpeed left the step out without "
                f"a word ({self.skipped_steps} so far). Lower the learning rate or check the data."
            )

    def look_at(self, logs: Mapping[str, Any], trainer: Any) -> None:
        """Say it once if a step was taken by a gradient that is no number: without DeepSpeed nothing prevents it."""
        norm = logs.get("grad_norm")
        if self.unsound or not isinstance(norm, int | float) or math.isfinite(norm):
            return
        if trainer.accelerator.optimizer_step_was_skipped:
            return
        self.unsound = True
        say(
            f"step {trainer.state.global_step}: the gradient norm is {norm}, and the optimizer stepped all the same: "
            "the weights may be lost. Lower the learning rate, check the data, or go back to an earlier checkpoint."
        )

    def stop(self, state: Any) -> None:
        """Read the number of tokens trained on and the peaks of every process; collective.

        Of GPU memory the fullest process counts: under ZeRO-2 the last rank takes its share of the gradients while all
        activations are there, the first at the end of the backward pass (8B on three H200s: 10 GiB less).
        """
        self.mark("end")
        everybody = from_all((host_peak_gib(), self.phases))
        self.host_peaks = [host for host, _ in everybody]
        for phase, figures in self.phases.items():
            for name in figures.keys() & {"allocated_gib", "reserved_gib"}:
                figures[name] = max(phases[phase][name] for _, phases in everybody if phase in phases)
        self.tokens = tokens_of(state)

    def record_so_far(self, file: Path, state: Any) -> None:
        """The figures until now, what a run that is killed leaves, to `file`; twice a minute at most.

        `finished` is false there, the host peak our own.
        """
        now = time.monotonic()
        if not self.durations or now < self._recorded_at + RECORD_EVERY_S:
            return
        self._recorded_at = now
        self.tokens = tokens_of(state)
        try:
            write_json(file, self.as_record() | {"finished": False, "host_peak_gib": round(host_peak_gib(), 2)})
        except OSError as error:  # a full disk ends no training
            logger.warning("%s could not be written: %s", file, error)

    @property
    def steps(self) -> int:
        return len(self.durations)

    @property
    def step_seconds(self) -> float:
        return sum(self.durations)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all processes per second of training steps, None where nobody counted tokens."""
        return self.tokens / self.step_seconds if self.tokens and self.step_seconds else None

    def as_record(self) -> dict[str, Any]:
        """The figures as they stand in measured.json; memory in GiB, of GPUs the fullest's once `stop` was called."""
        memory: dict[str, Any] = {
            "host_peak_gib": round(self.host_peaks[0], 2) if self.host_peaks else None,
            "host_peak_all_gib": round(sum(self.host_peaks), 2) if self.host_peaks else None,
        }
        if torch.cuda.is_available():
            memory |= {
                "gpu": torch.cuda.get_device_name(),
                "gpu_peak_allocated_gib": round(self.highest("allocated_gib"), 2),
                "gpu_peak_reserved_gib": round(self.highest("reserved_gib"), 2),
            }
        return {
            "steps": self.steps,
            "step_seconds": round(self.step_seconds, 3),
            # The first steps load kernels and buffers; the median tells the steady speed of a short run.
            "median_step_seconds": round(statistics.median(self.durations), 4) if self.durations else None,
            # Evaluation, logging, checkpoints and data: everything between two steps.
            "pause_seconds": round(sum(self.pauses), 3),
            "median_pause_seconds": round(statistics.median(self.pauses), 4) if self.pauses else None,
            "evaluation_pauses": self.evaluation_pauses,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second, 1),
            "skipped_steps": self.skipped_steps,
            **memory,
            "phases": self.phases,
        }

    def highest(self, name: str) -> float:
        """The peak of a figure from the beginning of training on; 0 where it was not measured."""
        return max((self.phases[phase].get(name, 0.0) for phase in TRAINING if phase in self.phases), default=0.0)


def tokens_of(state: Any) -> int:
    """Tokens trained on: TRL logs them, the plain Trainer counts them if told to (include_num_input_tokens_seen)."""
    logged = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
    return int(logged[-1]) if logged else int(state.num_input_tokens_seen or 0)


def host_peak_gib() -> float:
    """The peak resident size of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def gib_of_others(processes: Collection[int] = ()) -> float | None:
    """Memory of this GPU that `processes` and their children hold, in GiB, by the driver; None without a GPU in use.

    Where the driver counts processes by other numbers (a container without the host's) it is all that PyTorch here does
    not hold: other processes', and our own CUDA context.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    try:
        held = memory_by_process()
    except Exception:  # NVML's own errors, of which there are many, and a package that is not there
        held = {}
    if os.getpid() in held:
        return round(sum(held.get(process, 0) for process in with_children(processes)) / GIB, 3)
    free, total = torch.cuda.mem_get_info()
    return round((total - free - torch.cuda.memory_reserved()) / GIB, 3)


def memory_by_process() -> dict[int, int]:
    """Bytes of this GPU by process number, as NVML knows them."""
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    finally:
        pynvml.nvmlShutdown()
    return {process.pid: process.usedGpuMemory for process in found if process.usedGpuMemory is not None}


def with_children(processes: Collection[int]) -> set[int]:
    """The numbers of `processes` and of all below them that still run."""
    import psutil

    found = set(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {child.pid for child in psutil.Process(process).children(recursive=True)}
    return found
