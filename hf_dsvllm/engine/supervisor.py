"""Keeps the vLLM process from outliving the training process, however either of them dies.

    trainer ──starts──► supervisor ──starts──► API server ──starts──► EngineCore, workers
       │ write end of a pipe │ fork                 (one session and process group of their own)
       └──── closes ────►    └──► guard

* The trainer holds the only write end of a pipe.  End of file on it, however the trainer died, ends the engine at once.
  A forked child of the trainer (a dataloader worker) may still hold a copy; so the supervisor also looks twice a second
  whether its parent is still the trainer.  The engine inherits neither end.
* SIGTERM, SIGINT, SIGHUP, or the API server leaving by itself end the engine too; its exit code is passed on.
* A SIGKILLed supervisor is followed by its guard, a fork in another session that does nothing until then; the API
  server also asks the kernel for SIGTERM in that case (PR_SET_PDEATHSIG).  This covers the one combination nobody else
  can see: supervisor and API server killed together, which orphans EngineCore and its memory (vllm-project/vllm#55510).
* Ending means SIGTERM to every process of the engine, up to `grace_s` seconds, then SIGKILL until none is left.  A
  process belongs to the engine when it is in the API server's session or process group, or carries its mark in the
  environment.

It runs by its path with `python -I -S` and needs nothing but the standard library and /proc, so that it starts in a few
hundredths of a second and stays small beside a training run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

MARK = "HF_DSVLLM_ENGINE_ID"  # environment variable that every process of one engine carries
GRACE_S = 10.0
KILL_S = 10.0  # SIGKILL works at once except for a process in uninterruptible sleep
PARENT_POLL_S = 0.5
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def process_stat(pid: int) -> tuple[str, int, int, str] | None:
    """(state, process group, session, birth) of a live `pid` from /proc, or None; birth is boot id + start tick.

    The birth tells a process from a later one that was given the same number, also across reboots.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before may hold spaces and brackets
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except (OSError, ValueError):
        return None
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return fields[0], int(fields[2]), int(fields[3]), f"{boot}:{fields[19]}"


def birth(pid: int) -> str | None:
    """The birth of a live process, or None if there is none (a zombie counts as gone)."""
    stat = process_stat(pid)
    return None if stat is None else stat[3]


def engine_processes(engine_id: str, leader: int | None) -> list[int]:
    """Live processes of one engine: in `leader`'s session or group, or marked with `engine_id`; never the caller.

    `leader` must be None unless the caller knows that the number still means this engine.
    """
    mark = f"{MARK}={engine_id}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        stat = process_stat(int(name))
        if stat is None:
            continue
        if leader is not None and leader in stat[1:3]:
            found.append(int(name))
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:  # another user's: refused
            if mark in file.read().split(b"\0"):
                found.append(int(name))
    return found


def end_engine(engine_id: str, leader: int | None, grace_s: float = GRACE_S) -> list[int]:
    """End every process of the engine: SIGTERM, up to `grace_s` seconds, SIGKILL; returns what is left (usually [])."""
    left = engine_processes(engine_id, leader)
    send(left, signal.SIGTERM)
    send(left, signal.SIGCONT)  # a stopped process heeds nothing else but SIGKILL
    for number, limit_s in ((None, grace_s), (signal.SIGKILL, KILL_S)):
        deadline = time.monotonic() + limit_s
        while left and time.monotonic() < deadline:
            if number is not None:
                send(left, number)
            reap_children()
            time.sleep(0.05)
            left = engine_processes(engine_id, leader)  # again, since a dying process may just have forked
    return left


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


EXIT_CODES: dict[int, int] = {}  # of this process's own and adopted children, filled by reap_children


def reap_children() -> None:
    """Collect ended children without blocking, so that none stays a zombie; only the supervisor and guard have any."""
    while IS_SUPERVISOR:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        EXIT_CODES[pid] = os.waitstatus_to_exitcode(status)


IS_SUPERVISOR = False  # set by main: a library user of end_engine must not lose its own children's exit codes


def write_record(path: str, record: dict[str, object]) -> None:
    """Write the engine's registry file atomically; a home that cannot be written only costs the record."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
        os.replace(temporary, path)
    except OSError as error:
        print(f"hf-dsvllm supervisor: cannot write the engine record {path}: {error}", file=sys.stderr, flush=True)


def remove_traces(record: str | None, socket_folder: str | None) -> None:
    """Remove the registry file and the folder of sockets."""
    if record is not None:
        with contextlib.suppress(OSError):
            os.unlink(record)
    if socket_folder is not None:
        with contextlib.suppress(OSError):
            for name in os.listdir(socket_folder):
                os.unlink(os.path.join(socket_folder, name))
            os.rmdir(socket_folder)


def fork_guard(options: argparse.Namespace) -> int:
    """Fork the guard and return the write end of its pipe: the engine's pid goes in, then b"done" on a clean end."""
    read_end, write_end = os.pipe()
    if os.fork():
        os.close(read_end)
        return write_end
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.close(write_end)
    os.close(options.death_fd)
    words = []
    while chunk := os.read(read_end, 64):
        words.append(chunk)
    said = b"".join(words).split()
    if b"done" not in said:
        end_engine(options.engine_id, int(said[0]) if said else None, options.grace_s)
        remove_traces(options.record, options.socket_folder)
    os._exit(0)


def tell(guard: int, word: str) -> None:
    """Write one word to the guard, which may have been killed."""
    with contextlib.suppress(OSError):
        os.write(guard, f"{word} ".encode())


def follow_parent(supervisor_pid: int) -> None:
    """In the child before exec: SIGTERM when the supervisor dies; leave at once if it already has."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor_pid:
        os._exit(1)


def watch(options: argparse.Namespace, engine_pid: int, wakeup: int, asked: list[int]) -> str:
    """Wait until the engine has to end, and say why."""
    while True:
        ready, _, _ = select.select([options.death_fd, wakeup], [], [], PARENT_POLL_S)
        if wakeup in ready:
            os.read(wakeup, 64)
        reap_children()
        if engine_pid in EXIT_CODES:
            return f"vLLM left by itself with exit code {EXIT_CODES[engine_pid]}"
        if asked:
            return f"{signal.Signals(asked[0]).name} received"
        if options.death_fd in ready and not os.read(options.death_fd, 64):
            return "the training process closed its pipe"
        if os.getppid() != options.owner_pid:
            return "the training process is gone"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The supervisor's command line; everything after `--` is the engine's."""
    parser = argparse.ArgumentParser(prog="hf_dsvllm.engine.supervisor", allow_abbrev=False)
    parser.add_argument("--death_fd", type=int, required=True, help="read end of the pipe the owner holds")
    parser.add_argument("--owner_pid", type=int, required=True, help="the process whose end ends the engine")
    parser.add_argument("--engine_id", required=True, help="mark of the engine's processes")
    parser.add_argument("--record", help="registry file, written on start and removed at the end")
    parser.add_argument("--run_dir", help="only written into the record")
    parser.add_argument("--socket_folder", help="folder that is emptied and removed at the end")
    parser.add_argument("--grace_s", type=float, default=GRACE_S, help="seconds between SIGTERM and SIGKILL")
    if "--" not in argv or argv[-1] == "--":
        parser.error("the engine's command is missing after --")
    split = argv.index("--")
    options = parser.parse_args(argv[:split])
    options.command = list(argv[split + 1 :])
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run one engine to its end; returns its exit code (128 + signal number if a signal ended it)."""
    global IS_SUPERVISOR
    options = parse(sys.argv[1:] if argv is None else argv)
    IS_SUPERVISOR = True
    asked: list[int] = []
    guard = fork_guard(options)
    wakeup, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: asked.append(received))
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # a Python handler, so that it reaches the wakeup pipe
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the API server come to us, not to a lazy pid 1

    me = os.getpid()
    try:
        engine = subprocess.Popen(
            options.command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: follow_parent(me),
            env={**os.environ, MARK: options.engine_id},
        )
    except OSError as error:
        print(f"hf-dsvllm supervisor: cannot start {options.command[0]}: {error}", file=sys.stderr, flush=True)
        tell(guard, "done")
        remove_traces(options.record, options.socket_folder)
        return 127
    tell(guard, str(engine.pid))
    if options.record is not None:
        record = {
            "engine_id": options.engine_id,
            "host": os.uname().nodename,
            "owner": {"pid": options.owner_pid, "birth": birth(options.owner_pid)},
            "supervisor": {"pid": me, "birth": birth(me)},
            "engine": {"pid": engine.pid, "birth": birth(engine.pid)},
            "run_dir": options.run_dir,
            "command": options.command,
        }
        write_record(options.record, record)
    reason = watch(options, engine.pid, wakeup, asked)
    print(f"hf-dsvllm supervisor: ending the engine: {reason}", file=sys.stderr, flush=True)
    left = end_engine(options.engine_id, engine.pid, options.grace_s)
    if left:
        print(f"hf-dsvllm supervisor: these processes do not end: {left}", file=sys.stderr, flush=True)
        return 1  # the record stays, and so does the guard's attempt
    reap_children()
    remove_traces(options.record, options.socket_folder)
    tell(guard, "done")
    code = engine.returncode = EXIT_CODES.get(engine.pid, 1)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
