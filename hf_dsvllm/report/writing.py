"""The page written beside its run, once or whenever the run's files change."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

from hf_dsvllm import __version__
from hf_dsvllm.console import say
from hf_dsvllm.errors import ReportError
from hf_dsvllm.files import write_text
from hf_dsvllm.report.page import page
from hf_dsvllm.report.reading import read_run, record_files

__all__ = ["watch_run", "write_report"]

SECONDS_BETWEEN_LOOKS = 2.0


def write_report(run: Path, out: Path | None = None, *, watched: bool = False) -> Path:
    """Write the report of `run` to `out` (default RUN/report.html) atomically and return its path.

    A `watched` page loads itself again every few seconds, until training has ended.

    Raises ReportError if `run` is no run folder or `out` cannot be written.
    """
    target = run / "report.html" if out is None else out
    report = read_run(run)
    now = datetime.datetime.now(datetime.UTC)
    text = page(report, version=__version__, now=now, watched=watched and not report.ended)
    if target.is_dir():
        raise ReportError(f"--out {target} is a folder; name a file, such as {target / 'report.html'}.")
    try:
        write_text(target, text)
    except OSError as error:
        raise ReportError(
            f"{target} cannot be written ({error.strerror}); name another file with --out FILE."
        ) from error
    return target


def watch_run(
    run: Path, out: Path | None = None, *, pause: Callable[[float], None] = time.sleep, looks: int | None = None
) -> None:
    """Write the report again whenever a file of the run changes, until Ctrl-C (or after `looks` looks).

    The page in the browser follows by itself; the last one written stands still.
    """
    seen: object = None
    try:
        while looks is None or looks > 0:
            state = fingerprint(run)
            if state != seen:
                target = write_report(run, out, watched=True)
                say(f"{'written' if seen is None else 'written again'}: {target}")
                seen = state
            looks = None if looks is None else looks - 1
            pause(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        say("no longer watching")
    if seen is not None:
        write_report(run, out)


def fingerprint(run: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of every file that a report reads."""
    found = []
    for path in record_files(run):
        try:
            status = path.stat()
        except OSError:  # removed between the listing and the look
            continue
        found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)
