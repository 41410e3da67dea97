"""Shards of tensors that exist only for a while, such as those gathered from a model that is being trained."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.tensors.shard_file import (
    DEFAULT_SHARD_BYTES,
    REMEDY,
    ShardFile,
    grouped,
    shard_names,
    workers_for,
    write_index,
)
from hf_dsvllm.tensors.weights import TensorPlan

__all__ = ["ShardWriter"]

LARGE_BYTES = 256 << 20  # one thread takes 0.2 s and more: an output head of 1.2 GB that came last would hold all up


class ShardWriter:
    """Shards of tensors that exist only for a while: each `write` brings some of them, whatever their values.

    In the order of the plan only a few files are open at a time; as a context manager it closes them, and adds the
    index if all has gone well.  `remedy` is what an error about the disk advises; tensors on a GPU are copied on
    `stream`, or on the default one.
    """

    def __init__(
        self,
        folder: Path,
        plan: Sequence[TensorPlan],
        *,
        max_shard_size_bytes: int = DEFAULT_SHARD_BYTES,
        workers: int | None = None,
        remedy: str = REMEDY,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        groups = list(grouped(plan, max_shard_size_bytes))
        self._folder, self._remedy = folder, remedy
        self._groups = dict(zip(shard_names(len(groups)), groups, strict=True))
        self._plan = {planned.name: planned for planned in plan}
        self._file_of = {planned.name: file for file, group in self._groups.items() for planned in group}
        self._missing = {file: len(group) for file, group in self._groups.items()}
        self._workers = workers or workers_for(plan)
        self._stream = stream
        self._begun: dict[str, ShardFile] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            assert not any(self._missing.values()), "planned, and never brought"
            write_index(self._folder, self._groups, self._remedy)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put `tensors`, cast to their planned dtypes piece by piece, to their places; return when all are there.

        They may lie on a GPU.  Raises ExportError for one of another shape than planned, for a disk that is full or
        fails, and for a GPU that has no memory left for the pieces.
        """
        by_file: dict[str, list[TensorPlan]] = {}
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != self._plan[name].shape:
                raise ExportError(f"{name} came out as {tuple(tensor.shape)}, not {self._plan[name].shape}.")
            by_file.setdefault(self._file_of[name], []).append(self._plan[name])
        # What makes the tensors may still be queued on this thread's stream, which the writing threads do not know.
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        shards = [self._shard(file) for file in by_file]
        brought = dict(tensors)

        def work(shard: ShardFile, planned: TensorPlan) -> None:
            with torch.cuda.stream(self._stream):
                try:
                    shard.write(planned, brought[planned.name])
                except torch.OutOfMemoryError as error:
                    raise ExportError(f"{planned.name} cannot be written: no GPU memory is left to cast it.") from error

        try:
            _run(_interleaved(shards, by_file.values()), work, self._workers)
        finally:
            brought.clear()  # an error keeps `work`, and `work` keeps these
        for shard, (file, group) in zip(shards, by_file.items(), strict=True):
            self._missing[file] -= len(group)
            if not self._missing[file]:
                shard.close()

    def _shard(self, file: str) -> ShardFile:
        if file not in self._begun:
            shard = ShardFile(self._folder / file, self._groups[file], remedy=self._remedy)
            self._begun[file] = self._stack.enter_context(shard)
        return self._begun[file]


def _interleaved(
    shards: Sequence[ShardFile], groups: Iterable[Sequence[TensorPlan]]
) -> list[tuple[ShardFile, TensorPlan]]:
    """The first tensor of each shard, the second of each, and so on, for writes to one file wait for each other.

    Before them those that would be waited for.
    """
    found = [
        (shard, planned)
        for row in zip_longest(*groups)
        for shard, planned in zip(shards, row, strict=True)
        if planned is not None
    ]
    return sorted(found, key=lambda task: task[1].size_bytes < LARGE_BYTES)  # which keeps the order of the rest


def _run(
    tasks: Sequence[tuple[ShardFile, TensorPlan]], work: Callable[[ShardFile, TensorPlan], None], workers: int
) -> None:
    """Do all tasks; the first failure (or an interrupt) stops the others and is raised."""
    if workers == 1:
        for task in tasks:
            work(*task)
        return
    stopped = threading.Event()

    def unless_stopped(task: tuple[ShardFile, TensorPlan]) -> None:
        if not stopped.is_set():
            work(*task)

    with ThreadPoolExecutor(workers, thread_name_prefix="export") as pool:
        try:
            futures = [pool.submit(unless_stopped, task) for task in tasks]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
    for future in done:
        future.result()
