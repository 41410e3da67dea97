"""Bringing the trainer's weights into the running engine, by the cheapest path that works, and saying which it was.

Paths by way of a folder (`push`) need only rank 0; the stream without one is collective: `live_weights.send`, which
calls `begin_stream`, `end_stream` and `break_off` here.  Sleep goes around both: `rest` after an evaluation; a push or
a stream wakes what it needs, in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

from hf_dsvllm.engine.bodies import TransferBackend
from hf_dsvllm.engine.capabilities import Capabilities, probe
from hf_dsvllm.engine.client import EngineClient, EngineRefusal
from hf_dsvllm.engine.remote import RemoteServer
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.errors import EngineError

__all__ = ["SyncPath", "SyncResult", "WeightSync"]

SyncPath = Literal["hot-load", "reload", "restart", "ipc", "nccl"]
# awake: answers; weights gone: asleep at level 2; asleep: level 1; no cache: weights are there again, the cache is not
State = Literal["awake", "asleep", "weights gone", "weights due", "no cache"]
# After so many streams that failed in a row files are used: each failure may cost a start of the server.
STREAM_FAILURES = 2
RESUME_S = 10.0
SLEEP_S = 120.0  # level 1 took up to 12 s; one that hangs must not hold training up for a whole evaluation's deadline
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """`model_name` is what to ask for now; `path_used` and `why` say how the weights got there.

    `generation` counts the starts of the server: after it changed, the weights have to be proven again.  `phases` are
    seconds by name (wake weights, start, update, finish, wake cache, reset), as far as the path has them.
    """

    model_name: str
    path_used: str
    why: str
    seconds: float
    generation: int = 0
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Connection(Protocol):
    """What stays open to the workers between two streams, such as an NCCL communicator."""

    def close(self) -> None:
        """Give it up; never raises, never blocks."""


class WeightSync:
    """Pushes snapshots into one server; the previous snapshot's folder may be deleted once `push` has returned."""

    def __init__(
        self, server: EngineServer | RemoteServer, client: EngineClient, *, restart_timeout_s: float = 900.0
    ) -> None:
        """`restart_timeout_s` bounds a restart, the last resort."""
        self.server = server
        self.client = client
        self.restart_timeout_s = restart_timeout_s
        self.generation = 0
        self.connection: Connection | None = None
        self.broken: str | None = None
        self.phases: dict[str, float] = {}
        self._early: dict[str, float] = {}  # phases of the next stream that are over
        self._capabilities: Capabilities | None = None
        self._state: State = "awake"
        self._adapter: str | None = None
        self._pushes = 0
        self._paused = False
        self._stream_failures = 0
        self._distrusted: str | None = None
        self._address = self._where()

    # -- what the server can do ------------------------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        """What the running server can do; asked once after each start.  Raises EngineError if it does not answer."""
        self._follow()
        if self._capabilities is None:
            self._capabilities = probe(self.client, self.server.spec)
        return self._capabilities

    def stream_path(self) -> tuple[TransferBackend | None, str]:
        """How weights can go to this server without a folder, or None, and why."""
        self._follow()
        if self.broken is not None:
            return None, f"the server has to be started again first: {self.broken}"
        if self._distrusted is not None:
            return None, f"weights came out wrong by a stream: {self._distrusted}"
        if self._stream_failures >= STREAM_FAILURES:
            return None, f"{self._stream_failures} streams in a row failed"
        try:
            found = self.capabilities()
        except EngineError as error:
            return None, f"the server does not answer: {error}"
        if found.transfer is None:
            return None, found.lacks["transfer"]
        if found.transfer == "nccl" and found.world_size is None:
            return None, "the server does not say how many workers it has (/get_world_size)"
        if self.server.spec.max_lora_rank is not None and not found.replaces_base_under_adapters:
            return None, f"vLLM {found.version} cannot replace the base while it serves adapters (0.28 and newer can)"
        way = "CUDA IPC on the same GPU" if found.transfer == "ipc" else "NCCL to another GPU"
        return found.transfer, f"the server (vLLM {found.version}) takes weights by {way}"

    # -- by way of a folder ----------------------------------------------------------------------------------------

    def push(self, snapshot_path: Path, kind: Literal["adapter", "full"], step: int) -> SyncResult:
        """Make the engine answer with the weights in `snapshot_path` (a PEFT adapter or a safetensors model folder).

        Adapters are loaded under a fresh name before the previous one goes; full weights are reloaded in place and the
        prefix cache is reset.  A sleeping engine is woken.  If the engine is dead or broken, or a reload fails (it may
        have left half-written weights), the server is restarted.  Raises EngineError when that fails too, or when vLLM
        refuses the adapter.
        """
        started = time.monotonic()
        self._follow()
        self.phases = {}
        self._pushes += 1
        if kind == "adapter":
            name = f"{self.server.adapter_prefix}step-{step}-{self._pushes}"
            name, path_used, why = self._push_adapter(snapshot_path, name)
        else:
            name, path_used, why = self._push_full(snapshot_path)
        return self._result(name, path_used, why, started)

    def _push_adapter(self, folder: Path, name: str) -> tuple[str, SyncPath, str]:
        if self.server.spec.max_lora_rank is None:
            raise EngineError(
                "This engine was started without LoRA (max_lora_rank=None), so it cannot load the adapter in "
                f"{folder}. Start it with max_lora_rank at the adapter's rank."
            )
        path_used: SyncPath = "hot-load"
        why = "an adapter, and the engine lives"
        was_whole = self.broken is None
        try:
            self._must_be_whole()
            self._wake_with_base()
            self._load_adapter(name, folder)
        except EngineError as error:
            if was_whole and self.client.health():
                raise  # a living server refused the adapter: a restart would not change its mind
            why = f"the engine was gone ({self.broken or error})"
            self._restart(None)
            self._load_adapter(name, folder)
            path_used = "restart"
        previous, self._adapter = self._adapter, name
        if previous is not None:
            try:
                self.client.unload_adapter(previous)
            except EngineError as error:  # the new weights are in place all the same, and vLLM evicts unused adapters
                logger.warning("The previous adapter %s could not be unloaded: %s", previous, error)
        return name, path_used, why

    def _load_adapter(self, name: str, folder: Path) -> None:
        try:
            self.client.load_adapter(name, folder)
        except EngineRefusal as refusal:
            if self.server.spec.tensor_parallel_size > 1:  # see bodies.packed_forms
                self.broken = f"several workers are out of step after a call that they refused ({refusal})"
            raise

    def _push_full(self, folder: Path) -> tuple[str, SyncPath, str]:
        served_name = self.server.spec.served_name
        try:
            self._must_be_whole()
            self.wake_for_weights()
            with self.phase("reload"):
                self.client.reload_weights(folder)
                if self.server.spec.device == "cpu":
                    self.client.repack_shared_weights()
            self._weights_are_there()
            self.wake_for_answers()
        except EngineError as error:
            self._restart(folder)
            return served_name, "restart", f"the reload failed ({error})"
        return served_name, "reload", "full weights, and the engine lives"

    def _must_be_whole(self) -> None:
        if self.broken is not None:
            raise EngineError(f"The engine's weights are not whole: {self.broken}. It has to be started again.")

    def _restart(self, folder: Path | None) -> None:
        """Start the server anew, from `folder` if given, and follow it to its new socket."""
        self._forget_server()
        self.server.restart(model=folder)
        self.client.connect(self.server.uds)
        self._address = self._where()
        self.server.wait_ready(self.restart_timeout_s)

    def _follow(self) -> None:
        """Notice a restart by somebody else: a server that starts again has another socket, and nothing of ours."""
        address = self._where()
        if address != self._address and address is not None:
            self._forget_server()
            self.client.connect(address)
            self._address = address

    def _where(self) -> Path | str | None:
        try:
            return self.server.uds
        except EngineError:
            return None  # stopped

    def _forget_server(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        self._adapter = None
        self._capabilities = None
        self._state = "awake"
        self._paused = False
        self.broken = None
        self.generation += 1

    # -- without a folder: called by live_weights.send on rank 0, within `client.until` its deadline -----------------

    def begin_stream(self) -> None:
        """Wake the weights' memory, or let running requests end; after it the sender may start the update."""
        self.phases, self._early = self._early, {}
        self._pushes += 1
        if self._state == "awake" and self.capabilities().pauses:
            self._paused = True  # also if the answer does not come: it may be paused all the same
            with self.phase("pause"):
                self.client.pause()
        self.wake_for_weights()

    def end_stream(self, path: TransferBackend, why: str, started: float) -> SyncResult:
        """All weights are in: wake the rest, answer again from an empty prefix cache.  `started` by time.monotonic."""
        self._weights_are_there()
        if self._paused:
            self.client.resume()
            self._paused = False
        self.wake_for_answers()
        self._stream_failures = 0
        return self._result(self.server.spec.served_name, path, why, started)

    def break_off(self, reason: str, *, begun: bool) -> None:
        """A stream failed; if it had `begun`, parameters may be missing, and the server must start anew to be asked."""
        self._stream_failures += 1
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if begun:
            self.broken = reason
        elif self._paused:
            try:
                self.client.resume(timeout_s=RESUME_S)
            except EngineError as error:
                self.broken = f"it was paused and does not go on ({error})"
        self._paused = False

    def distrust_streams(self, reason: str) -> None:
        """What a stream brought turned out to be other weights: the server starts anew, and files are used from now."""
        self._distrusted = reason
        self.broken = reason

    # -- sleep -----------------------------------------------------------------------------------------------------

    def rest(self, level: Literal[1, 2] = 2) -> str | None:
        """Put the engine to sleep after an evaluation; None, or why it stays awake.

        Level 2 (0.05 s on an H200) throws the weights away: right when they are sent again anyway, and for adapters
        where vLLM can load the base again beside them.  Level 1 keeps them in host memory and takes 9 to 12 s for 8B.
        """
        self._follow()
        if self.broken is not None:
            return f"the engine has to be started again: {self.broken}"
        if self._state != "awake":
            return None if self._state in ("asleep", "weights gone") else "its weights are just being replaced"
        found = self.capabilities()
        if not found.sleeps:
            return found.lacks["sleep"]
        if level == 2 and self.server.spec.max_lora_rank is not None and not found.replaces_base_under_adapters:
            return (
                f"vLLM {found.version} cannot load a base again while it serves adapters (0.28 and newer can); merged "
                "adapters can sleep"
            )
        with self.phase("sleep"):
            self.client.sleep(level, timeout_s=SLEEP_S)
        self._state = "weights gone" if level == 2 else "asleep"
        return None

    def wake_for_weights(self) -> None:
        """Give the weights their memory back (not yet the cache), so that new ones can be written; a no-op if awake."""
        self._follow()
        if self._state in ("asleep", "weights gone"):
            with self.phase("wake weights"):
                self.client.wake_up(["weights"])
            self._state = "weights due" if self._state == "weights gone" else "no cache"

    def wake_early(self) -> None:
        """`wake_for_weights` while something else goes on that the next stream comes after."""
        self.phases = {}
        self.wake_for_weights()
        self._early, self.phases = self.phases, {}

    def wake_for_answers(self) -> None:
        """Wake what still sleeps and forget cached prefixes; EngineError while the weights are those of nobody."""
        if self._state in ("weights gone", "weights due"):
            raise EngineError("The engine slept at level 2 and has no weights. Push or send them before it is asked.")
        self.wake_for_weights()
        if self._state == "no cache":
            with self.phase("wake cache"):
                self.client.wake_up(["kv_cache"])
                if self.client.is_sleeping():
                    raise EngineError("vLLM still sleeps after its weights and cache were woken. Its log says why.")
            self._state = "awake"
        with self.phase("reset"):
            self.client.reset_prefix_cache(copies=self.server.spec.data_parallel_size)

    def _weights_are_there(self) -> None:
        if self._state == "weights due":
            self._state = "no cache"

    def _wake_with_base(self) -> None:
        """Before an adapter is loaded: an engine without weights reads its base again from where it started."""
        if self._state == "awake":
            return
        self.wake_for_weights()
        if self._state == "weights due":
            with self.phase("reload"):
                self.client.reload_weights(Path(self.server.spec.model))
            self._weights_are_there()
        self.wake_for_answers()

    @property
    def asleep(self) -> bool:
        """Whether the engine sleeps, as far as is known here."""
        return self.broken is None and self._state in ("asleep", "weights gone")

    @property
    def whole(self) -> bool:
        """Whether the engine is awake with weights that are somebody's."""
        return self.broken is None and self._state == "awake"

    # -- small things ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to the phases of this push or stream."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - started

    def _result(self, name: str, path: SyncPath, why: str, started: float) -> SyncResult:
        return SyncResult(
            model_name=name,
            path_used=path,
            why=why,
            seconds=time.monotonic() - started,
            generation=self.generation,
            phases=dict(self.phases),
        )
