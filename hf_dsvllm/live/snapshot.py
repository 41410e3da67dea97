"""Live weights → a folder: an adapter as PEFT writes it, or a full model as transformers writes it.

Under ZeRO-3 every parameter is a shard; a plain `save_pretrained` writes empty tensors then.  Here they are gathered,
for adapters only the adapter's tensors.  `publish` is collective: every rank calls it, rank 0 writes.

A full model goes to its files bucket by bucket (`full_model`), and where there is room beside training (`behind`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from hf_dsvllm.adapters import vocabulary_was_resized
from hf_dsvllm.console import is_main_process, say
from hf_dsvllm.files import atomic_folder, write_json
from hf_dsvllm.live.full_model import let_go, refuse_empty, write_full
from hf_dsvllm.live.gather import gathered
from hf_dsvllm.live.sources import plain_source
from hf_dsvllm.ranks import from_main

__all__ = ["SNAPSHOTS", "Snapshot", "adapters_act", "point_to_latest", "prune", "publish"]

SNAPSHOTS = "snapshots"
LORA_OUTPUT = re.compile(r"\.lora_(embedding_)?B\.")  # PEFT: zero at the start, so that LoRA changes nothing
# Gathered at once under ZeRO-3: bounds the extra device memory while a full model is published.
_GATHER_BYTES = 1 << 30
# Written at once of parameters that lie here whole: that takes no memory, and more of it keeps the threads busy.
_WRITE_BYTES = 8 << 30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Weights of one optimizer step on disk; `path` exists on every rank's node-local view of the run folder."""

    path: Path
    kind: Literal["adapter", "full"]
    step: int


def adapters_act(model: Any) -> bool:
    """Whether the model has LoRA that changes it already: trained before, or B not zero from the start.

    Under ZeRO-3 by this rank's shards: ask every rank.
    """
    outputs = [p for name, p in model.named_parameters() if LORA_OUTPUT.search(name)]
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in outputs]
    return any(bool(tensor.any()) for tensor in held)


def publish(model: Any, run_dir: Path, *, step: int, dtype: torch.dtype, tokenizer: Any = None) -> Snapshot:
    """Write the weights of `model` (as the Trainer holds it, not the engine) to RUN/snapshots/step-<n>, atomically.

    Full models are written in `dtype`, adapters in the dtype they are trained in; NaN is written like any other value.
    A folder of the same step is replaced.  RUN/snapshots/latest.json points to the newest.

    Raises ExportError or OSError on rank 0 if a gathered tensor is empty or the disk is full, once every rank has done
    its part of the gathering.
    """
    adapter = hasattr(model, "peft_config")
    kind: Literal["adapter", "full"] = "adapter" if adapter else "full"
    target = run_dir / SNAPSHOTS / f"step-{step}"
    if adapter:
        _publish_adapter(model, target)
    else:
        _publish_full(model, target, dtype, tokenizer)
    snapshot = Snapshot(path=target, kind=kind, step=step)
    point_to_latest(run_dir, snapshot, trained_to=step)
    return snapshot


def point_to_latest(run_dir: Path, snapshot: Snapshot, *, trained_to: int) -> None:
    """Write RUN/snapshots/latest.json; rank 0 only.

    `trained_to` is the step training had reached: more than the snapshot's own where earlier weights were the best and
    training has ended with them.
    """
    if is_main_process():
        pointer = {"path": snapshot.path.name, "step": snapshot.step, "kind": snapshot.kind, "trained_to": trained_to}
        write_json(run_dir / SNAPSHOTS / "latest.json", pointer)


def prune(run_dir: Path, keep: Sequence[Path]) -> None:
    """Delete the snapshots that are neither in `keep` nor pointed to by latest.json or best.json; rank 0 only.

    Never raises.  Where a pointer cannot be read, nothing is deleted: it may be the best one's.
    """
    if not is_main_process():
        return
    folder = run_dir / SNAPSHOTS
    try:
        kept = {path.name for path in keep} | {_pointed_to(folder / name) for name in ("latest.json", "best.json")}
        for old in folder.glob("step-*"):
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"no older snapshot is deleted from {folder} this time: {type(error).__name__}: {error}")


def _pointed_to(pointer: Path) -> str | None:
    try:
        return str(json.loads(pointer.read_text(encoding="utf-8"))["path"])
    except FileNotFoundError:
        return None


# -- adapters -------------------------------------------------------------------------------------------------------


def _publish_adapter(model: Any, target: Path) -> None:
    state = _adapter_state(model)
    if is_main_process():
        refuse_empty(state)
        with atomic_folder(target, replace=True) as folder:
            _write_adapter(model, state, folder)


def _adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU of rank 0, under the names PEFT's own state dict uses; empty on other ranks.

    The names to keep are PEFT's choice: its filter is run on the names alone, before anything is gathered.  Embeddings
    of another vocabulary than the base's belong to the adapter, trained or not: nobody else has their rows.
    """
    from peft import get_peft_model_state_dict

    resized = from_main(vocabulary_was_resized(model) if is_main_process() else False)
    parameters = dict(model.named_parameters(remove_duplicate=not resized))  # a tied output head under both names
    names = {name: torch.tensor(position) for position, name in enumerate(parameters)}
    kept = get_peft_model_state_dict(model, state_dict=names, save_embedding_layers=resized)
    ordered = list(parameters)
    sources = {saved: ordered[int(position)] for saved, position in kept.items()}
    wanted = [plain_source(source, parameters[source]) for source in dict.fromkeys(sources.values())]
    whole = {
        part.name: part.make().to("cpu", copy=True)
        for batch in gathered(wanted, _GATHER_BYTES)
        for part in (batch if is_main_process() else ())  # the other ranks only take part
    }
    return {saved: whole[source] for saved, source in sources.items()} if is_main_process() else {}


def _write_adapter(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in state.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = model.peft_config[model.active_adapter if isinstance(model.active_adapter, str) else "default"]
    inference = config.inference_mode
    config.inference_mode = True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference


# -- full models ----------------------------------------------------------------------------------------------------


def _publish_full(model: Any, target: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    """Rank 0 writes what is gathered; whatever happens to it, every rank goes through every bucket."""
    parts = [plain_source(name, parameter) for name, parameter in model.named_parameters()]
    sharded = any(hasattr(parameter, "ds_id") for part in parts for parameter in part.parameters)
    buckets = gathered(parts, _GATHER_BYTES if sharded else _WRITE_BYTES)
    problem: Exception | None = None
    if is_main_process():
        try:
            with atomic_folder(target, replace=True) as folder:
                write_full(model, buckets, folder, dtype, tokenizer)
        except Exception as error:
            problem = error
            let_go(problem)
    for _ in buckets:  # the rest, or on the other ranks all
        pass
    if problem is not None:
        raise problem
