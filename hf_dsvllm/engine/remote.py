"""A vLLM server that somebody else runs, by URL: asked and fed, never started, restarted or stopped by us."""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from pathlib import Path

from hf_dsvllm.engine.client import API_KEY_VARIABLE, EngineClient, EngineRefusal
from hf_dsvllm.engine.spec import LORA_RANKS, EngineSpec
from hf_dsvllm.errors import EngineError

__all__ = ["RemoteServer"]

POLL_S = 0.5


class RemoteServer:
    """The part of EngineServer's interface that pushing and evaluating need.

    Weights reach it by folders on a file system that both hosts mount under the same path: adapters with
    `--enable-lora --max-lora-rank N` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, full weights with VLLM_SERVER_DEV_MODE=1
    (open to all who reach the port: for private networks only).
    """

    def __init__(self, url: str) -> None:
        """`url` is the server's root, such as http://host:8000; its API key is read from HF_DSVLLM_API_KEY."""
        self.url = url.rstrip("/").removesuffix("/v1")
        # Other runs may use the server: our adapters must neither meet theirs nor be mistaken for them.
        self.adapter_prefix = f"dsvllm-{uuid.uuid4().hex[:8]}-"
        self.load_seconds: float | None = None
        self._spec: EngineSpec | None = None

    @property
    def uds(self) -> str:
        """Where to reach it: what a socket is for a server of our own."""
        return self.url

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        with contextlib.closing(EngineClient(self.url)) as client:
            return client.health()

    def answers(self) -> bool:
        """As `alive`: nobody here starts it."""
        return self.alive

    @property
    def spec(self) -> EngineSpec:
        """What it serves, as it says itself; EngineError before `wait_ready`."""
        if self._spec is None:
            raise EngineError(f"The server at {self.url} was not asked yet what it serves: call wait_ready first.")
        return self._spec

    def wait_ready(self, timeout_s: float = 900.0) -> None:
        """Block until it answers and has said what it serves; EngineError after `timeout_s`, or if it refuses us."""
        if self._spec is not None and self.alive:
            return
        started = time.monotonic()
        with contextlib.closing(EngineClient(self.url, default_timeout_s=max(1.0, min(30.0, timeout_s)))) as client:
            while not client.health():
                if time.monotonic() - started > timeout_s:
                    raise EngineError(
                        f"The server at {self.url} did not answer within {timeout_s:.0f} s. Check the address, the "
                        "network between the hosts, and that it runs."
                    )
                time.sleep(POLL_S)
            self._spec = self._describe(client)
        self.load_seconds = time.monotonic() - started

    def _describe(self, client: EngineClient) -> EngineSpec:
        try:
            names = client.loaded_models()
            routes = client.routes()
        except EngineRefusal as refusal:
            if refusal.status in (401, 403):
                raise EngineError(
                    f"The server at {self.url} wants an API key: set {API_KEY_VARIABLE} in the environment of the run."
                ) from None
            raise
        return EngineSpec(
            model=names[0],
            python=Path(sys.executable),
            device="cuda",
            served_name=names[0],
            data_parallel_size=copies_of(client, routes),
            # How large a rank it takes shows when it refuses one.
            max_lora_rank=LORA_RANKS[-1] if "/v1/load_lora_adapter" in routes else None,
        )

    def restart(self, *, model: Path | str | None = None, simple: bool = False) -> None:
        """Not ours to do: always EngineError."""
        del model, simple
        raise EngineError(
            f"The server at {self.url} has failed, and a remote server is not ours to restart. Start it again there; "
            "the next evaluation finds it."
        )

    def close(self) -> None:
        """As `stop`: there is nothing of ours that could be started again."""
        self.stop()

    def stop(self) -> None:
        """Let it forget our adapters; it runs on for others.  Never raises: at the end of a run it may be gone."""
        if self._spec is None:
            return
        client = EngineClient(self.url, default_timeout_s=30.0)
        with contextlib.closing(client), contextlib.suppress(EngineError):
            for name in client.loaded_models():
                if name.startswith(self.adapter_prefix):
                    client.unload_adapter(name)
        self._spec = None


def copies_of(client: EngineClient, routes: frozenset[str]) -> int:
    """How many copies of the engine share its requests (data parallel); 1 where the server does not tell."""
    if "/get_world_size" not in routes:
        return 1
    return max(1, client.world_size() // max(1, client.world_size(of_one_copy=True)))
