"""The planner's choice for a piece of work, held against the fastest way of doing it that was measured.

The choice is that of `make_plan`, among every preset, micro-batch and recompute it knows, not among the cells that
happen to be measured.  Where the chosen way was not measured, nothing is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import matrix
from matrix import Cell

from hf_dsvllm.hardware import parse_machine
from hf_dsvllm.planner.cards import Rates
from hf_dsvllm.planner.search import Job, make_plan

__all__ = ["Choice", "Work", "choices", "matrix", "shares", "table"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Work:
    """What is to be done; `source`: the measurement, since only cells of one host are compared."""

    source: str
    shape: str
    world: int
    length: int
    method: str
    loss: str
    batch: int

    @property
    def words(self) -> str:
        return f"{self.shape} {self.method}, {self.world} GPU, {self.batch} x {self.length}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`cell` is what `make_plan` chooses, `picked` its row or None where it was not measured, `best` the fastest."""

    case: str
    work: Work
    cell: Cell
    picked: Any
    best: Any
    ways: int


def work_of(row: Any) -> Work:
    cell: Cell = row.cell
    return Work(
        source=row.source,
        shape=cell.shape,
        world=cell.world,
        length=cell.length,
        method=row.setup.method,
        loss=cell.loss,
        batch=cell.world * cell.micro * cell.accumulation,
    )


def chosen_cell(work: Work, row: Any, rates: Rates) -> Cell | None:
    """What the planner chooses for this work on the machine it was measured on."""
    job = Job(
        shape=row.setup.shape,
        machine=parse_machine(f"{work.world}xH200"),
        rates=rates,
        length=work.length,
        global_batch=work.batch,
        method=work.method,  # type: ignore[arg-type]
        loss=work.loss,  # type: ignore[arg-type]
    )
    chosen = make_plan(job).chosen
    if chosen is None:
        return None
    setup = chosen.setup
    return Cell(
        shape=work.shape,
        preset=setup.preset.name,
        world=setup.world,
        micro=setup.micro,
        accumulation=setup.accumulation,
        length=setup.length,
        recompute=setup.recompute,
        loss=work.loss,  # type: ignore[arg-type]
    )


def choices(rows: Sequence[Any]) -> list[Choice]:
    """For each work that was measured in two ways or more: the choice, and the fastest of them."""
    found = []
    for work in sorted({work_of(row) for row in rows}):
        ours = [row for row in rows if work_of(row) == work]
        ran = [row for row in ours if row.seconds]
        cell = chosen_cell(work, ours[0], ours[0].rates) if len(ran) >= 2 else None
        if cell is None:
            continue
        # a cell that ran without a time of its own says nothing; one that ran out of memory was a wrong choice
        picked = [row for row in ours if row.cell.name == cell.name and (row.seconds or row.status == "oom")]
        found.append(
            Choice(
                case="".join(sorted({row.cell.case for row in ours if row.cell.case})),
                work=work,
                cell=cell,
                picked=picked[0] if picked else None,
                best=max(ran, key=speed),
                ways=len(ran),
            )
        )
    return found


def speed(row: Any) -> float:
    """Measured tokens a second; 0 where the cell did not run."""
    return row.cell.tokens / row.seconds if row.seconds else 0.0


def shares(rows: Sequence[Any]) -> dict[Work, float]:
    """Speed of the choice over that of the fastest, of those choices that were measured."""
    return {
        choice.work: speed(choice.picked) / speed(choice.best) for choice in choices(rows) if choice.picked is not None
    }


def table(rows: Sequence[Any]) -> str:
    lines = [
        "| case | work | choice | tokens/s | best of the ways measured | share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    every = choices(rows)
    for choice in every:
        best = f"{label(choice.best.cell)} {speed(choice.best):,.0f} of {choice.ways}"
        if choice.picked is None:
            mine = "not measured | " + best + " | –"
        else:
            share = speed(choice.picked) / speed(choice.best)
            mine = f"{speed(choice.picked):,.0f} | {best} | {100 * share:.0f} %"
        lines.append(f"| {choice.case} | {choice.work.words} | {label(choice.cell)} | {mine} |")
    measured = sum(choice.picked is not None for choice in every)
    lines += ["", f"Of {len(every)} choices {measured} were measured; the others are not counted."]
    return "\n".join(lines)


def label(cell: Cell) -> str:
    return f"{cell.preset} {cell.micro}x{cell.accumulation}{' recompute' if cell.recompute else ''}"
