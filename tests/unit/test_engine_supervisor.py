"""No process survives, whoever is killed: with a fake engine that forks like vLLM (API server → EngineCore)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_dsvllm.engine import registry, supervisor
from tests.waiting import wait_for

# Like vLLM's, its EngineCore does not notice when the API server is killed, and its API server leaves when EngineCore
# dies.  "stubborn" processes ignore SIGTERM.
FAKE_ENGINE = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
core = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
for name, pid in (("core", core.pid), ("api", os.getpid())):
    (folder / f".{name}").write_text(str(pid))
    os.rename(folder / f".{name}", folder / name)
if kind == "exits":
    sys.exit(7)
core.wait()
sys.exit(3)
"""

# Stands for the trainer: holds the pipe, starts the supervisor, and may have forked a worker that inherits the pipe.
OWNER = """
import os, subprocess, sys, time
read_end, write_end = os.pipe()
if sys.argv[1] == "forks" and os.fork() == 0:
    open(sys.argv[2], "w").write(str(os.getpid()))
    time.sleep(300)
line = [sys.executable, "-I", "-S", sys.argv[3], "--death_fd", str(read_end), "--owner_pid", str(os.getpid())]
process = subprocess.Popen(line + sys.argv[4:], pass_fds=(read_end,), start_new_session=True, stdin=subprocess.DEVNULL)
os.close(read_end)
for text in sys.stdin:
    if text.strip() == "close":
        os.close(write_end)
        print(process.wait(), flush=True)
"""


class FakeRun:
    """A trainer stand-in, its supervisor and its fake engine, by pid."""

    def __init__(self, folder: Path, kind: str = "plain", *, forks: bool = False) -> None:
        self.engine_id = uuid.uuid4().hex
        self.record = folder / "state" / f"{self.engine_id}.json"
        self.sockets = folder / "sockets"
        self.sockets.mkdir()
        (self.sockets / "api.sock").touch()
        worker = folder / "worker"
        script = folder / "engine.py"
        script.write_text(FAKE_ENGINE)
        options = ["--engine_id", self.engine_id, "--record", str(self.record), "--run_dir", str(folder)]
        options += ["--socket_folder", str(self.sockets), "--grace_s", "0.3"]
        options += ["--", sys.executable, "-S", str(script), str(folder), kind]
        self.owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, "forks" if forks else "alone", worker, supervisor.__file__, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: (folder / "api").exists() and (forks is False or worker.exists()))
        self.api = int((folder / "api").read_text())
        self.core = int((folder / "core").read_text())
        self.worker = int(worker.read_text()) if forks else None
        if kind == "exits":
            return
        wait_for(self.record.exists)
        self.supervisor = registry.read_record(self.record).supervisor.pid

    def watchers(self) -> list[int]:
        """The supervisor and its guard, by the engine's id on their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and supervisor.birth(int(entry.name)):
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if supervisor.__file__.encode() in words and self.engine_id.encode() in words and b"-c" not in words:
                    found.append(int(entry.name))
        return found

    def everything_is_gone(self) -> bool:
        """No process of the engine, no watcher, no socket folder, no record."""
        engine = [pid for pid in (self.api, self.core) if supervisor.birth(pid)]
        return not (engine or self.watchers() or self.sockets.exists() or self.record.exists())


def kill(*pids: int) -> None:
    """kill -9, all of them as nearly at once as can be."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[..., FakeRun]]:
    """Starts fake runs, and kills by pid whatever a failing test leaves."""
    started: list[FakeRun] = []

    def start(kind: str = "plain", *, forks: bool = False) -> FakeRun:
        started.append(FakeRun(tmp_path, kind, forks=forks))
        return started[-1]

    yield start
    for run in started:
        for pid in (run.owner.pid, run.api, run.core, run.worker, *run.watchers()):
            if pid is not None and supervisor.birth(pid):
                kill(pid)
        run.owner.communicate()


def test_nothing_survives_a_killed_trainer(runs: Callable[..., FakeRun]) -> None:
    run = runs()
    kill(run.owner.pid)
    wait_for(run.everything_is_gone)


def test_nothing_survives_a_killed_trainer_whose_forked_worker_still_holds_the_pipe(
    runs: Callable[..., FakeRun],
) -> None:
    run = runs(forks=True)
    kill(run.owner.pid)
    wait_for(run.everything_is_gone)
    assert run.worker is not None
    assert supervisor.birth(run.worker), "the worker is not ours to kill"


def test_nothing_survives_when_processes_ignore_sigterm(runs: Callable[..., FakeRun]) -> None:
    run = runs("stubborn")
    kill(run.owner.pid)
    wait_for(run.everything_is_gone)


@pytest.mark.parametrize("kind", ["plain", "stubborn"])
def test_nothing_survives_a_killed_supervisor(runs: Callable[..., FakeRun], kind: str) -> None:
    run = runs(kind)
    kill(run.supervisor)
    wait_for(run.everything_is_gone)


def test_nothing_survives_a_killed_api_server(runs: Callable[..., FakeRun]) -> None:
    run = runs()
    kill(run.api)
    wait_for(run.everything_is_gone)


def test_nothing_survives_a_killed_engine_core(runs: Callable[..., FakeRun]) -> None:
    run = runs()
    kill(run.core)
    wait_for(run.everything_is_gone)


@pytest.mark.parametrize(
    "victims",
    [
        ("supervisor", "api"),
        ("api", "supervisor"),
        ("owner", "supervisor"),
        ("owner", "api"),
        ("owner", "supervisor", "api"),
        ("api", "supervisor", "owner"),
        ("owner", "supervisor", "core"),
        ("owner", "supervisor", "api", "core"),
    ],
)
def test_nothing_survives_when_several_are_killed_at_once(
    runs: Callable[..., FakeRun], victims: tuple[str, ...]
) -> None:
    run = runs()
    pids = {"owner": run.owner.pid, "supervisor": run.supervisor, "api": run.api, "core": run.core}
    kill(*(pids[name] for name in victims))
    wait_for(run.everything_is_gone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_supervisor_ends_the_engine(runs: Callable[..., FakeRun], number: int) -> None:
    run = runs()
    os.kill(run.supervisor, number)
    wait_for(run.everything_is_gone)


def test_a_closed_pipe_ends_the_engine_and_the_exit_code_names_the_signal(runs: Callable[..., FakeRun]) -> None:
    run = runs()
    out, _ = run.owner.communicate("close\n")
    assert int(out) == 128 + signal.SIGTERM
    assert run.everything_is_gone()


def test_the_exit_code_of_an_engine_that_leaves_by_itself_is_passed_on(runs: Callable[..., FakeRun]) -> None:
    run = runs("exits")
    wait_for(run.everything_is_gone)  # before the pipe is closed, which would end it by a signal
    out, _ = run.owner.communicate("close\n")
    assert int(out) == 7


def test_the_engine_inherits_no_end_of_the_pipe(runs: Callable[..., FakeRun]) -> None:
    run = runs()

    def pipes(pid: int) -> list[str]:
        found = []
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                found.append(os.readlink(link) if int(link.name) > 2 else "")
        return [target for target in found if target.startswith("pipe:")]

    # Whoever has just started a process holds the pipe by which it hears of the start for a moment longer.
    wait_for(lambda: not pipes(run.api) and not pipes(run.core), timeout_s=10.0)


def test_a_command_that_cannot_run_gives_127_and_leaves_nothing(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    line = [sys.executable, "-I", "-S", supervisor.__file__, "--death_fd", str(read_end), "--owner_pid"]
    line += [str(os.getpid()), "--engine_id", "x" + uuid.uuid4().hex, "--", str(tmp_path / "absent")]
    done = subprocess.run(line, pass_fds=(read_end,), capture_output=True, text=True, check=False, timeout=60)
    os.close(read_end)
    os.close(write_end)
    assert done.returncode == 127
    assert "cannot start" in done.stderr


def test_ending_an_engine_leaves_other_processes_and_their_exit_codes_alone() -> None:
    other = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.exit(5)"])
    assert supervisor.end_engine(uuid.uuid4().hex, None) == []
    assert other.wait() == 5
