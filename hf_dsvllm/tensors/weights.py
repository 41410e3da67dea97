"""Folders of safetensors: one tensor at a time, read with plain reads.

Memory maps are not used: their pages count as memory of the process, and a merge that streams 16 GB would seem to hold
them.  Knows nothing of adapters or models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from hf_dsvllm.errors import ExportError
from hf_dsvllm.tensors.hashing import hash_files
from hf_dsvllm.tensors.pages import empty
from hf_dsvllm.tensors.staging import CPU, upload

__all__ = [
    "INDEX",
    "SINGLE",
    "TensorFolder",
    "TensorPlan",
    "TensorSource",
    "check_free_disk",
    "has_safetensors",
    "torch_dtype",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
KEPT_OPEN = 64  # files; of a folder with more, the others are opened for each read: a process may have 1,024
# The dtypes an unquantised checkpoint can have, of weights and of masks and counts; others are named in an error.
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
OTHERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip
DTYPES = FLOATS | OTHERS


def torch_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` (also `"torch.bfloat16"`) -> `torch.bfloat16`; ExportError for what weights cannot be saved as."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    try:
        return dtypes[name.removeprefix("torch.")]
    except KeyError:
        raise ExportError(f"dtype={name!r} is not one an export can have; use one of {', '.join(dtypes)}.") from None


def has_safetensors(folder: Path) -> bool:
    """Whether a model folder has weights that `TensorFolder` reads."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def check_free_disk(folder: Path, needed_bytes: int) -> None:
    """Raise ExportError unless the disk that will hold `folder` has `needed_bytes` free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ExportError(
            f"{folder} needs {needed_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "free some, or name another folder."
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One tensor that will be written: its key, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """`prod(shape)`"""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """`prod(shape) * itemsize`"""
        return self.elements * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that are read one at a time: a folder of safetensors, or a partitioned ZeRO checkpoint."""

    path: Path

    @property
    def names(self) -> tuple[str, ...]:
        """All keys."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it."""

    def get(self, name: str, device: torch.device = CPU, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor onto `device`, rounded to `dtype` if given; safe to call from several threads."""

    def flat(self, name: str, begin: int, end: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The elements `begin` to `end` of a flattened tensor, and nothing else read."""

    def hashes(self) -> dict[str, str]:
        """File name -> BLAKE3 of it, or of the parts of it that are read."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """Where one tensor lies."""

    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class TensorFolder:
    """The tensors of one safetensors file, or of a folder with `model.safetensors` or a sharded index.

    Every file named by the index must be there and whole: a missing or truncated one raises ExportError at opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, _Entry] = {}
        self._files: list[Path] = []
        self._open: dict[Path, int] = {}
        try:
            for file in self._find_files():
                self._read_header(file)
            self._check_index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; safe to call twice."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """All keys, in the order of the files."""
        return tuple(self._entries)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted(self._files))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone."""
        entry = self._entry(name)
        if entry.code not in DTYPES:
            raise ExportError(
                f"{name} in {entry.file} has dtype {entry.code}: this looks like a quantised checkpoint; "
                "name the model in 16 or 32 bit that it was made from with --base."
            )
        return DTYPES[entry.code]

    def get(self, name: str, device: torch.device = CPU, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor into memory of its own, or onto a GPU; safe to call from several threads."""
        entry = self._entry(name)
        return self._read(name, 0, entry.size_bytes, device).reshape(entry.shape).to(dtype or self.dtype(name))

    def flat(self, name: str, begin: int, end: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The elements `begin` to `end` of a flattened tensor, and nothing else read."""
        itemsize = self.dtype(name).itemsize
        return self._read(name, begin * itemsize, end * itemsize).to(dtype or self.dtype(name))

    def hashes(self) -> dict[str, str]:
        """File name -> BLAKE3 of every safetensors file and of the index, if there is one."""
        index = self.path / INDEX
        files = [*self.files, *([index] if self.path.is_dir() and index.is_file() else [])]
        return {file.name: digest for file, digest in hash_files(files, large=len(self.files)).items()}

    def _find_files(self) -> Sequence[Path]:
        if self.path.is_file():
            return [self.path]
        if (self.path / INDEX).is_file():
            names = set(self._index().values())
            missing = sorted(name for name in names if not (self.path / name).is_file())
            if missing:
                raise ExportError(
                    f"{self.path / INDEX} names {', '.join(missing)}, absent from that folder: copy or download again."
                )
            return [self.path / name for name in sorted(names)]
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        pickles = sorted(file.name for file in self.path.glob("*.bin"))
        why = f" (it has {', '.join(pickles)}: load it and save_pretrained() it once)" if pickles else ""
        raise ExportError(f"No model.safetensors and no {INDEX} in {self.path}{why}.")

    def _index(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{self.path / INDEX} is no index of weights ({error}); copy it again.") from error

    def _check_index(self) -> None:
        if self.path.is_file() or not (self.path / INDEX).is_file():
            return
        lost = sorted(set(self._index()) - set(self._entries))
        if lost:
            raise ExportError(f"{self.path / INDEX} names {len(lost)} tensors that its files lack, such as {lost[0]}.")

    def _read_header(self, file: Path) -> None:
        try:
            safe_open(file, framework="pt")  # checks that offsets, sizes and the file's length belong together
        except (SafetensorError, OSError) as error:
            raise ExportError(
                f"{file} ({file.stat().st_size} bytes) cannot be read as safetensors: {error}. "
                "It is probably truncated: copy or download it again."
            ) from error
        self._files.append(file)
        if len(self._open) < KEPT_OPEN:
            self._open[file] = os.open(file, os.O_RDONLY)
        with self._descriptor(file) as descriptor:
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            header = json.loads(os.pread(descriptor, length, 8))
        for name, values in header.items():
            if name == "__metadata__":
                continue
            if name in self._entries:
                raise ExportError(f"{name} is both in {self._entries[name].file.name} and {file.name} of {self.path}.")
            begin, end = values["data_offsets"]
            self._entries[name] = _Entry(
                file=file,
                code=values["dtype"],
                shape=tuple(values["shape"]),
                offset=8 + length + begin,
                size_bytes=end - begin,
            )

    def _read(self, name: str, begin: int, end: int, device: torch.device = CPU) -> torch.Tensor:
        """The bytes `begin` to `end` of a tensor, as a vector of its dtype."""
        entry = self._entry(name)
        dtype = self.dtype(name)

        def read(into: memoryview, at: int) -> None:
            with self._descriptor(entry.file) as descriptor:
                _read_exactly(descriptor, into, entry.offset + begin + at, entry.file)

        if device.type == "cuda":
            return upload(read, end - begin, device).view(dtype)
        raw = empty(end - begin, torch.uint8)
        read(memoryview(raw.numpy()), 0)
        return raw.view(dtype)

    @contextlib.contextmanager
    def _descriptor(self, file: Path) -> Iterator[int]:
        """Of a file that is open already, or is opened for one read."""
        if file in self._open:
            yield self._open[file]
            return
        descriptor = os.open(file, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ExportError(f"No tensor {name} in {self.path}.")
        return self._entries[name]


def _read_exactly(descriptor: int, into: memoryview, offset: int, file: Path) -> None:
    """One read is at most 2 GiB on Linux, and fewer bytes than asked for are allowed at any time."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise ExportError(f"{file} became shorter while it was read; is something writing to it?")
        done += count
