"""vLLM's API server with habits of ours: `python api_server.py fork|spawn ARGUMENTS`.

`fork`, for CPUs: there vLLM insists on `spawn` for engine core and worker, and each imports torch and vLLM again, one
after the other: ready after 60 s on 2 cores.  Forked they inherit the imports: 23 s (SmolLM2-135M, vLLM 0.32,
docs/lab-notes.md).  Nothing that a fork breaks exists yet at that moment, no accelerator and no OpenMP threads; GPUs
keep `spawn`.  Not needed any more when vLLM's CPU platform leaves VLLM_WORKER_MULTIPROC_METHOD=fork alone.

With --data-parallel-size, the store by which the copies find each other listens on loopback: torch's TCPStore alone
listens on every interface, open to all who reach the host.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import runpy
import socket
import sys
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost")


def fork_processes() -> None:
    """Let vLLM's processes be forked whatever its platform says."""
    from vllm.utils import system_utils

    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def keep_the_store_private() -> None:
    """Give vLLM's TCPStores on this host a socket that listens on loopback alone."""
    from vllm.distributed import utils

    make = utils.create_tcp_store

    def private(host: str, port: int, listen_socket: socket.socket | None = None, **kwargs: Any) -> Any:
        if listen_socket is None and kwargs.get("is_master") and host in LOOPBACK:
            listen_socket = socket.create_server(("127.0.0.1", port))
            port = listen_socket.getsockname()[1]
        return make(host, port, listen_socket, **kwargs)

    utils.create_tcp_store = private


if __name__ == "__main__":
    with contextlib.suppress(ImportError, AttributeError):  # another version: slower, not broken
        if sys.argv.pop(1) == "fork":
            fork_processes()
    with contextlib.suppress(ImportError, AttributeError):  # another version, without such a store
        if "--data-parallel-size" in sys.argv:
            keep_the_store_private()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
