"""Bringing a snapshot's weights into the running engine, by the cheapest path that works, and saying which it was."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Literal

from hf_dsvllm.engine.client import EngineClient
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.errors import EngineError

__all__ = ["SyncPath", "SyncResult", "WeightSync"]

SyncPath = Literal["hot-load", "reload", "restart"]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """`model_name` is what to ask for now; `path_used` and `why` say how the weights got there."""

    model_name: str
    path_used: str
    why: str
    seconds: float


class WeightSync:
    """Pushes snapshots into one server; the previous snapshot's folder may be deleted once `push` has returned."""

    def __init__(self, server: EngineServer, client: EngineClient, *, restart_timeout_s: float = 900.0) -> None:
        """`restart_timeout_s` bounds a restart, the last resort."""
        self.server = server
        self.client = client
        self.restart_timeout_s = restart_timeout_s
        self._adapter: str | None = None
        self._pushes = 0

    def push(self, snapshot_path: Path, kind: Literal["adapter", "full"], step: int) -> SyncResult:
        """Make the engine answer with the weights in `snapshot_path` (a PEFT adapter or a safetensors model folder).

        Adapters are loaded under a fresh name before the previous one goes; full weights are reloaded in place and the
        prefix cache is reset.  If the engine is dead, or a reload fails (it may have left half-written weights), the
        server is restarted.  Raises EngineError when that fails too, or when vLLM refuses the adapter.
        """
        started = time.monotonic()
        self._pushes += 1
        if kind == "adapter":
            name, path_used, why = self._push_adapter(snapshot_path, f"step-{step}-{self._pushes}")
        else:
            name, path_used, why = self._push_full(snapshot_path)
        return SyncResult(model_name=name, path_used=path_used, why=why, seconds=time.monotonic() - started)

    def _push_adapter(self, folder: Path, name: str) -> tuple[str, SyncPath, str]:
        if self.server.spec.max_lora_rank is None:
            raise EngineError(
                "This engine was started without LoRA (max_lora_rank=None), so it cannot load the adapter in "
                f"{folder}. Start it with max_lora_rank at the adapter's rank."
            )
        path_used: SyncPath = "hot-load"
        why = "an adapter, and the engine lives"
        try:
            self.client.load_adapter(name, folder)
        except EngineError as error:
            if self.client.health():
                raise  # a living server refused the adapter: a restart would not change its mind
            self._restart(None)
            self.client.load_adapter(name, folder)
            path_used, why = "restart", f"the engine was gone ({error})"
        previous, self._adapter = self._adapter, name
        if previous is not None:
            try:
                self.client.unload_adapter(previous)
            except EngineError as error:  # the new weights are in place all the same, and vLLM evicts unused adapters
                logger.warning("The previous adapter %s could not be unloaded: %s", previous, error)
        return name, path_used, why

    def _push_full(self, folder: Path) -> tuple[str, SyncPath, str]:
        served_name = self.server.spec.served_name
        try:
            self.client.reload_weights(folder)
            if self.server.spec.device == "cpu":
                self.client.repack_shared_weights()
            self.client.reset_prefix_cache()
        except EngineError as error:
            self._restart(folder)
            return served_name, "restart", f"the reload failed ({error})"
        return served_name, "reload", "full weights, and the engine lives"

    def _restart(self, folder: Path | None) -> None:
        """Start the server anew, from `folder` if given, and follow it to its new socket."""
        self._adapter = None
        self.server.restart(model=folder)
        self.client.connect(self.server.uds)
        self.server.wait_ready(self.restart_timeout_s)
