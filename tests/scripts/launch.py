"""Start a command in the background and find every process that comes of it, in whatever session it hides."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.conftest import RUN_MARK, kill_marked


class Launched:
    """A running command; its output is in a file, as a process that outlives it would hold a pipe open."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self._mark = uuid.uuid4().hex
        self._log = folder / "output.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", RUN_MARK: self._mark},
            )

    def wait(self, timeout_s: float) -> int:
        """The exit code; after `timeout_s` everything is killed and the test fails with the output so far."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output()[-6000:]}") from None

    def ended(self) -> bool:
        return self.process.poll() is not None

    def output(self) -> str:
        """stdout and stderr so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def left(self) -> list[psutil.Process]:
        """Every live process that inherited this command's mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(RUN_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """Kill whatever is left."""
        kill_marked(self._mark)
        self.process.wait()


def launch(folder: Path, command: Sequence[str]) -> Launched:
    """Start `command` in a session of its own; its output goes to `folder`/output.log."""
    return Launched(folder, command)
