"""vLLM's API server for CPUs (`python forking_api_server.py ARGUMENTS`): its processes are forked, not spawned.

On a CPU vLLM insists on `spawn` for engine core and worker, and each imports torch and vLLM again, one after the
other: ready after 60 s on 2 cores.  Forked they inherit the imports: 23 s (SmolLM2-135M, vLLM 0.32, docs/lab-notes.md).
Nothing that a fork breaks exists yet at that moment, no accelerator and no OpenMP threads; GPUs keep `spawn`.

Remove it when vLLM's CPU platform leaves VLLM_WORKER_MULTIPROC_METHOD=fork alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import runpy

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # another version: slower, not broken
        from vllm.utils import system_utils

        system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
