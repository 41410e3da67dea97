"""Runs the faults of fault_cases.py, each in a trainer of its own with the fake engine under the real supervisor.

    python faults.py SPEC.json          (SPEC: {"model": folder, "out": folder, "faults": [name, …]})

The libraries are imported once; every trainer is a fork, before any thread exists.  OUT/<name>.json tells how it ended:
exit code or signal, output, the answers scored at each step and those the weights of that step give, and whatever was
left: processes, sockets, records, half-written files.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.scripts.fault_cases import FAULTS, STEPS, Fault
from tests.scripts.fault_trainer import Place, import_everything, train

SIDE_BY_SIDE = 2
POINT_S = 240.0  # until a point is reached
END_S = 300.0  # until the trainer has ended
GONE_S = 60.0  # until everything it started has ended: the supervisor's grace of 10 s and a margin
POLL_S = 0.02
MARK = "HF_DSVLLM_FAULT"
SMALL_DISK_BYTES = 8 << 20
SMALL_FILE_BYTES = 100_000  # more than the output of a run, less than a snapshot


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    chosen = [fault for fault in FAULTS if fault.name in spec["faults"]]
    import_everything()
    children = []
    for first in range(SIDE_BY_SIDE):
        child = os.fork()
        if child == 0:
            for fault in chosen[first::SIDE_BY_SIDE]:
                outcome(fault, Path(spec["model"]), Path(spec["out"]))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def outcome(fault: Fault, model: Path, out: Path) -> None:
    """Run one fault and write what came of it."""
    started = time.monotonic()
    case = Case(fault, model, out)
    try:
        found = case.run()
    except Exception:
        found = {"harness": traceback.format_exc(), "output": case.output()}
    finally:
        case.clean()
    found["seconds"] = round(time.monotonic() - started, 1)
    (out / f"{fault.name}.json").write_text(json.dumps(found), encoding="utf-8")


def is_dead(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
            in "ZX"
        )
    except OSError:
        return True


class Case:
    """One run, its processes and its folders; every path is short, as sockets want it."""

    def __init__(self, fault: Fault, model: Path, out: Path) -> None:
        self.fault = fault
        self.home = Path(tempfile.mkdtemp(prefix="dsf-", dir="/tmp"))
        self.place = Place(
            fault=fault, model=model, run=self.home / "disk" / "run", control=self.home / "control",
            temporary=self.home / "t", state=self.home / "state", files=self.home / "files",
        )  # fmt: skip
        for folder in (self.place.control, self.place.temporary, self.place.files, self.home / "disk"):
            folder.mkdir()
        self.log = out / f"{fault.name}.log"
        self.mark = self.home.name
        self.mounted = False
        self.held = fault.at
        self.port = free_port() if fault.ranks > 1 else 0
        self.trainers: dict[str, int] = {}
        self.ended: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        fault = self.fault
        for name in fault.control:
            (self.place.control / name).touch()
        if "small_disk" in fault.spoil:
            mounting = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(self.home / "disk")]
            with contextlib.suppress(FileNotFoundError):
                self.mounted = subprocess.run(mounting, capture_output=True, check=False).returncode == 0
        if fault.at:
            (self.place.control / f"hold.{fault.at}").touch()
        for rank in range(fault.ranks):
            self.trainers["trainer" if rank == 0 else f"rank{rank}"] = self.start(rank)
        if fault.at:
            self.wait(lambda: (self.place.control / fault.at).exists(), POINT_S, f"{fault.at} was not reached")
            for act in fault.acts:
                self.act(act)
            if fault.release:
                (self.place.control / f"go.{self.held}").touch()
        self.wait(lambda: self.has_ended("trainer"), END_S, "the trainer did not end", or_ended=False)
        for name in self.trainers:
            if not self.has_ended(name):
                self.wait(lambda name=name: self.has_ended(name), END_S, f"{name} did not end", or_ended=False)
        with contextlib.suppress(TimeoutError):
            self.wait(lambda: not self.left(), GONE_S, "", or_ended=False)
        return self.found()

    def start(self, rank: int) -> int:
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            log = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ[MARK] = self.mark
            if self.fault.ranks > 1:
                os.environ.update(dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)))
                os.environ.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(self.fault.ranks)))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port), GLOO_SOCKET_IFNAME="lo")
            train(self.place)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            leave_like_python(code)
        raise AssertionError

    # -- acts

    def act(self, act: str) -> None:
        verb, *whom = act.split()
        if verb.isupper():
            pids = [self.pid(name) for name in whom]
            for pid in pids:
                os.kill(pid, signal.Signals[f"SIG{verb}"])
            if verb == "KILL":  # on a busy machine that takes a moment, in which the others could go on
                self.wait(lambda: all(map(is_dead, pids)), GONE_S, f"{act} did not end them", or_ended=False)
        else:
            getattr(self, verb)(*whom)

    def pid(self, name: str) -> int:
        if name in self.trainers:
            return self.trainers[name]
        if name == "supervisor":
            (record,) = (self.place.state / "hf-dsvllm" / "engines").glob("*.json")
            return int(json.loads(record.read_text(encoding="utf-8"))["supervisor"]["pid"])
        newest = max(self.place.control.glob("start.*"), key=lambda file: int(file.suffix[1:]))
        return int(json.loads(newest.read_text(encoding="ascii"))[name])

    def free_memory(self) -> None:
        (self.place.control / "out-of-memory").unlink()

    def break_file(self) -> None:
        (self.place.files / "questions.jsonl").write_text("{ no longer JSON", encoding="utf-8")

    def delete_run_folder(self) -> None:
        shutil.rmtree(self.place.run)

    def delete_sockets(self) -> None:
        (folder,) = self.place.temporary.glob("dsvllm-*")
        shutil.rmtree(folder)

    def fill_disk(self) -> None:
        """All but a page of the file system; without the right to mount one, no file of the trainer may grow."""
        if not self.mounted:
            resource.prlimit(
                self.trainers["trainer"], resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, resource.RLIM_INFINITY)
            )
            return
        with (self.home / "disk" / "filler").open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))

    def free_disk(self) -> None:
        if self.mounted:
            (self.home / "disk" / "filler").unlink()
        else:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(self.trainers["trainer"], resource.RLIMIT_FSIZE, unlimited)

    def go_on_until(self, point: str) -> None:
        (self.place.control / f"hold.{point}").touch()
        (self.place.control / f"go.{self.held}").touch()
        self.held = point
        self.wait(lambda: (self.place.control / point).exists(), POINT_S, f"{point} was not reached")

    def trainer_ended(self) -> None:
        self.wait(lambda: self.has_ended("trainer"), END_S, "the trainer did not end", or_ended=False)

    def reap_leftovers(self) -> None:
        """What `hf-dsvllm doctor --reap` does, for this run's state alone; it must find the half-written snapshot."""
        command = [sys.executable, "-m", "hf_dsvllm", "doctor", "--reap", "--vllm_python", sys.executable]
        env = os.environ | {"XDG_STATE_HOME": str(self.place.state), "TMPDIR": str(self.place.temporary)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=POINT_S)
        (half,) = [line for line in done.stdout.splitlines() if "half written" in line and line.startswith("removed")]
        assert ".step-2." in half, half

    def second_run(self) -> None:
        before, size = self.trainers.pop("trainer"), len(self.output())
        self.trainers["second"] = self.start(0)
        self.wait(lambda: self.has_ended("second"), END_S, "the second run did not end", or_ended=False)
        assert self.ended["second"] == 2, self.output()[size:]
        said = self.output()[size:]
        assert f"in use by a run that is going on (process {before} on" in said, said
        self.trainers["trainer"] = before

    # -- the end

    def has_ended(self, name: str) -> bool:
        if name not in self.ended:
            pid, status = os.waitpid(self.trainers[name], os.WNOHANG)
            if pid:
                self.ended[name] = os.waitstatus_to_exitcode(status)
        return name in self.ended

    def wait(self, true: Callable[[], bool], limit_s: float, otherwise: str, *, or_ended: bool = True) -> None:
        deadline = time.monotonic() + limit_s
        while not true():
            if or_ended and "trainer" in self.trainers and self.has_ended("trainer"):
                raise RuntimeError(f"{otherwise}: the trainer ended with {self.ended['trainer']}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{otherwise} within {limit_s:.0f} s")
            time.sleep(POLL_S)

    def left(self) -> list[str]:
        """Whatever there should no longer be."""
        found = [f"process {process.pid}: {process.name()}" for process in marked(self.mark)]
        found += [str(path) for path in self.place.temporary.glob("dsvllm-*")]
        found += [str(path) for path in self.place.state.rglob("*") if path.is_file() and "runs" not in path.parts]
        found += [str(path) for path in self.place.run.rglob("*.tmp")]
        if self.ended.get("trainer") == 0:
            found += [str(path) for path in self.place.state.rglob("runs/*.json")]
            found += [str(path) for path in self.place.run.glob(".running")]
        return found

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def found(self) -> dict[str, Any]:
        code = self.ended["trainer"]
        answers = {}
        for file in sorted((self.place.run / "evals").glob("step-*.jsonl")):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            answers[rows[0]["step"]] = rows[0]["answer"]
        scores = self.place.run / "evals" / "scores.jsonl"
        lines = scores.read_text(encoding="utf-8").splitlines() if scores.exists() else []
        expected = self.place.files / "expected.json"
        return {
            "ended": signal.Signals(-code).name if code < 0 else code,
            "trained": (self.place.files / "trained").exists(),
            "scored": [json.loads(line)["step"] for line in lines],
            "answers": answers,
            "expected": json.loads(expected.read_text(encoding="utf-8")) if expected.exists() else {},
            "left": self.left(),
            "output": self.output(),
        }

    def clean(self) -> None:
        for name, pid in self.trainers.items():
            if not self.has_ended(name):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        for process in marked(self.mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.mounted:
            subprocess.run(["umount", str(self.home / "disk")], check=False)
        shutil.rmtree(self.home, ignore_errors=True)


def marked(mark: str) -> list[psutil.Process]:
    """Live processes of a case, by the variable they inherited (a fork shows its parent's, so trainers are not in)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def leave_like_python(code: int) -> None:
    """What the interpreter does at exit, in its order, in a fork: wait for threads, run atexit, flush, leave."""
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    assert STEPS > 2
    main()
