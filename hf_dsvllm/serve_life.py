"""The life of the processes behind `serve`: started under the supervisor, waited for, ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

import httpx

from hf_dsvllm.engine import supervisor
from hf_dsvllm.engine.registry import record_path
from hf_dsvllm.errors import EngineError

__all__ = ["supervised", "wait_end", "wait_ready"]

POLL_S = 0.5


@contextlib.contextmanager
def supervised(line: Sequence[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run vLLM under the supervisor with our output; SIGINT and SIGTERM are passed on; nothing is left afterwards."""
    engine_id = uuid.uuid4().hex[:16]
    read_end, write_end = os.pipe()
    command = [sys.executable, "-I", "-S", supervisor.__file__, "--death_fd", str(read_end)]
    command += ["--owner_pid", str(os.getpid()), "--engine_id", engine_id]
    command += ["--record", str(record_path(engine_id)), "--", *line]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=dict(env), pass_fds=(read_end,), start_new_session=True
    )
    os.close(read_end)
    try:
        with _passing_signals(process):
            yield process
    finally:
        os.close(write_end)  # end of file: the supervisor's sign to finish
        process.wait()


@contextlib.contextmanager
def _passing_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Only the main thread can have signal handlers; elsewhere the caller ends us by other means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _frame: process.send_signal(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_ready(
    process: subprocess.Popen[bytes],
    url: str,
    names: Sequence[str],
    key: str | None,
    timeout_s: float,
    *,
    health: bool = True,
) -> bool:
    """True once /health answers and /v1/models lists all `names`; False if we were asked to stop meanwhile."""
    deadline = time.monotonic() + timeout_s
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                if _was_asked(process.returncode):
                    return False
                what = "vLLM" if health else "The gateway"
                raise EngineError(f"{what} did not start (exit code {process.returncode}); its output above says why.")
            with contextlib.suppress(httpx.HTTPError):
                well = not health or client.get("/health").is_success
                if well and set(names) <= set(_model_names(client.get("/v1/models"))):
                    return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    raise EngineError(f"{url} was not ready after {timeout_s:.0f} s; the output above says what it waits for.")


def _model_names(answer: httpx.Response) -> list[str]:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise EngineError(
            "The server refuses VLLM_API_KEY: is it another server that answers there? Try another --port."
        )
    return [model["id"] for model in answer.raise_for_status().json()["data"]]


def wait_end(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first process that ends; the others are ended by leaving their contexts."""
    while True:
        for process in running:
            code = process.poll()
            if code is not None:
                return 0 if _was_asked(code) else code
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[-1].wait(POLL_S)


def _was_asked(code: int) -> bool:
    """vLLM ends with 0 or by the signal we passed on."""
    return code in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
