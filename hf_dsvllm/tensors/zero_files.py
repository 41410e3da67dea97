"""The files of a DeepSpeed ZeRO checkpoint: which they are, that they are of one save, and how they are opened."""

from __future__ import annotations

import pickle
import re
import types
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from hf_dsvllm.errors import ExportError

__all__ = ["check_files", "check_models", "files_of", "hash_header", "load", "saved_by", "step_folder"]

SAME_IN_EVERY_RANK = ("global_steps", "param_shapes", "frozen_param_shapes")  # keys of *_model_states.pt


def saved_by(files: Sequence[Path], optimizers: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
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


def check_files(folder: Path, stage: int, ranks: int, found: Sequence[Path]) -> None:
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


def check_models(files: Sequence[Path], models: Sequence[Mapping[str, Any]], ranks: int) -> None:
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


def step_folder(path: Path) -> Path:
    if path.name.startswith("global_step"):
        return path
    latest = path / "latest"
    if latest.is_file() and (path / latest.read_text(encoding="utf-8").strip()).is_dir():
        return path / latest.read_text(encoding="utf-8").strip()
    steps = sorted(path.glob("global_step*"), key=_natural)
    if not steps:
        raise ExportError(f"{path} has no DeepSpeed checkpoint: neither `latest` nor a folder global_step*.")
    return steps[-1]


def files_of(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern), key=_natural)
    if not files:
        raise ExportError(f"{folder} has no {pattern}: the checkpoint is not complete.")
    return files


def _natural(path: Path) -> list[int | str]:
    """rank_2 before rank_10"""
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path.name)]


def hash_header(file: Path, _threads: int) -> str:
    """BLAKE3 of the pickle in `file`, which says where every tensor belongs."""
    with zipfile.ZipFile(file) as archive:
        return blake3(archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))).hexdigest()


def load(file: Path) -> dict[str, Any]:
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
