"""Runs one Python program behind whatever walls the kernel grants; the inside of `hf_dsvllm.metrics.sandbox`.

    trainer ──starts──► keeper ──fork──► init ──fork──► the program
                        walls, clock     pid 1, if processes could be walled off

It is started by its path with `python -I -S`, in a session and a working folder of its own, and reads one JSON object
from stdin.  Each wall is tried by itself, since containers grant some and refuse others; the first line of stdout names
those that stand, the second is the verdict: the secret, if the program ran to its end, or why it did not.

* `nobody`: where the trainer is root, a user without rights, if that one may read this interpreter;
* `identity`: a user namespace in which the program holds no capability;
* `network`: a network namespace without interfaces;
* `processes`: a process namespace; when its first process ends, the kernel ends all others, escape or not;
* `files`: all of the file system read-only but a fresh tmpfs of bounded size in the working folder.

Without `processes` every descendant is ended that is still found as one (orphans come to the keeper, a subreaper).
Standard library only.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (  # linux/sched.h
    0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000  # linux/mount.h
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = (
    442,
    -100,
    0x8000,
    1,
)  # since Linux 5.12, on every machine type
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38  # linux/prctl.h
NOBODY = 65534
FIRST_TO_DIE = "1000"  # proc_pid_oom_score_adj(5): where memory runs out, the kernel ends these and not the trainer
KILL_S = 5.0
PYTHON = os.path.realpath(sys.executable)  # not a virtual environment's link to it
LIBC = ctypes.CDLL(None, use_errno=True)
# What the program's own interpreter executes: its source comes by stdin, so that it is in no file and no command line.
RUNNER = """
import json, os, sys
task = json.loads(sys.stdin.read())
out = os.fdopen(task["verdict_fd"], "w")
sys.stdin = open(os.devnull)
try:
    exec(compile(task["program"], "<answer>", "exec"), {"__name__": "__main__"})
except BaseException as error:
    verdict = f"{type(error).__name__}: {str(error)[:200]}".replace(chr(10), " ")
else:
    verdict = task["secret"]
out.write(verdict + chr(10))
out.flush()
os._exit(0)
"""


class OutOfTime(Exception):
    """The clock of the keeper."""


def raise_walls(task: dict, folder: str) -> list[str]:
    """Build those of `task["walls"]` that the kernel grants; returns their names."""
    walls, wanted = [], task["walls"]
    if "nobody" in wanted and os.getuid() == 0 and nobody_can_run_python():
        os.chown(folder, NOBODY, NOBODY)
        become_nobody()
        walls.append("nobody")
    uid, gid = os.getuid(), os.getgid()
    if "identity" not in wanted or LIBC.unshare(CLONE_NEWUSER) != 0:
        return walls
    walls.append("identity")
    with contextlib.suppress(OSError):
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {uid} 1"),
            ("gid_map", f"{NOBODY} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)
    for wall, flag in (("network", CLONE_NEWNET | CLONE_NEWIPC), ("processes", CLONE_NEWPID), ("files", CLONE_NEWNS)):
        if wall in wanted and LIBC.unshare(flag) == 0:
            walls.append(wall)
    if "files" in walls and not wall_off_files(folder, task["disk_bytes"]):
        walls.remove("files")
    return walls


def nobody_can_run_python() -> bool:
    """Whether interpreter and standard library can be read by others; in a home folder of root's they cannot."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            become_nobody()
            os._exit(0 if os.access(PYTHON, os.X_OK) and os.access(os.__file__, os.R_OK) else 1)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def become_nobody() -> None:
    """For good.  Limits on the number of processes bind this user; they never bind root."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self/uid_map would stay root's


def wall_off_files(folder: str, limit_bytes: int) -> bool:
    """Everything read-only, then a tmpfs over `folder`."""
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr
    path, options = folder.encode(), f"size={limit_bytes},mode=700".encode()
    return (
        LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), 32) == 0
        and LIBC.mount(b"tmpfs", path, b"tmpfs", MS_NOSUID | MS_NODEV, options) == 0
    )


def limit_resources(task: dict) -> None:
    """Hard limits, which only a privileged process could raise again."""
    for kind, limit in (
        (resource.RLIMIT_CPU, task["cpu_s"]),
        (resource.RLIMIT_AS, task["memory_bytes"]),
        (resource.RLIMIT_FSIZE, task["file_bytes"]),
        (resource.RLIMIT_NPROC, task["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def run_program(task: dict, folder: str, verdict_fd: int) -> None:
    """Become the program: a fresh interpreter that inherits nothing but the pipe of its source and of the verdict."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:  # a small writer: a program longer than a pipe's buffer would block here
        os.close(read_end)
        with contextlib.suppress(BrokenPipeError), os.fdopen(write_end, "w", encoding="utf-8") as pipe:
            json.dump({"program": task["program"], "secret": task["secret"], "verdict_fd": verdict_fd}, pipe)
        os._exit(0)
    os.close(write_end)
    os.dup2(read_end, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.set_inheritable(verdict_fd, True)
    os.chdir(folder)
    limit_resources(task)
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    env = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    os.execve(PYTHON, [PYTHON, "-I", "-S", "-c", RUNNER], env)


def forked(action, *arguments) -> int:
    """Fork; the child ends with `action`, by signal if its parent goes first.  Returns its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        action(*arguments)
    finally:
        os._exit(1)


def be_init(task: dict, folder: str, verdict_fd: int) -> None:
    """First process of the namespace: waits for the program; all others end with it."""
    program = forked(run_program, task, folder, verdict_fd)
    os.close(verdict_fd)
    while os.wait()[0] != program:  # orphans are its children too
        pass
    os._exit(0)


def end_children() -> None:
    """SIGKILL every child, and the orphans that come to us by that, until none is left (bounded)."""
    deadline = time.monotonic() + KILL_S
    while time.monotonic() < deadline:
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    os.kill(int(name), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def sound_the_clock(_signal, _frame) -> None:
    raise OutOfTime


def main() -> None:
    task, folder = json.loads(sys.stdin.read()), os.getcwd()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(FIRST_TO_DIE)  # and whatever is forked from here
    walls = raise_walls(task, folder)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the change of user, which clears it
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    print(*walls, flush=True)
    read_end, write_end = os.pipe()
    signal.signal(signal.SIGALRM, sound_the_clock)
    signal.setitimer(signal.ITIMER_REAL, task["wall_s"])
    child = forked(be_init if "processes" in walls else run_program, task, folder, write_end)
    os.close(write_end)
    try:
        os.waitpid(child, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except OutOfTime:
        verdict = f"took longer than {task['wall_s']:g} s"
    else:
        os.set_blocking(read_end, False)
        try:
            verdict = os.read(read_end, 4096).decode("utf-8", "replace").partition("\n")[0]
        except BlockingIOError:
            verdict = ""
        verdict = verdict or "ended before its tests did (exit, a signal or a limit)"
    end_children()
    print(verdict, flush=True)


if __name__ == "__main__":
    main()
