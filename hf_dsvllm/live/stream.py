"""The trainer's weights as a stream of whole tensors, bucket by bucket, and that stream into a running engine.

Whatever shards them (ZeRO-3), quantises them (QLoRA) or stands beside them (adapters): a bucket is gathered,
dequantised, merged and renamed as a checkpoint has it, used, and let go.  The model is never gathered whole.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from hf_dsvllm.console import is_main_process
from hf_dsvllm.engine.bodies import TransferBackend, packed_forms
from hf_dsvllm.engine.client import EngineRefusal
from hf_dsvllm.engine.sync import SyncResult, WeightSync
from hf_dsvllm.errors import DsvllmError, EngineError
from hf_dsvllm.live.gather import gathered
from hf_dsvllm.live.sources import Source, conversions, sources, why_no_stream
from hf_dsvllm.precision import Precision, held_in_fp32
from hf_dsvllm.ranks import from_all, from_main, is_distributed
from hf_dsvllm.transfer import IpcTransfer, NcclTransfer, ipc
from hf_dsvllm.transfer.ipc import Handles, Parcel, merged_handles

__all__ = ["make_room", "meet", "send", "stream", "why_no_stream"]

T = TypeVar("T")
BUCKET_BYTES = 1 << 30
# By CUDA IPC each bucket is a request that training waits for, 11 to 17 ms (H200, vLLM 0.26); by NCCL they overlap.
LARGEST_BUCKET_BYTES = 4 << 30
WHOLE_MODEL = 1 << 62  # a bucket for parameters that need no copy
TIMEOUT_S = 300.0
MEET_S = 60.0


def stream(
    model: Any, *, dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES, merge_adapters: bool = False
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The weights of `model` on every rank, as (checkpoint name, whole tensor) in buckets; COLLECTIVE.

    Floating-point tensors come in `dtype`, on the device they are on.  Tied weights come once.  With `merge_adapters`
    LoRA is merged into what it adapts, otherwise adapters are left out; 4-bit layers are dequantised.  A decoder layer
    is never cut: a bucket ends with the layer that fills it.

    Tensors are valid until the next bucket is asked for.  Under ZeRO-3 every rank must iterate to the end.  Raises
    EngineError, on all ranks, if `why_no_stream` has a reason.
    """
    _must_stream(model, merge_adapters)
    revert = _reversion(model)
    precision = Precision(dtype=dtype, held=held_in_fp32(model))
    for batch in gathered(sources(model, merge_adapters=merge_adapters), bucket_bytes):
        yield _made(batch, precision, revert)


Reversion = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def _made(batch: list[Source], precision: Precision, revert: Reversion | None) -> list[tuple[str, torch.Tensor]]:
    with torch.no_grad():
        made = {part.name: precision.cast(part.name, part.make().detach()) for part in batch}
        return list((revert(made) if revert is not None else made).items())


def _reversion(model: Any) -> Reversion | None:
    """transformers' own way back from its modules to the checkpoint's names (fused experts, renamed modules)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not conversions(base):
        return None
    from transformers.core_model_loading import revert_weight_conversion

    return lambda made: revert_weight_conversion(base, made)


def _must_stream(model: Any, merge_adapters: bool) -> None:
    why = why_no_stream(model, merge_adapters=merge_adapters)
    if why is not None:
        raise EngineError(f"These weights cannot be streamed: {why}. They can go through a snapshot.")


# -- into the engine ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What rank 0 found out and all ranks follow; `error` stops everybody before anything is gathered.

    `gpus`: the UUIDs of those with a worker, where it is several by CUDA IPC.
    """

    path: TransferBackend | None = None
    why: str = ""
    error: str | None = None
    workers: int = 1
    gpus: tuple[str, ...] = ()

    @property
    def every_gpu(self) -> bool:
        """Whether ranks besides 0 have a worker on their GPU to give handles to."""
        return self.path == "ipc" and self.workers > 1

    def checked(self) -> _Plan:
        """The same on every rank, or an error on every one: each worker must find a rank on its GPU; collective."""
        if not self.every_gpu or self.error is not None:
            return self
        alone = sorted(set(self.gpus) - set(from_all(ipc.gpu_uuid())))
        if len(self.gpus) == self.workers and not alone:
            return self
        error = f"vLLM has {self.workers} workers, and no trainer's process is on {', '.join(alone) or 'some GPU'}"
        return dataclasses.replace(self, error=f"{error}: CUDA IPC needs one on each")


def send(
    model: Any,
    sync: WeightSync | None,
    *,
    step: int,
    dtype: torch.dtype,
    merge_adapters: bool = False,
    bucket_bytes: int = BUCKET_BYTES,
    timeout_s: float = TIMEOUT_S,
) -> SyncResult:
    """Stream the weights of `model` into the engine of `sync` (rank 0's; None elsewhere); COLLECTIVE.

    However it fails on rank 0, the other ranks go with it to the end, and all raise the same EngineError, naming
    `step`.  If the update had begun the server is marked: the next `push` starts it anew.  `timeout_s` bounds it all.
    """
    started = time.monotonic()
    deadline = started + timeout_s
    precision = Precision(dtype=dtype, held=held_in_fp32(model))
    staged = not _lies_ready(model, precision, merge_adapters)
    sender = _Sender(sync, staged=staged, deadline=deadline) if is_main_process() and sync is not None else None
    nobody = _Plan(error="the main process has no engine")
    plan = from_main(sender.plan(model, merge_adapters) if sender is not None else nobody).checked()
    if plan.error is None:
        _make_room(plan)
        plan = from_main(sender.begin(plan) if sender is not None else plan)
    if plan.error is not None:
        raise EngineError(f"step {step}: the weights could not be streamed to vLLM: {plan.error}")
    error: str | None = None
    try:
        size = bucket_bytes if plan.path == "nccl" else _roomy(bucket_bytes) if staged else WHOLE_MODEL
        revert = _reversion(model)
        failed = False
        for batch in gathered(sources(model, merge_adapters=merge_adapters), size):
            failed = failed or _hand_over(batch, plan, sender, precision, revert, staged)
    except Exception as problem:  # the others must hear of it, whatever it is
        error = _said(problem)
    _make_room(plan)
    outcome: SyncResult | str | None = None
    if sender is not None:
        outcome = sender.end(plan, error, started)
    errors = [said for said in [*from_all(error), from_main(outcome if isinstance(outcome, str) else None)] if said]
    if errors:
        raise EngineError(f"step {step}: the weights could not be streamed to vLLM: {errors[0]}")
    return from_main(outcome)


def meet(sync: WeightSync, *, timeout_s: float = MEET_S) -> None:
    """Connect to an idle engine's NCCL workers ahead of the first stream, whose stall would be 0.5 to 0.6 s longer.

    On rank 0 alone, between two steps.  Never raises: the stream tries again, and says why it cannot.
    """
    path, _ = sync.stream_path()
    if path != "nccl" or sync.connection is not None:
        return
    sender = _Sender(sync, staged=True, deadline=time.monotonic() + timeout_s)
    try:
        with sync.client.until(sender.deadline):
            sender.connect(_Plan(path=path, workers=sync.capabilities().world_size or 1))
    except Exception as problem:
        sender.begun = sender.begun or not isinstance(problem, EngineRefusal)  # it may wait inside the call for us
        sender.fail(problem)


def _hand_over(
    batch: list[Source],
    plan: _Plan,
    sender: _Sender | None,
    precision: Precision,
    revert: Reversion | None,
    staged: bool,
) -> bool:
    """One bucket on one rank: handles come from every rank whose GPU has a worker, requests from rank 0 alone.

    True, on every rank that exports, once rank 0 has failed: then nobody would open another handle.
    """
    if not plan.every_gpu:
        if sender is not None:
            sender.send(lambda: _made(batch, precision, revert))
        return False
    exports = ipc.gpu_uuid() in plan.gpus
    handles: Handles | None = None
    parcel, said = _tried(
        lambda: Parcel(_made(batch, precision, revert), staged=staged) if exports or sender is not None else None
    )
    if not any(from_all(said)):
        handles, said = _tried(lambda: parcel.export() if exports and parcel is not None else None)
    offered = from_all((handles, said))
    if sender is not None:
        found = [theirs for theirs, _ in offered if theirs is not None]
        sender.deliver(plan, parcel, found, next((why for _, why in offered if why), None))
    # The memory behind the handles, which is the parcel's, stays until rank 0 has its answer.
    return bool(from_main(sender is not None and sender.failure is not None))


def _tried(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `work` returns, or why it failed."""
    try:
        return work(), None
    except Exception as problem:  # the other ranks wait for the word of it
        return None, _said(problem)


class _Sender:
    """Rank 0's part: talks to the server, and after a failure does nothing more but keep its reason."""

    def __init__(self, sync: WeightSync, *, staged: bool, deadline: float) -> None:
        self.sync = sync
        self.staged = staged
        self.deadline = deadline
        self.failure: str | None = None
        self.begun = False
        self._transfer: IpcTransfer | NcclTransfer | None = None

    def plan(self, model: Any, merge_adapters: bool) -> _Plan:
        """Whether and how, before anything changes."""
        try:
            with self.sync.client.until(self.deadline):
                path, why = self.sync.stream_path()
                refused = why if path is None else why_no_stream(model, merge_adapters=merge_adapters)
                if path is None or refused is not None:
                    return _Plan(error=refused)
                workers = self.sync.capabilities().world_size or 1
            if path != "ipc" or workers == 1:
                return _Plan(path=path, why=why, workers=workers)
            if workers > _processes():
                return _Plan(
                    error=f"vLLM has {workers} GPUs and the trainer {_processes()}: CUDA IPC needs one on each"
                )
            gpus = ipc.worker_uuids(self.sync.server.spec.visible_devices, workers)
            return _Plan(path=path, why=why, workers=workers, gpus=gpus)
        except Exception as problem:
            return _Plan(error=_said(problem))

    def begin(self, plan: _Plan) -> _Plan:
        """Everything up to the first tensor; the same plan, or the error."""
        assert plan.path is not None
        try:
            with self.sync.client.until(self.deadline):
                self.sync.begin_stream()
                self.connect(plan)
                self.begun = True
                with self.sync.phase("start"):
                    self.sync.client.start_weight_update()
        except Exception as problem:
            self.fail(problem)
            return _Plan(error=self.failure)
        return plan

    def connect(self, plan: _Plan) -> None:
        """To the workers, unless it was done before."""
        assert plan.path is not None
        self.begun = plan.workers > 1  # what several workers refuse leaves them out of step: see packed_forms
        self._transfer = self._connection(plan.path, plan.workers)
        with self.sync.phase("connect"):
            self._transfer.open(deadline=self.deadline)

    def _connection(self, path: TransferBackend, workers: int) -> IpcTransfer | NcclTransfer:
        """The connection of the stream before, if it still fits, or a new one."""
        kept = self.sync.connection
        forms = packed_forms(path, self.sync.capabilities().version, workers)
        if path == "nccl":
            found = kept if isinstance(kept, NcclTransfer) else None
            made: IpcTransfer | NcclTransfer = found or NcclTransfer(self.sync.client, workers=workers, forms=forms)
        else:
            fits = kept if isinstance(kept, IpcTransfer) and kept.staged == self.staged else None
            made = fits or IpcTransfer(self.sync.client, staged=self.staged, forms=forms)
        self.sync.connection = made
        return made

    def send(self, make: Callable[[], list[tuple[str, torch.Tensor]]]) -> None:
        """Make a bucket and hand it over, unless something has failed before."""
        if self.failure is not None or self._transfer is None:
            return
        try:
            with self.sync.phase("update"):
                self._transfer.send(make(), deadline=self.deadline)
        except Exception as problem:
            self.fail(problem)

    def deliver(self, plan: _Plan, parcel: Parcel | None, handles: list[Handles], said: str | None) -> None:
        """The same with handles of several GPUs."""
        if self.failure is not None:
            return
        if said is not None or parcel is None or len(handles) < plan.workers:
            self.fail(EngineError(said or "a rank could not offer its tensors"))
            return
        try:
            assert isinstance(self._transfer, IpcTransfer)
            with self.sync.phase("update"):
                self._transfer.deliver(parcel, merged_handles(handles), deadline=self.deadline)
        except Exception as problem:
            self.fail(problem)

    def end(self, plan: _Plan, error: str | None, started: float) -> SyncResult | str:
        """Finish the update and wake the rest; the reason if that, or anything before it, failed."""
        if error is not None:
            self.fail(EngineError(error))
        if self.failure is not None or plan.path is None or self._transfer is None:
            return self.failure or "nothing was sent"
        try:
            with self.sync.client.until(self.deadline):
                with self.sync.phase("update"):
                    self._transfer.drain(deadline=self.deadline)
                with self.sync.phase("finish"):
                    self.sync.client.finish_weight_update()
                return self.sync.end_stream(plan.path, plan.why, started)
        except Exception as problem:
            self.fail(problem)
            return self.failure or ""

    def fail(self, problem: Exception) -> None:
        """Keep the reason of the first failure, and let go of the engine."""
        if self.failure is None:
            self.failure = _said(problem)
            self.sync.break_off(self.failure, begun=self.begun)


def make_room(*, everywhere: bool = True) -> None:
    """Give cached memory back before vLLM wakes on the same GPU: torch keeps what training no longer needs.

    `everywhere`: on the GPU of each rank before any goes on, for rank 0 wakes the workers of all; COLLECTIVE.
    """
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
    if everywhere:
        from_all(None)


def _make_room(plan: _Plan) -> None:
    if plan.path == "ipc":
        make_room(everywhere=plan.every_gpu)


def _roomy(bucket_bytes: int) -> int:
    """A larger bucket where every GPU has room for eight (it is made, packed and cloned by vLLM); collective."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return max(bucket_bytes, min(LARGEST_BUCKET_BYTES, min(from_all(free)) // 8))


def _lies_ready(model: Any, precision: Precision, merge_adapters: bool) -> bool:
    """Whether every tensor can be read where it lies: whole, in its dtype, under its own name, on a GPU."""
    if hasattr(model, "peft_config") or merge_adapters or _reversion(model) is not None:
        return False
    return all(
        p.is_cuda and p.is_contiguous() and p.dtype == precision.of(name, p.dtype) and not hasattr(p, "ds_id")
        for name, p in model.named_parameters()
    )


def _said(problem: Exception) -> str:
    return str(problem) if isinstance(problem, DsvllmError) else f"{type(problem).__name__}: {problem}"


def _processes() -> int:
    return torch.distributed.get_world_size() if is_distributed() else 1
