"""A bounded run of a program nobody has read: a process of its own behind the walls that the kernel grants.

What it is for: code that a model wrote by mistake or by chance does no harm (endless loops, full memory, fork bombs,
deleted files, stray downloads).  What it is not: a virtual machine.  The kernel is shared, every file that the training
process may read can be read, and where a container refuses user namespaces only the limits of resources remain.
`hf_dsvllm/metrics/sandbox_child.py` is its inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["WALLS", "Limits", "Outcome", "run_python"]

INSIDE = Path(__file__).with_name("sandbox_child.py")
WALLS = ("nobody", "identity", "network", "processes", "files")
MARGIN_S = 10.0  # for the two interpreters to start on a busy machine, and for the processes to be ended


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may take; `processes` are those of its user (of its namespace, where it has one)."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 2**30
    file_bytes: int = 16 * 2**20
    disk_bytes: int = 64 * 2**20
    processes: int = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Whether the program ran to its end without an exception, why not, and the `walls` that stood around it."""

    passed: bool
    reason: str
    walls: tuple[str, ...]


def run_python(program: str, *, limits: Limits | None = None) -> Outcome:
    """Run `program` in a fresh, empty folder with `python -I -S`: standard library only, no environment, no input.

    Its output is thrown away.  It passes if it runs to its last line; `sys.exit(0)` before that does not count.  Never
    raises for what the program does.
    """
    secret = secrets.token_hex(16)
    task = {**dataclasses.asdict(limits or Limits()), "walls": WALLS, "program": program, "secret": secret}
    with tempfile.TemporaryDirectory(prefix="hf-dsvllm-code-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(INSIDE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(json.dumps(task).encode(), timeout=task["wall_s"] + MARGIN_S)
        except subprocess.TimeoutExpired:
            output = b"\n"
        finally:
            end_group(process)
    lines = [*output.decode("utf-8", "replace").split("\n"), "", ""]
    verdict = lines[1] or "its keeper was ended or hung"
    passed = verdict == secret
    return Outcome(passed=passed, reason="" if passed else verdict, walls=tuple(lines[0].split()))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL whatever is left in the process group and collect its leader."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent input of a process that is gone
                pipe.close()
