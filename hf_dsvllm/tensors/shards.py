"""Writes safetensors shards as a stream: several tensors are read, merged and written at a time, none is kept.

The header of a safetensors file depends on names, shapes and dtypes alone, so it is written first and every tensor goes
to its place as soon as it is made.  `safetensors.save_file` wants a whole shard in memory.  Tensors of different shards
are interleaved: writes to one file wait for each other in the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import write_json
from hf_dsvllm.tensors.hashing import HashBehind
from hf_dsvllm.tensors.staging import download
from hf_dsvllm.tensors.weights import FLOATS, INDEX, OTHERS, SINGLE, TensorPlan

__all__ = ["DEFAULT_SHARD_BYTES", "ShardWriter", "shard_names", "write_shards"]

# A file is hashed by one core: files of this size are hashed beside each other.  transformers and vLLM take any.
DEFAULT_SHARD_BYTES = 2 * 10**9
# On an H200 host of 16 CPUs, merging 8B into memory: 4.2 GB/s with 8 and SHA-256, 5.8 with 16 and no hashes.
WORKERS = 16
WINDOW = 16  # files written at a time; those of the window before may still be open to be hashed
SMALL_BYTES = 64 << 20  # below it threads cost more than they bring
LARGE_BYTES = 256 << 20  # one thread takes 0.2 s and more: an output head of 1.2 GB that came last would hold all up
CODES = {dtype: code for code, dtype in (FLOATS | OTHERS).items()}
REMEDY = "free some space, or name another folder with --out"


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
) -> dict[str, HashBehind]:
    """Write `produce(name)` for every planned tensor to `folder`; return the hash of each file, {} if not `hashed`.

    The hashes may be under way still: `finish` or `close` every one.

    `produce` is called from up to `workers` threads; its tensors may lie on a GPU.  `working_bytes` is the memory one
    takes there while it is made and written; tensors under way together take at most `memory_bytes` (two shards if not
    given), a larger one is made alone.  `single` is the file's name if one holds everything.  A tensor of another shape
    or dtype than planned, or with NaN or infinity, and a disk that is full or fails raise ExportError; the files are
    then incomplete.
    """
    groups = list(_grouped(plan, max_shard_size_bytes))
    names = shard_names(len(groups), single)
    workers = workers or _workers(plan)
    limit = 2 * max_shard_size_bytes if memory_bytes is None else memory_bytes
    found: dict[str, HashBehind] = {}
    try:
        for begin in range(0, len(groups), WINDOW):
            for name in names[max(begin - 2 * WINDOW, 0) : max(begin - WINDOW, 0)] if hashed else ():
                found[name].finish()
            window = dict(zip(names[begin : begin + WINDOW], groups[begin : begin + WINDOW], strict=True))
            found |= _write_window(folder, window, produce, _MemoryGate(limit), working_bytes, workers, hashed)
    except BaseException:
        for under_way in found.values():
            under_way.close()
        raise
    _write_index(folder, dict(zip(names, groups, strict=True)), REMEDY)
    return found


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
        groups = list(_grouped(plan, max_shard_size_bytes))
        self._folder, self._remedy = folder, remedy
        self._groups = dict(zip(shard_names(len(groups)), groups, strict=True))
        self._plan = {planned.name: planned for planned in plan}
        self._file_of = {planned.name: file for file, group in self._groups.items() for planned in group}
        self._missing = {file: len(group) for file, group in self._groups.items()}
        self._workers = workers or _workers(plan)
        self._stream = stream
        self._begun: dict[str, _Shard] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            assert not any(self._missing.values()), "planned, and never brought"
            _write_index(self._folder, self._groups, self._remedy)

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
        gate = _MemoryGate(0)  # the tensors are there already
        brought = dict(tensors)

        def work(shard: _Shard, planned: TensorPlan) -> None:
            with gate.hold(0), torch.cuda.stream(self._stream):
                try:
                    shard.write(planned, brought[planned.name])
                except torch.OutOfMemoryError as error:
                    raise ExportError(f"{planned.name} cannot be written: no GPU memory is left to cast it.") from error

        try:
            _run(_interleaved(shards, by_file.values()), work, gate, self._workers)
        finally:
            brought.clear()  # an error keeps `work`, and `work` keeps these
        for shard, (file, group) in zip(shards, by_file.items(), strict=True):
            self._missing[file] -= len(group)
            if not self._missing[file]:
                shard.close()

    def _shard(self, file: str) -> _Shard:
        if file not in self._begun:
            shard = _Shard(self._folder / file, self._groups[file], hashed=False, remedy=self._remedy)
            self._begun[file] = self._stack.enter_context(shard)
        return self._begun[file]


def _workers(plan: Sequence[TensorPlan]) -> int:
    total = sum(planned.size_bytes for planned in plan)
    return 1 if total < SMALL_BYTES else min(WORKERS, os.cpu_count() or 1)


def _write_index(folder: Path, groups: Mapping[str, Sequence[TensorPlan]], remedy: str) -> None:
    """Which of several files (name -> tensors) has what; for a single one there is no index."""
    if len(groups) > 1:
        total = sum(planned.size_bytes for group in groups.values() for planned in group)
        weight_map = {planned.name: name for name, group in groups.items() for planned in group}
        with _writing(folder / INDEX, remedy):
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _interleaved(shards: Sequence[_Shard], groups: Iterable[Sequence[TensorPlan]]) -> list[tuple[_Shard, TensorPlan]]:
    """The first tensor of each shard, the second of each, and so on; before them those that would be waited for."""
    found = [
        (shard, planned)
        for row in zip_longest(*groups)
        for shard, planned in zip(shards, row, strict=True)
        if planned is not None
    ]
    return sorted(found, key=lambda task: task[1].size_bytes < LARGE_BYTES)  # which keeps the order of the rest


def _write_window(
    folder: Path,
    groups: Mapping[str, Sequence[TensorPlan]],
    produce: Callable[[str], torch.Tensor],
    gate: _MemoryGate,
    working_bytes: Callable[[TensorPlan], int],
    workers: int,
    hashed: bool,
) -> dict[str, HashBehind]:
    """Write the files of `groups` (name -> tensors) beside each other."""
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(_Shard(folder / name, group, hashed)) for name, group in groups.items()]

        def work(shard: _Shard, planned: TensorPlan) -> None:
            with gate.hold(working_bytes(planned)):
                shard.write(planned, _checked(planned, produce(planned.name)))

        _run(_interleaved(shards, groups.values()), work, gate, workers)
        return {name: shard.hash for name, shard in zip(groups, shards, strict=True) if shard.hash is not None}


def shard_names(count: int, single: str = SINGLE) -> tuple[str, ...]:
    """What `count` files of weights are called; without weights there is no file."""
    if count <= 1:
        return (single,) * count
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


class _Shard:
    """One safetensors file: its header is written at opening, tensors are put to their places in any order.

    `hash` goes on behind the writing, and is the caller's to finish.
    """

    def __init__(self, path: Path, group: Sequence[TensorPlan], hashed: bool, remedy: str = REMEDY) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        offset = 0
        for planned in group:
            span = [offset, offset + planned.size_bytes]
            entries[planned.name] = {
                "dtype": CODES[planned.dtype],
                "shape": list(planned.shape),
                "data_offsets": span,
            }
            self._offsets[planned.name] = offset
            offset += planned.size_bytes
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
        self._start = 8 + len(header)
        self._path, self._remedy = path, remedy
        self._closed = False
        with _writing(path, remedy):
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            _write_exactly(self._descriptor, memoryview(len(header).to_bytes(8, "little") + header), 0)
        self.hash = HashBehind(self._descriptor, self._start + offset, path) if hashed else None
        self._written(0, self._start)

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.hash is not None and kind is not None:
            self.hash.close()
        self.close()

    def close(self) -> None:
        """Nothing more is written; safe to call twice."""
        if not self._closed:
            self._closed = True
            with _writing(self._path, self._remedy):  # where a network's disk says that it is full
                os.close(self._descriptor)

    def write(self, planned: TensorPlan, tensor: torch.Tensor) -> None:
        """Put one tensor to its place, in its planned dtype."""
        offset = self._start + self._offsets[planned.name]

        def put(data: memoryview, at: int) -> None:
            with _writing(self._path, self._remedy):
                _write_exactly(self._descriptor, data, offset + at)
            _start_writeback(self._descriptor, offset + at, len(data))
            self._written(offset + at, len(data))

        download(tensor, put, planned.dtype)

    def _written(self, offset: int, size: int) -> None:
        if self.hash is not None:
            self.hash.wrote(offset, size)


class _MemoryGate:
    """Lets tensors through as long as they take no more than `limit` bytes together, a larger one only alone."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._held == 0 or self._held + size_bytes <= self._limit,
            )
            if self._closed:
                raise _Stopped
            self._held += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= size_bytes
                self._changed.notify_all()

    def close(self) -> None:
        """Nothing is let through any more: another tensor failed, or the user interrupts."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Stopped(Exception):
    """A tensor that was not begun because another one failed."""


def _run(
    tasks: Sequence[tuple[_Shard, TensorPlan]],
    work: Callable[[_Shard, TensorPlan], None],
    gate: _MemoryGate,
    workers: int,
) -> None:
    """Do all tasks; the first failure (or an interrupt) stops the others and is raised."""
    if workers == 1:
        for task in tasks:
            work(*task)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="export") as pool:
        try:
            futures = [pool.submit(work, *task) for task in tasks]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            gate.close()
            raise
        gate.close()
    problems = [future.exception() for future in done]
    for problem in problems:
        if problem is not None and not isinstance(problem, _Stopped):
            raise problem


@contextlib.contextmanager
def _writing(path: Path, remedy: str) -> Iterator[None]:
    """A disk that is full, over its quota or failing, as one clear error."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}; {remedy}.") from error


def _write_exactly(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Let the disk begin at once; Linux would wait until a tenth of all memory is unwritten, and fsync for the rest.

    A file system that cannot do it loses only time, so the result is not looked at.
    """
    start_only = 2  # SYNC_FILE_RANGE_WRITE in <fcntl.h>
    ctypes.CDLL(None).sync_file_range(
        ctypes.c_int(descriptor), ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(start_only)
    )


def _grouped(plan: Sequence[TensorPlan], limit_bytes: int) -> Iterator[list[TensorPlan]]:
    """Consecutive tensors, as few files of at most `limit_bytes` as possible, of about one size.

    A larger single tensor is a file of its own; lumps may make one file more.
    """
    total = sum(planned.size_bytes for planned in plan)
    share = total / max(-(-total // limit_bytes), 1)
    group: list[TensorPlan] = []
    size = begun = closed = 0  # bytes in this file and before it, files before it
    for planned in plan:
        middle = begun + size + planned.size_bytes / 2
        if group and (size + planned.size_bytes > limit_bytes or middle > share * (closed + 1)):
            yield group
            begun += size
            closed += 1
            group, size = [], 0
        group.append(planned)
        size += planned.size_bytes
    if group:
        yield group


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
