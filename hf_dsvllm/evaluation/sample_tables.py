"""The samples of an evaluation as a table in each `report_to` backend that has one: W&B, trackio, TensorBoard (text).

Scores reach every backend through `Trainer.log`; this is what a number does not say.  A backend that is absent or fails
costs a warning, never the run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.evaluation.history import ANSWERS, EVALS, read_rows

__all__ = ["log_samples", "read_samples"]

MAX_ROWS = 32  # of a task in one table: these tables are looked at, the whole is in evals/
MAX_TEXT = 500  # characters of a cell
COLUMNS = ("id", "prompt", "reference", "answer")
logger = logging.getLogger(__name__)
_writers: dict[str, Any] = {}

Row = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # columns, rows


def read_samples(run_dir: Path, step: int, limit: int = MAX_ROWS) -> list[dict[str, Any]]:
    """The first `limit` rows of each task at `step`, with the name of their `task`."""
    found = []
    for path in sorted((run_dir / EVALS).glob(f"step-{step:06d}.*.jsonl")):
        named = ANSWERS.fullmatch(path.name)
        rows = read_rows(path)
        for _, row in zip(range(limit), rows, strict=False):
            found.append({**row, "task": named[2] if named else path.stem})
    return found


def log_samples(args: Any, run_dir: Path, step: int) -> None:
    """Send the samples of `step` to each backend of `args.report_to` that has tables; main process, main thread."""
    for backend in args.report_to or ():
        send = BACKENDS.get(backend)
        if send is None:
            continue
        try:
            rows = read_samples(run_dir, step)
            tasks = dict.fromkeys(row["task"] for row in rows)
            if tasks:
                send(args, step, {task: table([row for row in rows if row["task"] == task]) for task in tasks})
        except Exception as error:  # a service or a file: whatever it raises, training goes on
            logger.warning("the sample table of step %d did not reach %s: %s: %s", step, backend,
                           type(error).__name__, error)  # fmt: skip


def table(rows: Sequence[Row]) -> Table:
    """The columns of a task's rows, its metrics last."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("scores", {})))
    cells = [
        [*(shown(row.get(column)) for column in COLUMNS), *(row.get("scores", {}).get(name) for name in metrics)]
        for row in rows
    ]
    return [*COLUMNS, *metrics], cells


def shown(value: Any) -> str:
    """A text, or chat messages as `role: content`, cut to what a cell has room for."""
    if isinstance(value, list | tuple):
        value = "\n".join(
            f"{item.get('role')}: {item.get('content')}" if isinstance(item, Mapping) else str(item) for item in value
        )
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def name_of(task: str) -> str:
    return f"gen_eval_samples/{task}"


def to_wandb(args: Any, step: int, tables: Mapping[str, Table]) -> None:
    import wandb

    if wandb.run is None:
        return
    logged = {
        name_of(task): wandb.Table(columns=list(columns), data=cells) for task, (columns, cells) in tables.items()
    }
    wandb.log({**logged, "train/global_step": step})  # the Trainer's own axis of steps


def to_trackio(args: Any, step: int, tables: Mapping[str, Table]) -> None:
    import trackio

    logged = {
        name_of(task): trackio.Table(columns=list(columns), data=cells) for task, (columns, cells) in tables.items()
    }
    trackio.log({**logged, "train/global_step": step})


def to_tensorboard(args: Any, step: int, tables: Mapping[str, Table]) -> None:
    """Into a folder of its own below the Trainer's: TensorBoard reads only one growing file a folder."""
    from torch.utils.tensorboard import SummaryWriter

    root = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs")
    folder = os.path.join(os.path.expanduser(root), "gen_eval_samples")
    writer = _writers.get(folder) or _writers.setdefault(folder, SummaryWriter(log_dir=folder))
    for task, (columns, cells) in tables.items():
        writer.add_text(name_of(task), markdown(columns, cells), step)
    writer.flush()


def markdown(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; what would end a cell or a line is escaped."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(cell_of(value) for value in line) + " |" for line in lines)


def cell_of(value: Any) -> str:
    text = "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
    return "<br>".join(text.splitlines())


BACKENDS: Mapping[str, Callable[[Any, int, Mapping[str, Table]], None]] = {
    "wandb": to_wandb,
    "trackio": to_trackio,
    "tensorboard": to_tensorboard,
}
