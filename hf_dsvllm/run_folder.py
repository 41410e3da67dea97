"""One run at a time in an output folder, and what killed runs left behind, found by record and cleared away.

A run holds a POSIX lock on RUN/.running: forked workers do not inherit it, and it ends with the process however that
ends.  A small file beside the engines' registry remembers where the run is, so that `hf-dsvllm doctor` finds the
half-written files of one that was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_dsvllm.console import say
from hf_dsvllm.engine.registry import ProcessRef, state_folder
from hf_dsvllm.engine.server import SOCKET_FOLDERS, socket_bases
from hf_dsvllm.engine.supervisor import birth, remove_traces
from hf_dsvllm.errors import ConfigError, Problem
from hf_dsvllm.files import write_json

__all__ = ["Leftover", "leave", "leftovers", "occupy", "remove", "set_aside_earlier_run"]

LOCK = ".running"
# Where a run writes; what `files.atomic_folder` and `files.write_text` make there ends in eight characters and .tmp.
WRITTEN = (".", "snapshots", "evals", "engine")
HALF_WRITTEN = re.compile(r"\.(?!report).+\.[a-z0-9_]{8}\.tmp")  # a report is another process's, at any time
# What an export of a snapshot reads beside it.
OF_SNAPSHOTS = ("run.json", "tokenizer")
POINTERS = ("best.json", "latest.json")
# A server binds its socket within a second of making the folder.
SETTLED_S = 60.0
_held: dict[Path, int] = {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A path that no live process needs, and what it was."""

    path: Path
    what: str


def occupy(run_dir: Path) -> list[Path]:
    """Hold the only right to train into `run_dir` until `leave` or the end of the process.

    Clears away the half-written files of a killed run there and returns their paths.  ConfigError if a live run has it,
    or if it cannot be written; a second call in the same process does nothing.  File systems without locks are trusted.
    """
    folder = run_dir.absolute()
    if folder in _held:
        return []
    me = {"run_dir": str(folder), "host": os.uname().nodename, "pid": os.getpid(), "birth": birth(os.getpid())}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _held[folder] = _locked(folder)
        os.ftruncate(_held[folder], 0)
        os.pwrite(_held[folder], json.dumps(me).encode(), 0)
    except OSError as error:
        leave(folder)
        raise ConfigError(
            [Problem(f"output_dir {folder} cannot be used: {error.filename or folder / LOCK}: {error.strerror}",
                     "--output_dir a folder of your own, with room on its disk; a .running that is left of another "
                     "user's run may be removed")]
        ) from None  # fmt: skip
    with contextlib.suppress(OSError):  # a home that cannot be written costs only doctor's knowledge
        write_json(_record(folder), me)
    atexit.register(_leave_at_exit, folder, os.getpid())
    found = list(_half_written(folder))
    for path in found:
        remove(Leftover(path=path, what="half written"))
    return found


def leave(run_dir: Path) -> None:
    """Give the folder free; safe to call twice."""
    folder = run_dir.absolute()
    descriptor = _held.pop(folder, None)
    if descriptor is None:
        return
    for path in (folder / LOCK, _record(folder)):
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(descriptor)


def leftovers() -> tuple[Leftover, ...]:
    """What killed runs and engines left on this machine: half-written files, locks, records, folders of sockets."""
    return (*_of_killed_runs(), *_socket_folders())


def remove(leftover: Leftover) -> None:
    """Remove it; OSError if that is refused."""
    path = leftover.path
    if path.is_dir() and path.name.startswith(SOCKET_FOLDERS):
        remove_traces(None, str(path))
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _leave_at_exit(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        leave(folder)


def _locked(folder: Path) -> int:
    """A descriptor of the lock file with the lock on it."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise ConfigError(
                [Problem(f"output_dir {folder} is in use by a run that is going on ({holder})",
                         "--output_dir ANOTHER_FOLDER, or wait for that run to end")]
            ) from None  # fmt: skip
        except OSError:
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # its last owner removed the file between our open and our lock


def _holder(text: bytes) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _record(folder: Path) -> Path:
    """Beside the engines' registry: named by folder and process, so that no two runs share one."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return state_folder().parent / "runs" / f"{name}-{os.getpid()}.json"


def _of_killed_runs() -> Iterator[Leftover]:
    seen: set[Path] = set()
    for file in sorted((state_folder().parent / "runs").glob("*.json")):
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            folder, owner = Path(run["run_dir"]), ProcessRef(pid=run["pid"], birth=run["birth"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if run["host"] != os.uname().nodename or owner.alive:
            continue
        yield Leftover(path=file, what=f"record of a run in {folder} whose process {owner.pid} is gone")
        if folder in seen or _is_locked(folder):
            continue
        seen.add(folder)
        for path in _half_written(folder):
            yield Leftover(path=path, what=f"half written by a run in {folder} whose process {owner.pid} is gone")


def _half_written(folder: Path) -> Iterator[Path]:
    for place in WRITTEN:
        with contextlib.suppress(OSError):
            yield from sorted(item for item in (folder / place).iterdir() if HALF_WRITTEN.fullmatch(item.name))


def _is_locked(folder: Path) -> bool:
    """Whether a live run, started later, has this folder."""
    if folder in _held:
        return True
    try:
        with (folder / LOCK).open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _socket_folders() -> Iterator[Leftover]:
    """Folders of ours in which nothing listens, older than a start takes, that no process has on its command line."""
    bases = dict.fromkeys((tempfile.gettempdir(), *socket_bases()))
    for base in map(Path, bases):
        try:
            found = sorted(item for item in base.glob(f"{SOCKET_FOLDERS}????????") if item.is_dir())
        except OSError:
            continue
        for folder in found:
            with contextlib.suppress(OSError):
                status = folder.stat()
                young = time.time() - status.st_mtime < SETTLED_S
                if status.st_uid == os.getuid() and not young and not _in_use(folder):
                    yield Leftover(path=folder, what="sockets of an engine that is gone")


def _in_use(folder: Path) -> bool:
    named = os.fsencode(folder)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                if named in file.read():
                    return True
    for path in folder.iterdir():  # an engine of another container that shares this folder
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return True
    return False


def set_aside_earlier_run(run_dir: Path, *, evals: str, snapshots: str, exports: Sequence[str]) -> None:
    """Keep what an earlier run left in the same folder apart from what the run that starts afresh writes there.

    Evaluations, exports, and snapshots that are pointed to are renamed to NAME-before-<n>, one n for all; the record
    and the tokenizer of the earlier run go with its snapshots.  Where the pointers lead nowhere, only they go.
    """
    names = [name for name in (evals, *exports) if (run_dir / name).is_dir()]
    if any(_leads_to_a_snapshot(run_dir / snapshots / pointer) for pointer in POINTERS):
        names.append(snapshots)
        for name in OF_SNAPSHOTS:
            with contextlib.suppress(FileNotFoundError):
                (run_dir / name).rename(run_dir / snapshots / name)
    else:
        for pointer in POINTERS:
            (run_dir / snapshots / pointer).unlink(missing_ok=True)
    if not names:
        return
    taken = {path.name for path in run_dir.iterdir()}
    number = next(n for n in itertools.count(1) if taken.isdisjoint(f"{name}-before-{n}" for name in names))
    for name in names:
        (run_dir / name).rename(run_dir / f"{name}-before-{number}")
    moved = ", ".join(f"{name} to {name}-before-{number}" for name in names)
    say(f"{run_dir} holds what an earlier run left, and this one starts afresh: moved {moved}")


def _leads_to_a_snapshot(pointer: Path) -> bool:
    """Whether it points to a folder that is there."""
    try:
        found = json.loads(pointer.read_text(encoding="utf-8"))
        return (pointer.parent / found["path"]).is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        return False
