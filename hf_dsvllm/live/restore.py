"""A snapshot's weights back into the live model, whatever holds it: one process, DDP, ZeRO-1, 2 or 3."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import torch

from hf_dsvllm._compat import outside_zero3
from hf_dsvllm.console import is_main_process
from hf_dsvllm.errors import WiringError
from hf_dsvllm.ranks import from_main, is_distributed

__all__ = ["restore"]


def restore(model: Any, folder: Path, kind: Literal["adapter", "full"]) -> None:
    """Copy the weights in `folder` (as `snapshot.publish` wrote it) into `model`; collective, only rank 0 reads.

    For the end of training: DeepSpeed's fp32 master weights and moments stay as they were, and a further step would go
    on from those.  Raises WiringError on every rank, with the model untouched, when the
    snapshot cannot be read or has other tensors than the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values: dict[str, torch.Tensor] = {}
    error: str | None = None
    if is_main_process():
        try:
            values = _read(model, folder, kind)
        except Exception as problem:  # whatever it is, the other ranks wait for the names
            error = f"{type(problem).__name__}: {problem}"
    names, error = from_main((sorted(values), error))
    if error is not None:
        raise WiringError(f"{folder} cannot be read ({error}).")
    strange = [name for name in names if name not in parameters]
    if strange or not names:
        raise WiringError(f"{folder} does not belong to this model: it has {strange[:3] or 'no tensors at all'}.")
    for name in names:
        _set(parameters[name], values.pop(name, None))


def _read(model: Any, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Live parameter name -> tensor on the CPU; rank 0."""
    if kind == "adapter":
        return _read_adapter(model, folder)
    with outside_zero3():
        # transformers' own loader knows how the files' names became the model's (fused experts, tied heads).
        saved = type(model).from_pretrained(folder, dtype="auto", device_map=None)
    return {name: parameter.detach() for name, parameter in saved.named_parameters()}


def _read_adapter(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    live = list(dict(model.named_parameters()))
    positions = {name: torch.tensor(position) for position, name in enumerate(live)}
    kept = get_peft_model_state_dict(model, state_dict=positions, save_embedding_layers=False)
    saved = load_file(folder / "adapter_model.safetensors")
    return {live[int(position)]: saved[name] for name, position in kept.items() if name in saved}


def _set(parameter: torch.nn.Parameter, value: torch.Tensor | None) -> None:
    """Give `parameter` rank 0's `value` on every rank."""
    sharded = hasattr(parameter, "ds_id")
    with _whole(parameter) if sharded else contextlib.nullcontext(), torch.no_grad():
        if value is not None:
            parameter.data.copy_(value)  # casts to the live dtype and device
        if not sharded and is_distributed():
            torch.distributed.broadcast(parameter.data, src=0)


def _whole(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
