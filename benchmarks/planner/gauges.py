"""What a cell measures of itself: memory by phase, seconds by part of a step."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

__all__ = ["Clock", "Gauge", "memory_kinds", "refuse_small_gpus"]

LEAST_BYTES = 130 << 30  # of a GPU that the planner's cells are for


class Gauge:
    """Peaks of this process by phase; `mark(name)` closes a phase, keeping the largest of repeated ones."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.phases: dict[str, dict[str, float]] = {}
        self.current = "import"
        self._high = 0
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._high = max(self._high, resident_bytes())

    def begin(self, name: str) -> None:
        import torch

        self.current = name
        self._high = resident_bytes()
        if self.device == "cuda" and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def mark(self, name: str, then: str | None = None) -> None:
        import torch

        now: dict[str, float] = {"rss_end": resident_bytes()}
        now["rss_peak"] = max(self._high, now["rss_end"])
        if self.device == "cuda":
            now |= {
                "allocated_peak": torch.cuda.max_memory_allocated(),
                "reserved_peak": torch.cuda.max_memory_reserved(),
                "allocated_end": torch.cuda.memory_allocated(),
                "reserved_end": torch.cuda.memory_reserved(),
            }
        before = self.phases.get(name)
        if before is None:
            self.phases[name] = now
        else:
            before.update({key: max(value, before[key]) for key, value in now.items()})
        self.begin(then or name)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_kinds() -> dict[str, int]:
    """Anonymous, file-backed, shared and locked bytes of this process."""
    kinds = {}
    with contextlib.suppress(OSError), open("/proc/self/smaps_rollup", encoding="ascii") as file:
        for line in file.readlines()[1:]:
            key, size = line.split(":")
            kinds[key] = int(size.split()[0]) * 1024
    return kinds


class Clock:
    """Seconds of each step and of its parts, and the memory gauge's phases: forward, backward, optimizer."""

    def __init__(self, gauge: Gauge, steps: list[dict[str, float]], deadline: float) -> None:
        self.gauge, self.steps, self.deadline = gauge, steps, deadline
        self.events: list[tuple[str, Any, Any]] = []
        self.begun = 0.0

    def event(self) -> Any:
        import torch

        if self.gauge.device != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrap_loss(self, trainer: Any) -> None:
        inner = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            if self.gauge.current == "backward":  # an accumulated micro-batch: no optimizer step closed it
                self.gauge.mark("backward")
            self.gauge.begin("forward")
            start = self.event()
            result = inner(*args, **kwargs)
            self.events.append(("forward", start, self.event()))
            self.gauge.mark("forward", then="backward")
            return result

        trainer.compute_loss = compute_loss

    def wrap_engine(self, engine: Any) -> None:
        """DeepSpeed steps inside `accelerator.backward`; callbacks come too late to tell the two apart."""
        inner = engine.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self.gauge.mark("backward", then="optimizer")
            start = self.event()
            result = inner(*args, **kwargs)
            self.events.append(("optimizer", start, self.event()))
            self.gauge.mark("optimizer", then="between")
            return result

        engine.step = step

    def callback(self, trainer: Any) -> Any:
        import torch
        from transformers import TrainerCallback

        clock = self

        def synchronize() -> None:
            if clock.gauge.device == "cuda":
                torch.cuda.synchronize()

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                clock.gauge.mark("init", then="between")
                if hasattr(trainer.model_wrapped, "zero_optimization_stage"):
                    clock.wrap_engine(trainer.model_wrapped)

            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                synchronize()
                clock.begun = time.monotonic()

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not hasattr(trainer.model_wrapped, "zero_optimization_stage"):
                    clock.gauge.mark("backward", then="optimizer")
                    clock.started = clock.event()

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not hasattr(trainer.model_wrapped, "zero_optimization_stage"):
                    clock.events.append(("optimizer", clock.started, clock.event()))
                    clock.gauge.mark("optimizer", then="between")

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                synchronize()
                step = {"seconds": time.monotonic() - clock.begun}
                for name, start, end in clock.events:
                    took = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
                    step[name] = step.get(name, 0.0) + took
                clock.events.clear()
                clock.steps.append({key: round(value, 5) for key, value in step.items()})
                if (
                    time.monotonic() > clock.deadline
                    and len(clock.steps) >= 2
                    and int(os.environ.get("WORLD_SIZE", "1")) == 1
                ):
                    control.should_training_stop = True

        return Callback()


def refuse_small_gpus() -> None:
    """The cells are chosen for 141 GB, and the report takes them to have been measured there."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        size = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    except Exception:  # no GPU: the worker says so, or runs on CPUs
        return
    if size < LEAST_BYTES:
        raise SystemExit(f"these cells are for GPUs of 141 GB, this one has {size / 2**30:.0f} GiB")
