"""Parameters whole on every rank, some decoder layers at a time, wherever ZeRO-3 keeps their parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hf_dsvllm.live.sources import Source

__all__ = ["gathered", "put_away"]


def put_away(deepspeed_engine: Any) -> None:
    """Let ZeRO-3 put away what a forward pass outside of training left gathered or on its way; after each of them.

    It fetches ahead in the order that it recorded, and a forward pass without a backward pass leaves that on its way:
    DeepSpeed (0.19.8) then neither gathers these weights nor lets go of them ("Cannot partition a param in flight"),
    so that nothing could be written.  The order is forgotten as well if this forward was the first it saw: training
    may take another, since TRL's loss reads the output head's weight without calling the head.  With an order recorded
    here the first backward pass of a model of more than `stage3_max_live_parameters` met a released weight (8B on an
    H200).  Other engines, and None, are left as they are.
    """
    optimizer = getattr(deepspeed_engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", None)
    if offload is None:
        return
    optimizer.empty_partition_cache()
    coordinator = offload.get_param_coordinator()
    if coordinator.is_record_trace():
        coordinator._invalidate_trace()  # as TRL does after its own generation: there is no public way


def gathered(parts: Iterable[Source], bucket_bytes: int) -> Iterator[list[Source]]:
    """`parts` in buckets whose parameters are whole on every rank while the consumer holds the bucket; COLLECTIVE."""
    for batch in _batches(parts, bucket_bytes):
        sharded = {id(p): p for part in batch for p in part.parameters if hasattr(p, "ds_id")}
        if not sharded:
            yield batch
            continue
        with contextlib.ExitStack() as whole:
            _gather(whole, list(sharded.values()))
            yield batch


def _gather(whole: contextlib.ExitStack, sharded: Sequence[Any]) -> None:
    """Parameters of ZeRO-3 whole until `whole` ends; those on NVMe one by one, through one of DeepSpeed's few buffers.

    A part that was read keeps its buffer until the parameter is let go, or, as DeepSpeed does for parameters that stay
    whole, until it is given back; a layer has more parameters than there are buffers (0.19.8 stops there).
    """
    import deepspeed

    on_drive = [each for each in sharded if getattr(each.ds_tensor, "final_location", None) == "nvme"]
    for parameter in on_drive:
        whole.enter_context(deepspeed.zero.GatheredParameters([parameter], modifier_rank=None))
        parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    ids = {id(each) for each in on_drive}
    if others := [each for each in sharded if id(each) not in ids]:
        whole.enter_context(deepspeed.zero.GatheredParameters(others, modifier_rank=None))


def _batches(parts: Iterable[Source], bucket_bytes: int) -> Iterator[list[Source]]:
    """Consecutive sources of one group (a decoder layer) stay together."""
    batch: list[Source] = []
    size = 0
    group: str | None = None
    for part in parts:
        if size >= bucket_bytes and (part.group is None or part.group != group):
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part.size_bytes
        group = part.group
    if batch:
        yield batch
