"""A DeepSpeed ZeRO checkpoint as named fp32 tensors, read straight from its partitions, one tensor at a time.

Reads what `deepspeed/utils/zero_to_fp32.py` reads (0.19.8; stages 1, 2 and 3) and gives bit for bit the same values,
but neither holds the model nor imports DeepSpeed: the partitions are mapped, only the pages of the tensor in hand are
touched, and they are let go afterwards.  The pickles in a checkpoint cannot run code here: classes other than torch's
containers are replaced by empty ones.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import mmap
import pickle
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_dsvllm.errors import ExportError
from hf_dsvllm.weights import hash_files

__all__ = ["ZeroCheckpoint", "write_adapter"]

MADV_DONTNEED = 4  # <bits/mman.h> on Linux
OPTIMIZER = "optimizer_state_dict"
ADAPTER = "default"  # the adapter's name in PEFT, which its saved files leave out


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """A tensor's shape and the pieces of flat fp32 partitions that make it up, in order."""

    shape: tuple[int, ...]
    pieces: tuple[torch.Tensor, ...]


class ZeroCheckpoint:
    """The parameters and buffers of a checkpoint folder (with `latest` and `global_step*`), or of a `global_step*`.

    Names are those of the trained module; a parameter that the model has under several names is there under the first.
    Raises ExportError if files are missing or are no ZeRO checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = _step_folder(path)
        self._optimizer_files = _files(self.folder, "*_optim_states.pt")
        self._model_files = _files(self.folder, "*_model_states.pt")
        try:
            self._spans = dict(self._read())
        except (KeyError, IndexError, TypeError, AttributeError, pickle.UnpicklingError, RuntimeError) as error:
            raise ExportError(
                f"{self.folder} cannot be read as a ZeRO checkpoint ({type(error).__name__}: {error}): it is damaged, "
                "or made by a DeepSpeed or a parallelism (pipeline, experts) whose files are laid out otherwise."
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """All floating point tensors, buffers first."""
        return tuple(self._spans)

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._span(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """fp32, whatever the module was trained in: these are the optimizer's own weights."""
        self._span(name)
        return torch.float32

    def get(self, name: str) -> torch.Tensor:
        """One whole tensor in fp32."""
        span = self._span(name)
        return self.flat(name, 0, math.prod(span.shape)).reshape(span.shape)

    def flat(self, name: str, begin: int, end: int) -> torch.Tensor:
        """The elements `begin` to `end` of a flattened tensor, and nothing else read."""
        out = torch.empty(end - begin, dtype=torch.float32)
        at = 0
        for piece in self._span(name).pieces:
            first, last = max(begin - at, 0), min(end - at, piece.numel())
            if first < last:
                out[at + first - begin : at + last - begin].copy_(piece[first:last])
                _let_go(piece[first:last])
            at += piece.numel()
        return out

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of every file of the checkpoint that is read."""
        return hash_files([*self._model_files, *self._optimizer_files])

    def close(self) -> None:
        """Let go of the mapped files."""
        self._spans = {}

    def __enter__(self) -> ZeroCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _span(self, name: str) -> _Span:
        if name not in self._spans:
            raise ExportError(f"No tensor {name} in {self.folder}.")
        return self._spans[name]

    def _read(self) -> Iterator[tuple[str, _Span]]:
        optimizers = [_load(file)[OPTIMIZER] for file in self._optimizer_files]
        stage = optimizers[0]["zero_stage"]  # a member of DeepSpeed's enumeration, or a plain number
        stage = stage.arguments[0] if isinstance(stage, _Empty) else stage
        ranks = optimizers[0]["partition_count"]
        ranks = max(ranks) if isinstance(ranks, list) else ranks
        if ranks != len(optimizers):
            raise ExportError(
                f"{self.folder} has {len(optimizers)} *_optim_states.pt of {ranks}: a rank's file is missing (was it "
                "written to another node's disk?), or an older checkpoint was overwritten in part."
            )
        models = [_load(file) for file in (self._model_files if stage == 3 else self._model_files[:1])]
        first = models[0]
        for name in first["buffer_names"]:
            buffer = first["module"].get(name)
            if buffer is not None and buffer.is_floating_point():
                yield name, _Span(shape=tuple(buffer.shape), pieces=(buffer.float().reshape(-1),))
        yield from _frozen(models)
        if stage == 3:
            yield from _third_stage(first["param_shapes"], [each["fp32_flat_groups"] for each in optimizers])
        else:
            key = "single_partition_of_fp32_groups"
            paddings = optimizers[0].get("param_alignment_paddings")
            yield from _early_stages(first["param_shapes"], [each[key] for each in optimizers], paddings)


def write_adapter(checkpoint: Path, folder: Path) -> Path:
    """The adapter of a ZeRO checkpoint whose own adapter file is missing or empty, as PEFT would have saved it.

    Adapters are small: this writes adapter_config.json and adapter_model.safetensors to `folder` and returns it.
    """
    with ZeroCheckpoint(checkpoint) as tensors:
        state = {_saved_name(name): tensors.get(name) for name in tensors.names}
        config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        trained = {name: tensor for name, tensor in state.items() if _is_trained(name, config)}
    if not trained:
        raise ExportError(f"{checkpoint} has an adapter_config.json, but no adapter in its DeepSpeed partitions.")
    save_file({name: tensor.contiguous() for name, tensor in trained.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _saved_name(name: str) -> str:
    """The trained module's name of a tensor -> the one in PEFT's files (peft/utils/save_and_load.py)."""
    name = name.removeprefix("module.")
    name = name.replace(f".modules_to_save.{ADAPTER}.", ".")
    return re.sub(rf"\.{ADAPTER}(?=\.|$)", "", name)


def _is_trained(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT saves this tensor: the adapter's own, whole saved modules and, where asked for, biases."""
    if "lora_" in name or "token_adapter" in name:
        return True
    saved = config.get("modules_to_save") or ()
    if any(f".{module}." in f"{name}." and ".original_module." not in name for module in saved):
        return True
    return config.get("bias", "none") != "none" and name.endswith(".bias")


def _frozen(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, _Span]]:
    """Frozen parameters are kept beside the optimizer: whole by rank 0, or in equal pieces under ZeRO-3."""
    shapes = models[0].get("frozen_param_shapes") or {}
    for name, shape in shapes.items():
        pieces = tuple(model["frozen_param_fragments"][name].detach().reshape(-1) for model in models)
        yield name, _Span(shape=tuple(shape), pieces=_cut(pieces, math.prod(shape)))


def _third_stage(
    groups: Sequence[Mapping[str, torch.Size]], ranks: Sequence[Sequence[torch.Tensor]]
) -> Iterator[tuple[str, _Span]]:
    """Each parameter is cut into one piece a rank, padded; a rank keeps its pieces one after the other."""
    offset = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        count = math.prod(shape)
        share = -(-count // len(ranks))
        pieces = tuple(piece for flat in ranks for piece in _window(flat, offset, offset + share))
        yield name, _Span(shape=tuple(shape), pieces=_cut(pieces, count))
        offset += share
    held = sum(flat.numel() for flat in ranks[0])
    if offset != held:
        raise ExportError(f"The parameters take {offset} numbers of each rank's partition, which has {held}.")


def _early_stages(
    groups: Sequence[Mapping[str, torch.Size]],
    ranks: Sequence[Sequence[torch.Tensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[str, _Span]]:
    """Each group of parameters is one vector, cut into one piece a rank; parameters follow each other in it."""
    for number, shapes in enumerate(groups):
        flat = [rank[number] for rank in ranks]
        offset, held = 0, sum(piece.numel() for piece in flat)
        for position, (name, shape) in enumerate(shapes.items()):
            count = math.prod(shape)
            yield name, _Span(shape=tuple(shape), pieces=tuple(_window(flat, offset, offset + count)))
            offset += count + (0 if paddings is None else paddings[number][position])
        align = 2 * len(ranks)  # DeepSpeed pads the vector for the network's sake
        if -(-offset // align) != -(-held // align):
            raise ExportError(f"Group {number} of parameters takes {offset} numbers of partitions that hold {held}.")


def _window(flat: Sequence[torch.Tensor], begin: int, end: int) -> Iterator[torch.Tensor]:
    """The elements `begin` to `end` of vectors that follow each other."""
    at = 0
    for vector in flat:
        first, last = max(begin - at, 0), min(end - at, vector.numel())
        if first < last:
            yield vector[first:last]
        at += vector.numel()


def _cut(pieces: Sequence[torch.Tensor], count: int) -> tuple[torch.Tensor, ...]:
    """The first `count` elements of `pieces`: the rest is padding."""
    return tuple(_window(pieces, 0, count))


def _step_folder(path: Path) -> Path:
    if path.name.startswith("global_step"):
        return path
    latest = path / "latest"
    if latest.is_file() and (path / latest.read_text(encoding="utf-8").strip()).is_dir():
        return path / latest.read_text(encoding="utf-8").strip()
    steps = sorted(path.glob("global_step*"), key=_natural)
    if not steps:
        raise ExportError(f"{path} has no DeepSpeed checkpoint: neither `latest` nor a folder global_step*.")
    return steps[-1]


def _files(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern), key=_natural)
    if not files:
        raise ExportError(f"{folder} has no {pattern}: the checkpoint is not complete.")
    return files


def _natural(path: Path) -> list[int | str]:
    """rank_2 before rank_10"""
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path.name)]


def _let_go(piece: torch.Tensor) -> None:
    """Drop the pages of a mapped file that were just copied, so that they do not count as this process's memory."""
    page = mmap.PAGESIZE
    begin = -(-piece.data_ptr() // page) * page
    end = (piece.data_ptr() + piece.numel() * piece.element_size()) // page * page
    if end > begin and piece.untyped_storage().filename is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)


def _load(file: Path) -> dict[str, Any]:
    """One of DeepSpeed's files, its tensors mapped instead of read."""
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=_CONTAINERS_ONLY)
    except (RuntimeError, OSError, EOFError) as error:
        raise ExportError(
            f"{file} ({file.stat().st_size} bytes) cannot be read: {error}. It is probably truncated."
        ) from error
    assert isinstance(state, dict)
    return state


class _Empty:
    """Stands for a class that is not needed, and keeps what it was made from."""

    def __init__(self, *arguments: object, **_: object) -> None:
        self.arguments = arguments

    def __setstate__(self, _: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Finds torch's tensors and the standard containers; every other name becomes an empty class."""

    def find_class(self, module: str, name: str) -> Any:
        tensors = module in {"torch", "torch._utils", "torch.storage", "torch._tensor"} and (
            name.startswith(("_rebuild", "Size", "device")) or name.endswith(("Storage", "Tensor"))
        )
        number = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if tensors or number or (module, name) in {("collections", "OrderedDict"), ("collections", "defaultdict")}:
            return super().find_class(module, name)
        return type(name, (_Empty,), {})


_CONTAINERS_ONLY = types.SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="containers_only")
