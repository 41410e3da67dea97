"""Weights to a vLLM on the same GPU by CUDA IPC: the workers map the trainer's memory and copy out of it.

Two ways.  Parameters that lie whole and in the engine's dtype in the trainer's memory are sent as they are, in one
request, nothing copied on our side.  Others (gathered, cast, merged: they live for one bucket) are packed into a
buffer: vLLM clones from that before it answers, while of single tensors it may hold on to some until the update is
finished (padded vocabularies, for one).
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.multiprocessing.reductions import reduce_tensor

from hf_dsvllm.engine.bodies import PackedIn, init_info, update_info
from hf_dsvllm.engine.client import EngineClient, EngineRefusal
from hf_dsvllm.errors import EngineError
from hf_dsvllm.placement import visible_gpus
from hf_dsvllm.transfer.base import Bucket, described, left_of, packed, synchronise

__all__ = ["Handles", "IpcTransfer", "Parcel", "gpu_uuid", "merged_handles", "worker_uuids"]

# Arguments of torch's rebuild_cuda_tensor by GPU UUID: a list for single tensors, one entry for a packed buffer.
Handle: TypeAlias = dict[str, tuple[Any, ...]]
Handles: TypeAlias = list[Handle]


class Parcel:
    """A bucket as this rank offers it: the memory its handles point to, kept as long as the parcel."""

    def __init__(self, bucket: Bucket, *, staged: bool) -> None:
        """`staged` packs copies; otherwise the tensors themselves are offered.  Every rank with a worker makes one."""
        if staged:
            buffer, bucket = packed(bucket)
            self.memory = [buffer]
        else:
            self.memory = [tensor.detach().contiguous() for _, tensor in bucket]
        self.tensors = described(bucket, sizes=staged)
        self.staged = staged

    def export(self) -> Handles:
        """Handles for a worker that will surely be told of them: memory whose handle nobody opens is never freed.

        A fresh export each time: torch counts one reader for each, and the workers give each back once.
        """
        owner = gpu_uuid()
        handles: Handles = [{owner: reduce_tensor(tensor)[1]} for tensor in self.memory]
        synchronise()
        return handles


def gpu_uuid(index: int | None = None) -> str:
    """The UUID of this process's GPU, or of the one it sees as `index`, as vLLM's workers spell their own."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index).uuid)


def worker_uuids(visible_devices: str | None, workers: int) -> tuple[str, ...]:
    """The UUIDs of the GPUs that `workers` of a server use: the first of its CUDA_VISIBLE_DEVICES, None for ours."""
    ours = visible_gpus()
    theirs = ours if visible_devices is None else visible_devices.split(",")
    return tuple(gpu_uuid(ours.index(gpu)) for gpu in theirs[:workers])


def merged_handles(ranks: Sequence[Handles]) -> Handles:
    """The same tensors on several GPUs: one handle for each GPU, so that every worker finds its own."""
    return [{uuid: args for handle in same for uuid, args in handle.items()} for same in zip(*ranks, strict=True)]


class IpcTransfer:
    """Rank 0's end: needs no rendezvous, only the form in which this server wants to be told."""

    def __init__(self, client: EngineClient, *, staged: bool, forms: Sequence[PackedIn]) -> None:
        """`staged`: buckets come packed (see the top of this file); in which of the `forms` is settled on `open`."""
        self.client = client
        self.staged = staged
        self._forms = forms
        self._packed_in: PackedIn | None = None
        self._opened = False

    def open(self, *, deadline: float) -> None:
        """Tell the server whether buckets come packed; a form that it refuses is followed by the next one."""
        if self._opened:
            return
        forms: Sequence[PackedIn | None] = self._forms if self.staged else (None,)
        refusals: list[EngineRefusal] = []
        for form in forms:
            try:
                self.client.init_weight_transfer(init_info("ipc", form), timeout_s=left_of(deadline))
            except EngineRefusal as refusal:
                refusals.append(refusal)
                continue
            self._packed_in, self._opened = form, True
            return
        why = "; ".join(map(str, refusals))
        raise EngineRefusal(f"vLLM refused to take weights by CUDA IPC: {why}", refusals[-1].status)

    def send(self, bucket: Bucket, *, deadline: float) -> None:
        """Offer a bucket of this rank's GPU alone, and wait until the server has it."""
        self.deliver(Parcel(bucket, staged=self.staged), deadline=deadline)

    def deliver(self, parcel: Parcel, handles: Handles | None = None, *, deadline: float) -> None:
        """Send `parcel` with the `handles` of all ranks (default: its own); it must be kept until this returns.

        Parcels that are not staged must be kept until the update is finished: see the top of this file.
        """
        chosen = parcel.export() if handles is None else handles
        body = update_info("ipc", self._packed_in, parcel.tensors, handles=pickled(chosen, packed=parcel.staged))
        self.client.update_weights(body, timeout_s=left_of(deadline))

    def drain(self, *, deadline: float) -> None:
        """Nothing to wait for: each request is answered when the workers have taken it."""
        if time.monotonic() > deadline:
            raise EngineError("The weights were not sent in time.")

    def close(self) -> None:
        """Give back memory whose readers are done."""
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()


def pickled(handles: Sequence[Mapping[str, tuple[Any, ...]]], *, packed: bool) -> str:
    """Handles as vLLM reads them over HTTP: base64 of a pickle, of one handle if packed, else of the list."""
    return base64.b64encode(pickle.dumps(dict(handles[0]) if packed else [dict(one) for one in handles])).decode()
