"""The command line of a grid of measurements."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

__all__ = ["options_parser", "parse"]


def options_parser(
    description: str,
    *,
    gpus: int,
    cell_s: float,
    steps: int,
    only: str = "cells whose name contains one of these words",
) -> argparse.ArgumentParser:
    """The options that every grid measured by `Measurement` has; the numbers are this grid's defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; kept between calls")
    parser.add_argument("--copy_to", type=Path, help="folder that results and logs are copied to as well")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=gpus)
    parser.add_argument("--threads", type=int, help="of each process; default: the CPUs shared out")
    parser.add_argument("--budget_s", type=float, default=560.0)
    parser.add_argument("--cell_s", type=float, default=cell_s, help="longest time of one cell")
    parser.add_argument("--least_s", type=float, default=15.0, help="no cell is started with less time left")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--grow_gib", type=int, default=0, help="host memory to touch in the background at the start")
    parser.add_argument("--note", help="a sentence for the report: what was special about these cells")
    parser.add_argument("--only", nargs="*", help=only)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line, the threads of a process settled."""
    options = parser.parse_args()
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // max(1, options.gpus))
    return options
