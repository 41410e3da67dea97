"""Live weights → a folder: an adapter as PEFT writes it, or a full model as transformers writes it.

Under ZeRO-3 every parameter is a shard; a plain `save_pretrained` writes empty tensors then.  Here they are gathered,
for adapters only the adapter's tensors.  `publish` is collective: every rank calls it, rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from hf_dsvllm.adapters import vocabulary_was_resized
from hf_dsvllm.console import is_main_process, say
from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import atomic_folder, write_json
from hf_dsvllm.live.sources import plain_source
from hf_dsvllm.live.stream import gathered
from hf_dsvllm.precision import Precision, held_in_fp32
from hf_dsvllm.ranks import from_main

__all__ = ["Snapshot", "adapters_act", "point_to_latest", "prune", "publish"]

SNAPSHOTS = "snapshots"
LORA_OUTPUT = re.compile(r"\.lora_(embedding_)?B\.")  # PEFT: zero at the start, so that LoRA changes nothing
# Gathered at once under ZeRO-3: bounds the extra device memory while a full model is published.
_GATHER_BYTES = 1 << 30


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

    Full models are written in `dtype`, adapters in the dtype they are trained in.  A folder of the same step is
    replaced.  RUN/snapshots/latest.json points to the newest.  Raises ExportError if a gathered tensor is empty.
    """
    adapter = hasattr(model, "peft_config")
    kind: Literal["adapter", "full"] = "adapter" if adapter else "full"
    target = run_dir / SNAPSHOTS / f"step-{step}"
    state = _adapter_state(model) if adapter else _full_state(model, dtype)
    if is_main_process():
        empty = [name for name, tensor in state.items() if tensor.numel() == 0]
        if empty:
            raise ExportError(f"snapshot of step {step}: {len(empty)} tensors are empty after gathering: {empty[:3]}")
        with atomic_folder(target, replace=True) as folder:
            if adapter:
                _write_adapter(model, state, folder)
            else:
                _write_full(model, state, folder, dtype, tokenizer)
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
    gathered = dict(_gathered({source: parameters[source] for source in sources.values()}))
    return {saved: gathered[source] for saved, source in sources.items()} if is_main_process() else {}


def _full_state(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers on the CPU of rank 0 in `dtype`; tied names share one tensor."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unique: dict[str, torch.nn.Parameter] = {}
    first_name: dict[int, str] = {}
    for name, parameter in parameters.items():
        if id(parameter) not in first_name:
            first_name[id(parameter)] = name
            unique[name] = parameter
    precision = Precision(dtype=dtype, held=held_in_fp32(model))
    state = {name: precision.cast(name, tensor) for name, tensor in _gathered(unique)}
    if not is_main_process():
        return {}
    persistent = set(model.state_dict().keys()) - set(parameters)
    buffers = {name: b.detach().cpu().clone() for name, b in model.named_buffers() if name in persistent}
    return {name: state[first_name[id(parameter)]] for name, parameter in parameters.items()} | buffers


def _gathered(parameters: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor on the CPU) for each parameter on rank 0; other ranks take part and yield nothing."""
    for batch in gathered((plain_source(name, p) for name, p in parameters.items()), _GATHER_BYTES):
        if is_main_process():
            for part in batch:
                yield part.name, part.make().cpu().clone()


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


def _write_full(model: Any, state: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    # The live model's dtype is the trainer's; the files hold `dtype`.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch."), "use_cache": True})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
