"""Weights to a vLLM on other GPUs of this host by NCCL: one broadcast for each bucket, packed into one buffer.

While the workers load a bucket the trainer gathers the next: `send` returns as soon as its copy is made, and waits for
the one before.  Whatever may block for ever (NCCL, HTTP) runs on daemon threads; the caller waits with a deadline.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from hf_dsvllm.engine.bodies import PackedIn, init_info, update_info
from hf_dsvllm.engine.client import EngineClient, EngineRefusal
from hf_dsvllm.errors import EngineError
from hf_dsvllm.transfer.base import Bucket, described, in_background, left_of, packed, synchronise, wait_for
from hf_dsvllm.transfer.libnccl import Nccl
from hf_dsvllm.transfer.meeting import LOOPBACK, Meeting

__all__ = ["NcclTransfer"]


class NcclTransfer:
    """Rank 0's end of the communicator; made on the device that holds the weights, the current one."""

    def __init__(self, client: EngineClient, *, workers: int, forms: Sequence[PackedIn]) -> None:
        """`workers`: members on the server's side; `forms`: how it may be told that buckets are packed, in order."""
        self.client = client
        self._forms = forms
        self.world_size = 1 + workers
        self._nccl: Nccl | None = None
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._stream = torch.cuda.Stream(self._device) if self._device is not None else None
        self._communicator: int | None = None
        self._packed_in: PackedIn | None = None
        self._under_way: tuple[concurrent.futures.Future[None], concurrent.futures.Future[None]] | None = None

    def open(self, *, deadline: float) -> None:
        """Meet the workers; a form of init that the server refuses is followed by the next one."""
        if self._communicator is not None:
            return
        if self._nccl is None:
            self._nccl = Nccl()
        refusals: list[EngineRefusal] = []
        for form in self._forms:
            meeting = Meeting(self.world_size, left_of(deadline))
            joined = in_background(lambda meeting=meeting: self._join(meeting, deadline), "dsvllm-nccl-join")
            rendezvous = {
                "master_address": LOOPBACK,
                "master_port": meeting.port,
                "rank_offset": 1,
                "world_size": self.world_size,
            }
            try:
                self.client.init_weight_transfer(init_info("nccl", form, rendezvous), timeout_s=left_of(deadline))
            except EngineRefusal as refusal:
                if meeting.someone_came:
                    raise  # the form was right, something else is not
                meeting.call_off()
                refusals.append(refusal)
                continue
            except EngineError:
                meeting.call_off()
                raise
            communicator = wait_for(joined, "Joining the engine's NCCL communicator", deadline=deadline)
            if communicator is None:
                raise EngineError("vLLM says its workers are connected by NCCL, but none came to the meeting point.")
            self._communicator, self._packed_in = communicator, form
            return
        why = "; ".join(map(str, refusals))
        raise EngineRefusal(f"vLLM refused to take weights by NCCL: {why}", refusals[-1].status)

    def _join(self, meeting: Meeting, deadline: float) -> int | None:
        assert self._nccl is not None
        if not meeting.wait_for_someone(deadline):
            return None
        identity = self._nccl.unique_id()
        meeting.announce(identity)
        with self._on_device():
            communicator: int = self._nccl.join(identity, rank=0, world_size=self.world_size)
            one = torch.zeros(1, device=self._device)
            synchronise(self._device)
            self._nccl.add_one_float(one.data_ptr(), communicator, self._stream_number())
            self._finish_stream()
        return communicator

    def send(self, bucket: Bucket, *, deadline: float) -> None:
        """Pack a copy of the bucket, wait for the bucket before it, and let this one go."""
        buffer, ordered = packed(bucket)
        tensors = described(ordered, sizes=False)
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        self.drain(deadline=deadline)
        body = update_info("nccl", self._packed_in, tensors)
        told = in_background(
            lambda: self.client.update_weights(body, timeout_s=left_of(deadline)), "dsvllm-update-weights"
        )
        sent = in_background(lambda: self._broadcast(buffer, ready), "dsvllm-nccl-broadcast")
        self._under_way = (told, sent)

    def _broadcast(self, buffer: torch.Tensor, ready: Any) -> None:
        assert self._nccl is not None
        assert self._communicator is not None
        with self._on_device():
            if self._stream is not None:
                self._stream.wait_event(ready)
            self._nccl.broadcast_bytes(buffer.data_ptr(), buffer.nbytes, self._communicator, self._stream_number())
            self._finish_stream()
        # `buffer` lives until here: this frame holds it.

    def drain(self, *, deadline: float) -> None:
        """Wait for the bucket under way."""
        if self._under_way is None:
            return
        (told, sent), self._under_way = self._under_way, None
        concurrent.futures.wait((told, sent), timeout=left_of(deadline), return_when=concurrent.futures.FIRST_EXCEPTION)
        ends = ((told, "POST /update_weights, while NCCL sends,"), (sent, "The NCCL broadcast"))
        # Where one end has failed the other may hang for ever, so those that are done speak first.
        for future, what in sorted(ends, key=lambda end: not end[0].done()):
            wait_for(future, what, deadline=deadline)

    def close(self) -> None:
        """Cut the communicator off, on a thread: ncclCommAbort may wait for kernels that wait for a dead peer."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            in_background(lambda: self._abort(communicator), "dsvllm-nccl-abort")

    def _abort(self, communicator: int) -> None:
        assert self._nccl is not None
        with self._on_device(), contextlib.suppress(EngineError):
            self._nccl.abort(communicator)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._device is None else torch.cuda.device(self._device)

    def _stream_number(self) -> int:
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    def _finish_stream(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
