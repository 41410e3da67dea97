"""What the ranks of a training run do to try snapshots of its full model; the results are files for pytest to look at.

OUT/<name>/published/ has run folders with snapshots, OUT/<name>.published.<rank>.json what each try came to on that
rank: the error, or None.  Every try is followed by a word of all ranks, so that one alone in a gathering would hang.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dsvllm.live import full_model
from hf_dsvllm.live import snapshot as snapshot_module
from hf_dsvllm.live.snapshot import publish
from hf_dsvllm.ranks import from_all
from hf_dsvllm.tensors.shard_writer import ShardWriter

BUCKET_BYTES = 1 << 15
FAILING = ("folder", "config", "first write", "later write", "not cast", "renamed")


def try_all(model: Any, out: Path, name: str) -> None:
    """The whole model streamed and by transformers alone; then failures at each point on rank 0, and a good end."""
    folder = out / name / "published"
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_module, "_GATHER_BYTES", BUCKET_BYTES)
        patch.setattr("hf_dsvllm.tensors.shard_file.SMALL_BYTES", 0)  # by several threads
        with patch.context() as slow:
            slow.setattr(full_model, "changes_names_alone", lambda *_: False)
            found["whole"] = one_try(model, folder / "whole")
        with patch.context() as watched:
            found["buckets"] = watch(watched, model)
            found["streamed"] = one_try(model, folder / "streamed")
        for case in FAILING:
            with patch.context() as failing:
                fail(failing, case)
                found[case] = one_try(model, folder / case)
        found["after all"] = one_try(model, folder / "after all")
    found["sharded"] = [name for name, parameter in model.named_parameters() if is_whole(parameter)]
    rank = os.environ["RANK"]
    (out / f"{name}.published.{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def one_try(model: Any, run_dir: Path) -> str | None:
    error = None
    try:
        publish(model, run_dir, step=1, dtype=torch.bfloat16)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    from_all(error)
    return error


def is_whole(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter that ZeRO-3 shards is gathered now, and not kept whole for being small."""
    return hasattr(parameter, "ds_id") and parameter.numel() > 0 and not parameter.ds_persist


def watch(patch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """The bytes of the parameters that are whole whenever rank 0 writes a bucket."""
    sizes: list[int] = []
    write = ShardWriter.write

    def noted(self: ShardWriter, tensors: Mapping[str, torch.Tensor]) -> None:
        sizes.append(sum(p.numel() * p.element_size() for p in model.parameters() if is_whole(p)))
        write(self, tensors)

    patch.setattr(ShardWriter, "write", noted)
    return sizes


def fail(patch: pytest.MonkeyPatch, case: str) -> None:
    """Let rank 0 meet a full disk at some point of a snapshot, or something nobody has thought of."""
    if os.environ["RANK"] != "0":
        return

    def full(*_: Any, **how: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pwrite, writes = os.pwrite, [0]

    def full_later(descriptor: int, data: Any, offset: int) -> int:
        writes[0] += 1
        return full() if writes[0] > 6 else pwrite(descriptor, data, offset)

    def surprise(*_: Any) -> Any:
        raise RuntimeError("this was not expected")

    if case == "folder":
        patch.setattr(snapshot_module, "atomic_folder", full)
    elif case == "config":
        patch.setattr("transformers.configuration_utils.PreTrainedConfig.save_pretrained", full)
    elif case == "renamed":
        patch.setattr("hf_dsvllm.files.os.rename", full)
    elif case == "not cast":
        patch.setattr("hf_dsvllm.tensors.shard_file.download", surprise)
    else:
        patch.setattr("hf_dsvllm.tensors.shard_file.os.pwrite", full if case == "first write" else full_later)
