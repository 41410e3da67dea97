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

__all__ = ["Supervised", "supervised", "wait_end", "wait_ready"]

POLL_S = 0.5


class Supervised(subprocess.Popen[bytes]):
    """A supervised process: `what` it is called in errors, `asked` once it was sent one of our own signals."""

    what = ""
    asked = False

    def ask(self, number: int) -> None:
        """Pass a signal on."""
        self.asked = True
        self.send_signal(number)

    @property
    def ended_as_asked(self) -> bool:
        """Whether it ended because it was to: vLLM's exit code after a signal is 0, the signal's, or (0.26, 0.32) 1."""
        return self.asked or self.returncode in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


@contextlib.contextmanager
def supervised(line: Sequence[str], env: Mapping[str, str], what: str) -> Iterator[Supervised]:
    """Run vLLM under the supervisor with our output; SIGINT and SIGTERM are passed on; nothing is left afterwards."""
    engine_id = uuid.uuid4().hex[:16]
    read_end, write_end = os.pipe()
    command = [sys.executable, "-I", "-S", supervisor.__file__, "--death_fd", str(read_end)]
    command += ["--owner_pid", str(os.getpid()), "--engine_id", engine_id]
    command += ["--record", str(record_path(engine_id)), "--", *line]
    process = Supervised(command, stdin=subprocess.DEVNULL, env=dict(env), pass_fds=(read_end,), start_new_session=True)
    process.what = what
    os.close(read_end)
    try:
        with _passing_signals(process):
            yield process
    finally:
        os.close(write_end)  # end of file: the supervisor's sign to finish
        process.wait()


@contextlib.contextmanager
def _passing_signals(process: Supervised) -> Iterator[None]:
    """Only the main thread can have signal handlers; elsewhere the caller ends us by other means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _frame: process.ask(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_ready(
    running: Sequence[Supervised],
    url: str,
    names: Sequence[str],
    key: str | None,
    timeout_s: float,
    *,
    health: bool = True,
) -> bool:
    """True once /health of the last one `running` answers and /v1/models lists all `names`.

    False if we were asked to stop meanwhile; EngineError if it ends, or one that was ready before.
    """
    deadline = time.monotonic() + timeout_s
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            ended = next((process for process in running if process.poll() is not None), None)
            if ended is not None:
                if ended.ended_as_asked:
                    return False
                how = "did not start" if ended is running[-1] else f"ended while {running[-1].what} was starting"
                raise EngineError(f"{ended.what} {how} (exit code {ended.returncode}); its output above says why.")
            with contextlib.suppress(httpx.HTTPError):
                well = not health or client.get("/health").is_success
                if well and set(names) <= set(_model_names(client.get("/v1/models"))):
                    return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[-1].wait(POLL_S)
    raise EngineError(f"{url} was not ready after {timeout_s:.0f} s; the output above says what it waits for.")


def _model_names(answer: httpx.Response) -> list[str]:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise EngineError(
            "The server refuses VLLM_API_KEY: is it another server that answers there? Try another --port."
        )
    return [model["id"] for model in answer.raise_for_status().json()["data"]]


def wait_end(running: Sequence[Supervised]) -> int:
    """The exit code of the first process that ends; the others are ended by leaving their contexts."""
    while True:
        for process in running:
            code = process.poll()
            if code is not None:
                return 0 if process.ended_as_asked else code
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[-1].wait(POLL_S)
