"""The weights of one step into the engine of a run, the engine kept alive for it, and the proof that they are there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from hf_dsvllm.console import say
from hf_dsvllm.engine.client import EngineClient
from hf_dsvllm.engine.remote import RemoteServer
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.engine.sync import SyncResult, WeightSync
from hf_dsvllm.errors import EngineError
from hf_dsvllm.evaluation.canary import Canary, LogProbs, WrongWeights
from hf_dsvllm.export.adapter_format import servable_adapter
from hf_dsvllm.export.merged_copy import merged_copy, same_shape
from hf_dsvllm.export.source import local_base
from hf_dsvllm.live.snapshot import Snapshot
from hf_dsvllm.live.stream import meet
from hf_dsvllm.tensors.fourbit import beside_training

__all__ = ["FREE", "GONE", "STARTING", "Asked", "Delivery"]

FREE, STARTING, GONE = "is free", "is still starting", "does not run"  # what an engine may be found to do
WAKE_S = 30.0
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An evaluation to be made of the weights of `step`.

    They are in `snapshot`, or in the engine already (`sent`), or those the engine started from (neither).  `ours` are
    the trainer's log-probabilities of the canary's prompts at that step, None where it cannot be asked.
    `publish_seconds`: what training has spent on it, `phases` by part.  `now` tells the step training has reached
    meanwhile; `late`: training goes on meanwhile.
    """

    step: int
    snapshot: Snapshot | None = None
    sent: SyncResult | None = None
    ours: LogProbs | None = None
    publish_seconds: float = 0.0
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    now: Callable[[], int] | None = None
    late: bool = False


class Delivery:
    """Rank 0's way to the engine.  `merge_base`: adapters are merged into this folder's weights for it."""

    def __init__(
        self,
        server: EngineServer | RemoteServer,
        *,
        run_dir: Path,
        timeout_s: float,
        merge_base: Path | None = None,
        canary: Canary | None = None,
    ) -> None:
        """`timeout_s` bounds a start of the engine and each call; `canary` None proves nothing.

        An engine started with `sleep_mode` sleeps after each evaluation.
        """
        self.server = server
        self.run_dir = run_dir
        self.timeout_s = timeout_s
        self.merge_base = merge_base
        self.canary = canary
        self.proof_seconds = 0.0  # of the last proof
        self.sleep_seconds: float | None = None  # of the last sleep, None where the engine does not sleep now
        self.client = EngineClient(server.uds, default_timeout_s=timeout_s)
        self.sync = WeightSync(server, self.client, restart_timeout_s=timeout_s)
        self._first_model: Path | str | None = None if isinstance(server, RemoteServer) else server.spec.model

    def wait_ready(self) -> None:
        """Wait for the engine; one that died is started once more, with what has most room to come up."""
        try:
            self.server.wait_ready(self.timeout_s)
        except EngineError as failed:
            if self.server.alive or isinstance(self.server, RemoteServer):
                raise
            spec = self.server.spec
            self.server.restart(model=self._first_model, simple=True)
            if self.server.spec != spec:
                say(f"vLLM is started once more, one copy of it with the usual cache and no compiled code: {failed}")
            self.client.connect(self.server.uds)
            self.server.wait_ready(self.timeout_s)

    def deliver(self, asked: Asked) -> tuple[SyncResult, str | None]:
        """The weights asked for into the engine, proven; how they got there, and the sentence of the proof.

        Weights that turn out to be others are sent once more to an engine started anew.  EngineError if they cannot be
        brought there or proven; what was streamed goes by disk from then on.
        """
        with beside_training() if asked.late else contextlib.nullcontext():
            return self._deliver(asked)

    def _deliver(self, asked: Asked) -> tuple[SyncResult, str | None]:
        self.proof_seconds = 0.0
        pushed = asked.sent or self._push(asked.snapshot)
        if asked.ours is None or self.canary is None:
            return pushed, None
        try:
            return pushed, self._prove(self.canary, pushed, asked.ours)
        except EngineError as refused:
            if asked.sent is not None and isinstance(refused, WrongWeights):
                self.sync.distrust_streams(str(refused))
            if asked.snapshot is None or isinstance(self.server, RemoteServer):
                raise
            say(f"step {asked.step}: {refused} The engine is started anew.")
            self._restart()
            self.server.wait_ready(self.timeout_s)
            pushed = self._push(asked.snapshot)
            return pushed, self._prove(self.canary, pushed, asked.ours)

    def _prove(self, canary: Canary, pushed: SyncResult, ours: LogProbs) -> str:
        started = time.monotonic()
        spec = self.server.spec
        at_once = spec.max_lora_rank is None and not isinstance(self.server, RemoteServer)  # a stranger may serve some
        how = {"copies": spec.data_parallel_size, "at_once": at_once, "generation": pushed.generation}
        sentence = canary.prove(self.client, pushed.model_name, ours, **how)
        self.proof_seconds = time.monotonic() - started
        return sentence

    @contextlib.contextmanager
    def waking(self) -> Iterator[None]:
        """Give a sleeping engine's weights their memory while the block runs: 0.13 to 0.17 s for 8B on an H200.

        A failure is the stream's to find: it wakes what sleeps.
        """
        thread: threading.Thread | None = None
        if self.server.alive and self.sync.asleep:
            thread = threading.Thread(target=self._wake_early, name="waking", daemon=True)
            thread.start()
        try:
            yield
        finally:
            if thread is not None:
                thread.join()

    def _wake_early(self) -> None:
        try:
            with self.client.until(time.monotonic() + WAKE_S):
                self.sync.wake_early()
        except EngineError as error:
            logger.info("vLLM could not be woken beside the trainer's canary: %s", error)

    def revive(self) -> None:
        """After a failure, start an engine that died or hangs again at once: it loads while training goes on.

        Where training has its GPU's memory between evaluations it is ended, and the next evaluation starts it.
        """
        if self.server.alive and self.client.health():
            return
        with contextlib.suppress(EngineError):  # the next evaluation tries once more, and says why it cannot
            if self.sleeps:
                self.server.stop()
            else:
                self._restart()

    @property
    def sleeps(self) -> bool:
        """Whether the engine was started to sleep between evaluations."""
        return not isinstance(self.server, RemoteServer) and self.server.spec.sleep_mode

    @property
    def processes(self) -> tuple[int, ...]:
        """The process numbers of an engine of ours that runs; its workers are below them."""
        pid = None if isinstance(self.server, RemoteServer) else self.server.pid
        return () if pid is None else (pid,)

    @property
    def state(self) -> str:
        """FREE, STARTING or GONE: dead, or silent for longer than a start may take; then it has to be started anew."""
        with contextlib.suppress(EngineError):  # stopped meanwhile
            if self.server.alive:
                if self.server.answers():
                    return FREE
                if isinstance(self.server, EngineServer) and self.server.age_seconds < self.timeout_s:
                    return STARTING
        return GONE

    def rest(self) -> None:
        """After an evaluation, whatever came of it: the GPU's memory back to training, if the engine was started so.

        One that lacks the means stays awake; one that is in no state to sleep is ended until the next evaluation.
        What the engine can do is asked here, and not in the stall of the first stream: it took 1.0 to 1.4 s.
        """
        self.sleep_seconds = None
        if isinstance(self.server, RemoteServer) or not self.server.alive:
            return
        if not self.sleeps:
            if self.server.spec.weight_transfer is not None:
                self.sync.stream_path()
            return
        started = time.monotonic()
        try:
            awake = self.sync.rest()
            if awake is None:
                self.sleep_seconds = time.monotonic() - started
                return
            if self.sync.whole:
                say(f"vLLM stays awake beside training: {awake}")
                return
        except EngineError as error:
            awake = str(error)
        say(f"vLLM cannot sleep and is ended until the next evaluation: {awake}")
        try:
            self.server.stop()
        except EngineError as error:
            logger.warning("%s", error)

    def meet(self) -> None:
        """After a late evaluation, between two steps: connect for the streams to come, if they go by NCCL."""
        if self.server.spec.weight_transfer == "nccl":
            meet(self.sync)

    def rest_until_asked(self) -> None:
        """At the start of training, where nothing is asked yet: wait until the engine is there, for it to sleep."""
        if not self.sleeps:
            return
        try:
            self.wait_ready()
        except EngineError as error:
            say(f"vLLM is not ready, which the first evaluation tries again: {error}")
            self.revive()
        self.rest()

    def close(self) -> None:
        """Stop the engine for good, or leave one that is not ours."""
        try:
            self.client.close()
        finally:
            self.server.close()

    def _restart(self, model: Path | str | None = None) -> None:
        """By default from the first model: a snapshot that it was restarted from may be gone or broken by now."""
        self.server.restart(model=self._first_model if model is None else model)
        self.client.connect(self.server.uds)

    def _push(self, snapshot: Snapshot | None) -> SyncResult:
        if snapshot is None:
            name, why = self.server.spec.served_name, "the untrained model the engine started from"
            return SyncResult(model_name=name, path_used="start", why=why, seconds=0)
        if snapshot.kind == "full":
            return self.sync.push(snapshot.path, "full", snapshot.step)
        if self.merge_base is not None:
            return self._push_merged(snapshot, self.merge_base)
        folder = servable_adapter(snapshot.path, self.run_dir / "engine" / "adapter")
        return self.sync.push(folder, "adapter", snapshot.step)

    def _push_merged(self, snapshot: Snapshot, base: Path) -> SyncResult:
        started = time.monotonic()
        served = self.server.spec.dtype
        dtype = torch.bfloat16 if served == "auto" else getattr(torch, served)
        folder = merged_copy(base, snapshot.path, self.run_dir / "engine" / "merged", dtype=dtype)
        if isinstance(self.server, EngineServer):
            spec = self.server.spec
            if not same_shape(folder, local_base(str(spec.model), spec.revision)):
                self._restart(folder)
                self.server.wait_ready(self.timeout_s)
        pushed = self.sync.push(folder, "full", snapshot.step)
        path = f"merge + {pushed.path_used}"
        return dataclasses.replace(pushed, path_used=path, seconds=time.monotonic() - started)
