"""A DeepSpeed ZeRO checkpoint as named fp32 tensors, read straight from its partitions, one tensor at a time.

Reads what `deepspeed/utils/zero_to_fp32.py` reads (0.19.8; stages 1, 2 and 3) and gives bit for bit the same values,
but neither holds the model nor imports DeepSpeed: the partitions are mapped, and of the tensor in hand the file is
read.  The pickles in a checkpoint cannot run code here: classes other than torch's
containers are replaced by empty ones.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from hf_dsvllm.errors import ExportError
from hf_dsvllm.tensors.hashing import hash_files, piece_bytes
from hf_dsvllm.tensors.pages import PIECE_BYTES, Pages, empty
from hf_dsvllm.tensors.staging import CPU

__all__ = ["ZeroCheckpoint"]

OPTIMIZER = "optimizer_state_dict"
SAME_IN_EVERY_RANK = ("global_steps", "param_shapes", "frozen_param_shapes")  # keys of *_model_states.pt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """A tensor's shape and the pieces of flat fp32 partitions that make it up, in order."""

    shape: tuple[int, ...]
    pieces: tuple[torch.Tensor, ...]


class ZeroCheckpoint:
    """The parameters and buffers of a checkpoint folder (with `latest` and `global_step*`), or of a `global_step*`.

    Names are the trained module's; a parameter with several names is there under the first, `aliases` has the others.
    Raises ExportError if files are missing, of several saves or another parallelism, or no ZeRO checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = _step_folder(path)
        self._optimizer_files = _files(self.folder, "*_optim_states.pt")
        self._model_files = _files(self.folder, "*_model_states.pt")
        self.aliases: Mapping[str, str] = {}
        self._parts: dict[Path, list[torch.Tensor]] = {}  # what is read of each file
        try:
            self._spans = dict(self._whole(self._read()))
            self._pages = Pages(self._parts)
        except ExportError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, pickle.UnpicklingError, RuntimeError) as error:
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

    def get(self, name: str, device: torch.device = CPU, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One whole tensor, in fp32 if no `dtype` is given."""
        span = self._span(name)
        return self.flat(name, 0, math.prod(span.shape), dtype).reshape(span.shape).to(device)

    def flat(self, name: str, begin: int, end: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The elements `begin` to `end` of a flattened tensor, and nothing else read."""
        out = empty(end - begin, dtype or torch.float32)
        at = 0
        for piece in self._span(name).pieces:
            first, last = max(begin - at, 0), min(end - at, piece.numel())
            if first < last:
                if not piece.is_floating_point():
                    raise ExportError(
                        f"{name} is quantised ({piece.dtype}): train without zero_quantized_nontrainable_weights."
                    )
                for part in self._pages.pieces(piece[first:last]):
                    out[at + first - begin :][: len(part)].copy_(part)
                    first += len(part)
            at += piece.numel()
        return out

    def hashes(self) -> dict[str, str]:
        """`name#read` -> BLAKE3 of a file's header and weights; moments, and copies of the weights, are left out."""
        large = sum(bool(parts) for parts in self._parts.values())
        found = hash_files(
            self._parts, lambda file, threads: _hash_parts(file, self._parts[file], self._pages, threads), large=large
        )
        return {f"{file.name}#read": digest for file, digest in found.items()}

    def close(self) -> None:
        """Let go of the mapped files."""
        self._spans, self._parts = {}, {}

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
        stage, ranks = _saved_by(self._optimizer_files, optimizers)
        _check_files(self.folder, stage, ranks, [*self._optimizer_files, *self._model_files])
        models = [_load(file) for file in self._model_files]
        _check_models(self._model_files, models, ranks)
        first = models[0]
        self.aliases = dict(first.get("shared_params") or {})
        buffers = {name: first["module"].get(name) for name in first["buffer_names"]}
        buffers = {name: each for name, each in buffers.items() if each is not None and each.is_floating_point()}
        flats = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        frozen = [list((model.get("frozen_param_fragments") or {}).values()) for model in models]
        self._parts = dict(zip(self._model_files, frozen, strict=True))
        self._parts[self._model_files[0]] += buffers.values()
        self._parts |= {file: list(each[flats]) for file, each in zip(self._optimizer_files, optimizers, strict=True)}
        for name, buffer in buffers.items():
            yield name, _Span(shape=tuple(buffer.shape), pieces=(buffer.float().reshape(-1),))
        yield from _frozen(models)
        if stage == 3:
            yield from _third_stage(first["param_shapes"], [each[flats] for each in optimizers])
        else:
            paddings = optimizers[0].get("param_alignment_paddings")
            yield from _early_stages(first["param_shapes"], [each[flats] for each in optimizers], paddings)

    def _whole(self, spans: Iterable[tuple[str, _Span]]) -> Iterator[tuple[str, _Span]]:
        """`spans`, each of which has all elements of its tensor."""
        for name, span in spans:
            held = sum(piece.numel() for piece in span.pieces)
            if held != math.prod(span.shape):
                raise ExportError(
                    f"{name} in {self.folder} has {held} numbers, too few for its shape {span.shape}: the files are of "
                    "several saves, or damaged; export another checkpoint."
                )
            yield name, span


def _frozen(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, _Span]]:
    """Frozen parameters are kept beside the optimizer: whole by rank 0, or in equal pieces under ZeRO-3."""
    shapes = models[0].get("frozen_param_shapes") or {}
    for name, shape in shapes.items():
        pieces = tuple(model["frozen_param_fragments"][name].detach().reshape(-1) for model in models)
        share = -(-math.prod(shape) // len(models))
        if any(piece.numel() != share for piece in pieces):
            raise ExportError(f"The pieces of the frozen {name} have not {share} numbers each: export a snapshot.")
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
    for rank, flats in enumerate(ranks):
        held = sum(flat.numel() for flat in flats)
        if offset != held:
            raise ExportError(f"The parameters take {offset} numbers of each rank's partition; rank {rank} has {held}.")


def _early_stages(
    groups: Sequence[Mapping[str, torch.Size]],
    ranks: Sequence[Sequence[torch.Tensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[str, _Span]]:
    """Each group of parameters is one vector, cut into one piece a rank; parameters follow each other in it."""
    for number, (shapes, *flat) in enumerate(zip(groups, *ranks, strict=True)):
        offset, held = 0, sum(piece.numel() for piece in flat)
        gaps = [0] * len(shapes) if paddings is None else paddings[number]
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            count = math.prod(shape)
            yield name, _Span(shape=tuple(shape), pieces=tuple(_window(flat, offset, offset + count)))
            offset += count + gap
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


def _saved_by(files: Sequence[Path], optimizers: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(ZeRO stage, number of ranks) of the save, on which the files of all ranks must agree."""
    said: dict[tuple[int, int], str] = {}
    for file, optimizer in zip(files, optimizers, strict=True):
        stage = optimizer["zero_stage"]  # a member of DeepSpeed's enumeration, or a plain number
        stage = stage.arguments[0] if isinstance(stage, _Empty) else stage
        counts = optimizer["partition_count"]  # below stage 3 one for each group of parameters
        counts = counts if isinstance(counts, list) else [counts]
        if len(set(counts)) > 1:
            raise _parallel(file, "expert")
        said.setdefault((stage, counts[0]), file.name)
    if len(said) > 1:
        named = ", ".join(f"{name} by {ranks} ranks at ZeRO-{stage}" for (stage, ranks), name in said.items())
        raise ExportError(f"{files[0].parent} has files of several saves ({named}): export another checkpoint.")
    return next(iter(said))


def _check_files(folder: Path, stage: int, ranks: int, found: Sequence[Path]) -> None:
    """Every rank's files are there, and no others."""
    parts = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(ranks)]
    prefix = "bf16_" if found[0].name.startswith("bf16_") else ""
    own = [f"{prefix}{part}_optim_states.pt" for part in parts]
    own += [f"{part}_model_states.pt" for part in (parts if stage == 3 else ["mp_rank_00"])]
    names = [file.name for file in found]
    if lacking := [name for name in own if name not in names]:
        raise ExportError(
            f"{folder} was saved by {ranks} ranks and lacks {len(lacking)} of their {len(own)} files, such as "
            f"{lacking[0]}: copy them from the other nodes' disks, or export another checkpoint."
        )
    if others := [name for name in names if name not in own]:
        raise ExportError(
            f"{folder} has {others[0]} beside the files of {ranks} ranks at ZeRO-{stage}: it is of another save into "
            "this folder (move it away), or of tensor, pipeline or expert parallelism (export a snapshot)."
        )


def _check_models(files: Sequence[Path], models: Sequence[Mapping[str, Any]], ranks: int) -> None:
    """One save's, of a model that nothing but ZeRO has split."""
    for file, model in zip(files, models, strict=True):
        degrees = model.get("checkpoint_parallel_dimensions") or {}
        if model.get("ds_autoep_layers") or model.get("autoep_layers") or model.get("folding"):
            raise _parallel(file, "expert")
        if max(model.get("mp_world_size") or 1, degrees.get("tp_degree") or 1, degrees.get("pp_degree") or 1) > 1:
            raise _parallel(file, "tensor or pipeline")
        saved = model.get("dp_world_size", ranks)
        other = [key for key in SAME_IN_EVERY_RANK if model.get(key) != models[0].get(key)]
        if other or saved != ranks:
            why = f"{', '.join(other)} of {files[0].name} differ" if other else f"saved by {saved} ranks, not {ranks}"
            raise ExportError(f"{file} is of another save than the files beside it ({why}): export another checkpoint.")


def _parallel(file: Path, how: str) -> ExportError:
    return ExportError(
        f"{file} is of a model split by {how} parallelism too, whose parts cannot be put together here: export a "
        "snapshot, or convert the checkpoint with DeepSpeed's ds_to_universal.py."
    )


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


def _hash_parts(file: Path, parts: Sequence[torch.Tensor], pages: Pages, threads: int) -> str:
    """BLAKE3 of the pickle in `file`, which says where every tensor belongs, and of `parts` of its tensors."""
    digest = blake3(max_threads=threads)
    with zipfile.ZipFile(file) as archive:
        digest.update(archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl"))))
    size = max(PIECE_BYTES, piece_bytes(threads))  # tensors are made beside it, which want the interpreter's lock too
    for part in parts:
        for piece in pages.pieces(part.detach().reshape(-1).view(torch.uint8), size):
            digest.update(memoryview(piece.numpy()))
    return digest.hexdigest()


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
