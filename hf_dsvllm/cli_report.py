"""The command `report`.  It parses and prints; the work is in `hf_dsvllm.report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_dsvllm.console import say

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="A run folder (--output_dir), finished or in progress.")],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: RUN/report.html.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again whenever the run's files change, until Ctrl-C.")
    ] = False,
) -> None:
    """Write one HTML page of a run: loss, scores, answers side by side, memory, time, export; open it in a browser."""
    from hf_dsvllm.report import watch_run, write_report

    if watch:
        say("watching; the page in the browser follows by itself, Ctrl-C ends this")
        watch_run(run, out)
    else:
        print(write_report(run, out))
