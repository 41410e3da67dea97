"""What every test shares: an environment without traces of the machine, free ports, distributed runs that end."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent

# A launcher's or a user's settings would change what the code under test does.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
SCRUBBED = LAUNCHER | {"HF_TOKEN", "HF_HOME"}
SCRUBBED_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "FSDP_", "DS_", "VLLM_", "WANDB_", "HF_DSVLLM_")
RUN_MARK = "HF_DSVLLM_TEST_RUN"

RunDistributed = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config: pytest.Config) -> None:
    """Settle the environment before any test module is imported: some libraries read it only then."""
    del config
    for name in list(os.environ):
        if name in SCRUBBED or name.startswith(SCRUBBED_PREFIXES):
            del os.environ[name]
    os.environ.update(
        HF_HUB_OFFLINE="1", DO_NOT_TRACK="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1"
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    # DeepSpeed looks for ninja on PATH, also when pytest was started as .venv/bin/python -m pytest.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="dsvllm-test-state-")
    clear_stale_locks()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the state folder of this test session."""
    del config
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _environment_restored() -> Iterator[None]:
    """Undo what a test, or a library in it (DeepSpeed sets RANK and MASTER_PORT), did to the environment."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@pytest.fixture(scope="module", autouse=True)
def _models_of_other_files_do_not_count() -> Iterator[None]:
    """What another test file left alive is no model loaded before the arguments: those checks look at all of memory."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        yield
        return
    from hf_dsvllm import preflight

    alive = preflight.models_alive
    before = weakref.WeakSet(alive(modeling.PreTrainedModel))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "models_alive", lambda cls: [one for one in alive(cls) if one not in before])
        yield


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def nvme_op() -> None:
    """DeepSpeed's async_io op is built; without it the test is skipped, and fails where CI=1 is set."""
    if (Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "async_io.built").exists():
        return
    reason = (
        "DeepSpeed's async_io op is not built: apt-get install libaio-dev, then make setup (.cache/build-async_io.log)"
    )
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def run_distributed(tmp_path: Path) -> RunDistributed:
    """`run_distributed(script, nproc=2, args=(), timeout=300, env=None)`; see `torchrun`."""

    def run(
        script: str | Path,
        nproc: int = 2,
        args: Sequence[str] = (),
        timeout: float = 300,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        if isinstance(script, str):
            path = tmp_path / f"script-{uuid.uuid4().hex[:8]}.py"
            path.write_text(script, encoding="utf-8")
            script = path
        return torchrun(script, nproc=nproc, args=args, timeout=timeout, env=env or {})

    return run


def torchrun(
    script: Path, *, nproc: int, args: Sequence[str], timeout: float, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `script` in `nproc` processes on loopback; stdout and stderr come back as text.

    Raises `subprocess.TimeoutExpired` (with the output so far) after `timeout` seconds.  However it ends, no process
    that it started, in whatever session or process group, is left.
    """
    mark = uuid.uuid4().hex
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={nproc}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", f"--rdzv-id={mark}"),
        *(str(script), *args),
    ]
    # Files, not pipes: a process that outlives the launcher would keep a pipe open and us waiting.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"} | env | {RUN_MARK: mark},
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_marked(mark)
            process.wait()
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if code is None:
        clear_stale_locks()
        print(stdout[-4000:], stderr[-8000:], sep="\n", file=sys.stderr)
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def kill_marked(mark: str) -> None:
    """Kill every process that carries `mark` in its environment.

    torchrun starts its workers in sessions of their own, so killing its process group would miss them.
    """
    for _ in range(5):  # a second look, as a process may fork while the first is under way
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(RUN_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    found.append(process)
        if not found:
            return
        psutil.wait_procs(found, timeout=10)


def clear_stale_locks() -> None:
    """Remove the locks that processes killed while loading a C++ op left; the next one would wait for ever.

    torch keeps its lock file open while it holds the lock: one that no process has open is stale.
    """
    locks = set(Path(os.environ["TORCH_EXTENSIONS_DIR"]).resolve().glob("*/lock"))
    if not locks:
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            locks -= {Path(file.path) for file in process.open_files()}
    for lock in locks:
        lock.unlink(missing_ok=True)
