"""vLLM's API server with habits of ours: `python api_server.py always|allowed|never ARGUMENTS`.

The word says whether engine core and worker are forked.  vLLM starts each anew (`spawn`), and each imports torch and
vLLM again, one after the other; forked they inherit the imports.  Nothing that a fork breaks exists yet at that moment,
no accelerator and no OpenMP threads.  Seconds from start to ready (docs/lab-notes.md):

| | spawn | fork |
| --- | --- | --- |
| SmolLM2-135M on 2 cores, vLLM 0.32 | 60 | 23 |
| 8B on an H200, nothing cached, vLLM 0.26 | 107 | 80 |

`always`, for CPUs: their platform insists on `spawn` whatever VLLM_WORKER_MULTIPROC_METHOD says.  `allowed`, for one
GPU: unless that variable says otherwise, or vLLM finds that CUDA is up already.  `never`: several GPUs, not measured.

Before it starts anything vLLM looks at the model's class, in a Python of its own so that no accelerator is touched,
which imports everything once more where VLLM_CACHE_ROOT has no answer: 24 of those 80 s.  A forked child does here.

With --data-parallel-size, the store by which the copies find each other listens on loopback: torch's TCPStore alone
listens on every interface, open to all who reach the host.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost")
LOOK_S = 30.0  # the whole look in a Python of its own takes less


def fork_processes() -> None:
    """Let vLLM's processes be forked whatever its platform says."""
    from vllm.utils import system_utils

    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def look_at_models_in_a_fork() -> None:
    """Let vLLM look at a model's class in a forked child; in a Python of its own if that fails."""
    from vllm.model_executor.models import registry

    in_its_own_python = registry._run_in_subprocess

    def in_a_fork(look: Callable[[], Any]) -> Any:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=lambda: sender.send(look()), daemon=True)
        with receiver, contextlib.suppress(EOFError, OSError, AssertionError):  # it failed, or there can be no child
            with sender:
                child.start()
            try:
                if receiver.poll(LOOK_S):
                    return receiver.recv()
            finally:
                child.kill()
                child.join()
        return in_its_own_python(look)

    registry._run_in_subprocess = in_a_fork


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


def main() -> None:
    forks = sys.argv.pop(1)
    if forks == "allowed":
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    habits = {
        fork_processes: forks == "always",
        look_at_models_in_a_fork: True,
        keep_the_store_private: "--data-parallel-size" in sys.argv,
    }
    for habit, wanted in habits.items():
        with contextlib.suppress(ImportError, AttributeError):  # another version: slower, not broken
            if wanted:
                habit()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
