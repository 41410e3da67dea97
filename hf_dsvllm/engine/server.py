"""The life of the vLLM process as the trainer sees it: start at once, wait for readiness, restart, stop.

`spec.EngineSpec` says what to serve; `EngineServer` runs it under the supervisor.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import httpx

from hf_dsvllm.engine import supervisor
from hf_dsvllm.engine.client import open_http
from hf_dsvllm.engine.diagnosis import explain_log
from hf_dsvllm.engine.folder import next_log, writing_for_engine
from hf_dsvllm.engine.registry import read_record, record_path
from hf_dsvllm.engine.spec import EngineSpec, command, environment
from hf_dsvllm.errors import EngineError

__all__ = ["SOCKET_FOLDERS", "EngineServer", "new_socket_folder", "socket_bases"]

UDS_LIMIT_BYTES = 107  # sun_path in sockaddr_un, less its final zero
SOCKET_FOLDERS = "dsvllm-"  # and eight characters
VLLM_SOCKET_NAME_BYTES = 40  # vLLM puts sockets named by a UUID into VLLM_RPC_BASE_PATH
STOP_MARGIN_S = 5.0


class EngineServer:
    """One vLLM process under its supervisor; `start` returns while the model still loads.

    It ends with `stop`, with this process however that ends, and by itself when vLLM fails.
    """

    adapter_prefix = ""  # the server is ours alone, so names of adapters need nothing in front

    def __init__(self, spec: EngineSpec, run_dir: Path) -> None:
        """Describe a server without starting it; `EngineServer.start` does both."""
        self.spec = spec
        self.run_dir = run_dir
        self.load_seconds: float | None = None
        self._owner_pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._death_pipe: int | None = None
        self._socket_folder: Path | None = None
        self._engine_id = ""
        self._log: Path | None = None
        self._started_at = 0.0
        # Starts and ends exclude each other: a thread may start an engine anew while another ends it.
        self._changing = threading.RLock()
        self._closed = False

    @classmethod
    def start(cls, spec: EngineSpec, run_dir: Path) -> EngineServer:
        """Start vLLM for `spec` and return at once; its log goes to `run_dir`/engine/vllm-<n>.log."""
        server = cls(spec, run_dir)
        server._launch()
        return server

    @property
    def uds(self) -> Path:
        """The Unix socket of the running server; a new one after every restart."""
        if self._socket_folder is None:
            raise EngineError("The vLLM server is stopped, so it has no socket. Start it with EngineServer.start.")
        return self._socket_folder / "api.sock"

    @property
    def alive(self) -> bool:
        """Whether the process runs (it may still be loading: see `wait_ready`)."""
        return self._process is not None and self._process.poll() is None

    @property
    def age_seconds(self) -> float:
        """Since it was started last."""
        return time.monotonic() - self._started_at

    @property
    def pid(self) -> int | None:
        """The API server's process number, or None while it is not known or no more."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            engine = read_record(record_path(self._engine_id)).engine
            return engine.pid if engine.alive else None
        return None

    @property
    def log(self) -> Path:
        """The log of the latest start."""
        if self._log is None:
            raise EngineError("The vLLM server was never started, so it has no log.")
        return self._log

    def _launch(self) -> None:
        folder = new_socket_folder()
        self._engine_id = uuid.uuid4().hex[:16]
        self._socket_folder = folder
        read_end, self._death_pipe = os.pipe()  # both close on exec, so no command started by the trainer holds them
        line = [sys.executable, "-I", "-S", supervisor.__file__]
        line += ["--death_fd", str(read_end), "--owner_pid", str(os.getpid()), "--engine_id", self._engine_id]
        line += ["--record", str(record_path(self._engine_id)), "--socket_folder", str(folder)]
        line += ["--run_dir", str(self.run_dir.absolute()), "--", *command(self.spec, folder / "api.sock")]
        env = {**environment(self.spec, os.environ), "VLLM_RPC_BASE_PATH": str(folder)}
        self.load_seconds = None
        self._started_at = time.monotonic()
        try:
            with writing_for_engine(self.run_dir):
                self._log = next_log(self.run_dir / "engine")
                with self._log.open("wb") as log:
                    self._process = subprocess.Popen(
                        line,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=env,
                        pass_fds=(read_end,),
                        start_new_session=True,  # Ctrl-C in the terminal is the trainer's to handle
                    )
        except EngineError:
            os.close(self._death_pipe)
            self._death_pipe = self._socket_folder = None
            supervisor.remove_traces(None, str(folder))
            raise
        finally:
            os.close(read_end)
        atexit.register(self.stop)

    def wait_ready(self, timeout_s: float = 900.0) -> None:
        """Block until the server answers; EngineError with the cause from its log if it dies, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.answers():
            if not self.alive:
                code = None if self._process is None else self._process.returncode
                raise EngineError(f"vLLM did not start (exit code {code}).\n{explain_log(self.log)}")
            if time.monotonic() > deadline:
                raise EngineError(
                    f"vLLM was not ready after {timeout_s:.0f} s (still running). Give it more time, or look at "
                    f"what it waits for.\n{explain_log(self.log)}"
                )
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether it has answered since it was started; one that has not is asked once."""
        if self.load_seconds is None:
            with open_http(self.uds) as client, contextlib.suppress(httpx.HTTPError):
                if client.get("/health", timeout=5.0).status_code == httpx.codes.OK:
                    self.load_seconds = time.monotonic() - self._started_at
        return self.load_seconds is not None

    def restart(self, *, model: Path | str | None = None, simple: bool = False) -> None:
        """Stop, and start again on a new socket, with the weights in the folder `model` if given; returns at once.

        A folder without a tokenizer is served with the tokenizer of the first model.  `simple`: one copy, the
        least cache, no compiled code.  EngineError once it is closed.
        """
        with self._changing:
            if self._closed:
                raise EngineError("The vLLM server was closed: evaluation has ended.")
            self.stop()
            if simple:
                plain = {"kv_cache_bytes": self.spec.least_kv_cache_bytes or self.spec.kv_cache_bytes}
                self.spec = dataclasses.replace(self.spec, enforce_eager=True, data_parallel_size=1, **plain)
            if model is not None:
                tokenizer = self.spec.tokenizer
                if tokenizer is None and not (Path(model) / "tokenizer_config.json").exists():
                    tokenizer = self.spec.model
                self.spec = dataclasses.replace(self.spec, model=model, tokenizer=tokenizer)
            self._launch()

    def close(self) -> None:
        """`stop` for good: whoever still waits for it in another thread cannot start it again."""
        self._closed = True
        self.stop()

    def stop(self) -> None:
        """End every process of the engine and remove its socket; safe to call twice, and a no-op in a forked child."""
        if os.getpid() == self._owner_pid:  # in a child the lock may be held by a thread that is not there
            with self._changing:
                self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        if self._death_pipe is not None:
            os.close(self._death_pipe)  # end of file: the supervisor's sign to finish
            self._death_pipe = None
        try:
            process.wait(supervisor.GRACE_S + supervisor.KILL_S + STOP_MARGIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Normally nothing is left to do; after a killed supervisor its guard and we do the same work twice.
        left = supervisor.end_engine(self._engine_id, self.pid)
        if not left:
            supervisor.remove_traces(str(record_path(self._engine_id)), str(self._socket_folder))
        self._socket_folder = None
        atexit.unregister(self.stop)
        if left:
            raise EngineError(
                f"vLLM processes {left} do not end on SIGKILL: they wait inside the kernel (GPU or disk)."
            )


def socket_bases() -> tuple[str, ...]:
    """Where folders of sockets may be, best first: the temporary folder, unless its path is too long for AF_UNIX."""
    bases = (tempfile.gettempdir(), "/tmp", os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm")
    room = UDS_LIMIT_BYTES - VLLM_SOCKET_NAME_BYTES - len(f"/{SOCKET_FOLDERS}12345678/")
    return tuple(dict.fromkeys(base for base in bases if base and len(os.fsencode(base)) <= room))


def new_socket_folder() -> Path:
    """A fresh 0700 folder whose socket paths fit into AF_UNIX, in the first of `socket_bases` that can be written."""
    refused = []
    for base in socket_bases():
        try:
            return Path(tempfile.mkdtemp(prefix=SOCKET_FOLDERS, dir=base))
        except OSError as error:
            refused.append(f"{base}: {error.strerror}")
    raise EngineError(
        f"There is no folder for vLLM's sockets ({'; '.join(refused)}). Make one of these writable, or set TMPDIR to a "
        "folder with a short path that is."
    )
