"""Folders of safetensors: read one tensor at a time, write shard by shard, hash what was read.

Knows nothing of adapters or models; peak memory is one output shard plus the tensor in hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import write_json

__all__ = ["TensorFolder", "TensorPlan", "check_free_disk", "sha256_of", "torch_dtype", "write_shards"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def torch_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` (also `"torch.bfloat16"`) -> `torch.bfloat16`; ExportError for what weights cannot be saved as."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    try:
        return dtypes[name.removeprefix("torch.")]
    except KeyError:
        raise ExportError(f"dtype={name!r} is not one an export can have; use one of {', '.join(dtypes)}.") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    def size_bytes(self) -> int:
        """`prod(shape) * itemsize`"""
        count = self.dtype.itemsize
        for dimension in self.shape:
            count *= dimension
        return count


class TensorFolder:
    """The tensors of one safetensors file, or of a folder with `model.safetensors` or a sharded index.

    Every file named by the index must be there and whole: a missing or truncated one raises ExportError at opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        for file in self._find_files():
            handle = self._open_file(file)
            for name in handle.keys():  # noqa: SIM118  safe_open has keys() but is no mapping
                if name in self._file_of:
                    raise ExportError(f"{name} is both in {self._file_of[name].name} and {file.name} of {path}.")
                self._file_of[name] = file
        self._check_index()

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory maps."""
        self._open.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """All keys, in the order of the files."""
        return tuple(self._file_of)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted(self._open))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone."""
        codes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
        code = self._slice(name).get_dtype()
        if code not in codes:
            raise ExportError(
                f"{name} in {self._file_of[name]} has dtype {code}: this looks like a quantised checkpoint; "
                "name the model in 16 or 32 bit that it was made from with --base."
            )
        return codes[code]

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return self._handle(name).get_tensor(name)

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of every safetensors file and of the index, if there is one."""
        files = [*self.files, *([self.path / INDEX] if self.path.is_dir() and (self.path / INDEX).is_file() else [])]
        return {file.name: sha256_of(file) for file in files}

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
        return json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"]

    def _check_index(self) -> None:
        if self.path.is_file() or not (self.path / INDEX).is_file():
            return
        lost = sorted(set(self._index()) - set(self._file_of))
        if lost:
            raise ExportError(f"{self.path / INDEX} names {len(lost)} tensors that its files lack, such as {lost[0]}.")

    def _open_file(self, file: Path) -> safe_open:
        try:
            self._open[file] = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ExportError(
                f"{file} ({file.stat().st_size} bytes) cannot be read as safetensors: {error}. "
                "It is probably truncated: copy or download it again."
            ) from error
        return self._open[file]

    def _handle(self, name: str) -> safe_open:
        if name not in self._file_of:
            raise ExportError(f"No tensor {name} in {self.path}.")
        return self._open[self._file_of[name]]

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)


def write_shards(
    folder: Path, plan: Sequence[TensorPlan], produce: Callable[[str], torch.Tensor], *, max_shard_size_bytes: int
) -> tuple[str, ...]:
    """Write `produce(name)` for every planned tensor; return the file names.

    A tensor of another shape or dtype than planned, or with NaN or infinity, raises ExportError.
    """
    groups = list(_grouped(plan, max_shard_size_bytes))
    count = len(groups)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        shard = {planned.name: _checked(planned, produce(planned.name)) for planned in group}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        del shard
    if count > 1:
        total = sum(planned.size_bytes for planned in plan)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return tuple(dict.fromkeys(weight_map.values()))


def _grouped(plan: Sequence[TensorPlan], limit_bytes: int) -> Iterator[list[TensorPlan]]:
    """Consecutive tensors whose sum stays within `limit_bytes`; a larger single tensor is a shard of its own."""
    group: list[TensorPlan] = []
    size = 0
    for planned in plan:
        if group and size + planned.size_bytes > limit_bytes:
            yield group
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
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ExportError(
            f"{planned.name} has {bad} NaN or infinite values: the training diverged, the snapshot is damaged, "
            f"or a value exceeds the range of {planned.dtype}; export an earlier snapshot or another dtype."
        )
    return tensor.contiguous()
