"""Writes safetensors shards as a stream: several files at a time, in each one tensor after the other, none kept.

A thread writes a file and hashes it on the way, while others make the tensors that come next.  So no two threads write
to one file, where they would wait for each other in the kernel, and nothing is read back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.hardware import usable_cpus
from hf_dsvllm.tensors.shard_file import (
    DEFAULT_SHARD_BYTES,
    REMEDY,
    ShardFile,
    grouped,
    shard_names,
    workers_for,
    write_index,
)
from hf_dsvllm.tensors.weights import SINGLE, TensorPlan

__all__ = ["write_shards"]


def write_shards(
    folder: Path,
    plan: Sequence[TensorPlan],
    produce: Callable[[str], torch.Tensor],
    *,
    max_shard_size_bytes: int = DEFAULT_SHARD_BYTES,
    working_bytes: Callable[[TensorPlan], int] = lambda planned: 3 * planned.size_bytes,
    memory_bytes: int | None = None,
    workers: int | None = None,
    single: str = SINGLE,
    hashed: bool = False,
) -> dict[str, str]:
    """Write `produce(name)` for every planned tensor to `folder`; return the BLAKE3 of each file, {} if not `hashed`.

    At most `workers` files are written at a time, and `produce` is called from as many threads; its tensors may lie on
    a GPU.  `working_bytes` is the memory one takes there while it is made and written; tensors under way together take
    at most `memory_bytes` (two shards if not given), a larger one is made alone.  `single` is the file's name if one
    holds everything.  A tensor of another shape or dtype than planned, or with NaN or infinity, and a disk that is full
    or fails raise ExportError; the files are then incomplete.
    """
    groups = list(grouped(plan, max_shard_size_bytes))
    files = dict(zip(shard_names(len(groups), single), groups, strict=True))
    gate = _MemoryGate(2 * max_shard_size_bytes if memory_bytes is None else memory_bytes)
    workers = workers or workers_for(plan)
    ahead = -(-workers // max(len(files), 1)) if workers > 1 else 0  # of each file, while one of its tensors is written

    def make(planned: TensorPlan) -> torch.Tensor:
        try:
            gate.check()
            tensor = _checked(planned, produce(planned.name))
        except BaseException as problem:
            gate.close(problem)
            raise
        gate.give_back(working_bytes(planned) - planned.size_bytes)
        return tensor

    def write(name: str, begin: Callable[[TensorPlan], _Coming]) -> str:
        waiting, coming = deque(files[name]), deque[tuple[TensorPlan, _Coming]]()
        try:
            gate.check()  # nothing is begun after a failure
            with ShardFile(folder / name, files[name], hashed=hashed) as file:
                while waiting or coming:
                    # Room is taken in the order of the file, and waited for only where nothing of the file holds any.
                    while waiting and len(coming) <= ahead and gate.take(working_bytes(waiting[0]), wait=not coming):
                        planned = waiting.popleft()
                        coming.append((planned, begin(planned)))
                    planned, made = coming.popleft()
                    tensor = made.result()
                    del made  # which holds the tensor
                    gate.check()
                    file.write(planned, tensor)
                    del tensor
                    gate.give_back(planned.size_bytes)
        except BaseException as problem:
            gate.close(problem)
            raise
        finally:
            coming.clear()
        return file.digest if hashed else ""

    if workers == 1:
        digests = {name: write(name, partial(_Later, make)) for name in files}
    else:
        digests = _beside_each_other(files, write, make, gate, workers)
    write_index(folder, files, REMEDY)
    return digests if hashed else {}


class _Coming(Protocol):
    """A tensor that is being made, or will be when it is asked for."""

    def result(self) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Later:
    """Made when it is asked for."""

    make: Callable[[TensorPlan], torch.Tensor]
    planned: TensorPlan

    def result(self) -> torch.Tensor:
        return self.make(self.planned)


def _beside_each_other(
    names: Collection[str],
    write: Callable[[str, Callable[[TensorPlan], _Coming]], str],
    make: Callable[[TensorPlan], torch.Tensor],
    gate: _MemoryGate,
    workers: int,
) -> dict[str, str]:
    """Name of a file -> what `write` returns; the first failure (or an interrupt) stops the others and is raised."""
    with (
        _threads_of_each(max(1, usable_cpus() // workers)),
        ThreadPoolExecutor(workers, thread_name_prefix="export-make") as makers,
        ThreadPoolExecutor(min(workers, max(len(names), 1)), thread_name_prefix="export-write") as writers,
    ):
        under_way = {name: writers.submit(write, name, partial(makers.submit, make)) for name in names}
        try:
            wait(under_way.values(), return_when=FIRST_EXCEPTION)
        finally:
            gate.close()
            writers.shutdown(wait=False, cancel_futures=True)  # of which no file is begun
    if gate.problem is not None:
        raise gate.problem
    return {name: future.result() for name, future in under_way.items()}


@contextlib.contextmanager
def _threads_of_each(count: int) -> Iterator[None]:
    """PyTorch's own threads for each thread begun meanwhile: by default each would have as many as there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _MemoryGate:
    """Lets tensors through as long as they take no more than `limit` bytes together, a larger one only alone.

    Who cannot wait is not let through before one who does: a large tensor would wait for all others.  Who waits must
    hold nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._waiting = 0
        self._closed = False
        self.problem: BaseException | None = None
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    def take(self, size_bytes: int, *, wait: bool) -> bool:
        """Whether there is so much room now, or has come; _Stopped if the gate is closed."""
        if not wait:
            with self._changed:
                return self._waiting == 0 and self._let_through(size_bytes)
        with self._changed:
            self._waiting += 1
        try:
            with self._turn, self._changed:
                return self._changed.wait_for(lambda: self._let_through(size_bytes))
        finally:
            with self._changed:
                self._waiting -= 1

    def _let_through(self, size_bytes: int) -> bool:
        if self._closed:
            raise _Stopped
        if self._held and self._held + size_bytes > self._limit:
            return False
        self._held += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """What was taken."""
        with self._changed:
            self._held -= size_bytes
            self._changed.notify_all()

    def check(self) -> None:
        """_Stopped if the gate is closed."""
        if self._closed:
            raise _Stopped

    def close(self, problem: BaseException | None = None) -> None:
        """Nothing is let through any more: all is done, a tensor has failed, or the user interrupts."""
        with self._changed:
            if self.problem is None and not isinstance(problem, _Stopped):
                self.problem = problem
            self._closed = True
            self._changed.notify_all()


class _Stopped(Exception):
    """A tensor that was not begun because another one failed."""


def _checked(planned: TensorPlan, tensor: torch.Tensor) -> torch.Tensor:
    if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
        raise ExportError(
            f"{planned.name} came out as {tuple(tensor.shape)} {tensor.dtype}, not {planned.shape} {planned.dtype}."
        )
    # The smallest and the largest value tell of NaN and infinity without a mask as large as the tensor.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ExportError(
            f"{planned.name} has {bad} NaN or infinite values: the training diverged, the snapshot is damaged, "
            f"or a value exceeds the range of {planned.dtype}; export an earlier snapshot or another dtype."
        )
    return tensor.contiguous()
