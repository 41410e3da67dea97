"""One safetensors file that is written tensor by tensor, and how tensors are divided among files.

The header of a safetensors file depends on names, shapes and dtypes alone, so it is written first and every tensor goes
to its place as soon as it is made.  `safetensors.save_file` wants a whole shard in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from blake3 import blake3

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import write_json
from hf_dsvllm.hardware import usable_cpus
from hf_dsvllm.tensors.staging import download
from hf_dsvllm.tensors.weights import FLOATS, INDEX, OTHERS, SINGLE, TensorPlan

__all__ = [
    "CODES",
    "DEFAULT_SHARD_BYTES",
    "REMEDY",
    "ShardFile",
    "grouped",
    "shard_names",
    "workers_for",
    "write_index",
]

# A file is written and hashed by one thread, several beside each other.  transformers and vLLM take any size.
DEFAULT_SHARD_BYTES = 2 * 10**9
WORKERS = 16  # files written at a time, or tensors that exist already
SMALL_BYTES = 64 << 20  # below it threads cost more than they bring
CODES = {dtype: code for code, dtype in (FLOATS | OTHERS).items()}
REMEDY = "free some space, or name another folder with --out"
_LIBC = ctypes.CDLL(None)


class ShardFile:
    """One safetensors file: its header is written at opening, tensors are put to their places in any order.

    With `hashed` in the order of `group`, by one thread; then `digest` is the BLAKE3 of the whole file.
    """

    def __init__(self, path: Path, group: Sequence[TensorPlan], *, hashed: bool = False, remedy: str = REMEDY) -> None:
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
            try:
                _write_exactly(self._descriptor, memoryview(len(header).to_bytes(8, "little") + header), 0)
            except BaseException:
                os.close(self._descriptor)
                raise
        self._size = self._start + offset
        self._hash = blake3(len(header).to_bytes(8, "little") + header) if hashed else None
        self._hashed = self._start

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def digest(self) -> str:
        """BLAKE3 of the file, in hexadecimal, once every tensor was written."""
        assert self._hash is not None
        assert self._hashed == self._size, "a tensor is missing"
        return self._hash.hexdigest()

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
            if self._hash is not None:
                assert self._hashed == offset + at, "hashed in the order of the file"
                self._hash.update(data)
                self._hashed += len(data)

        download(tensor, put, planned.dtype)


def grouped(plan: Sequence[TensorPlan], limit_bytes: int) -> Iterator[list[TensorPlan]]:
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


def shard_names(count: int, single: str = SINGLE) -> tuple[str, ...]:
    """What `count` files of weights are called; without weights there is no file."""
    if count <= 1:
        return (single,) * count
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def write_index(folder: Path, groups: Mapping[str, Sequence[TensorPlan]], remedy: str) -> None:
    """Which of several files (name -> tensors) has what; for a single one there is no index."""
    if len(groups) > 1:
        total = sum(planned.size_bytes for group in groups.values() for planned in group)
        weight_map = {planned.name: name for name, group in groups.items() for planned in group}
        with _writing(folder / INDEX, remedy):
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def workers_for(plan: Sequence[TensorPlan]) -> int:
    """Threads that writing so much is worth."""
    total = sum(planned.size_bytes for planned in plan)
    return 1 if total < SMALL_BYTES else min(WORKERS, usable_cpus())


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
    _LIBC.sync_file_range(
        ctypes.c_int(descriptor), ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(start_only)
    )
