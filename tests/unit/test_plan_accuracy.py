"""The planner against the cells measured on H200s: what it is held to, and that no verdict was wrong."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "planner"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the measurements are in the repository only")


@pytest.fixture(scope="module")
def report() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import report as module
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def rows(report: Any) -> Any:
    return report.load_rows(FOLDER / "results")


def test_there_are_sixty_cells_and_half_of_them_are_held_out(rows: Any) -> None:
    assert len(rows) >= 60
    held = sum(row.held_out for row in rows)
    assert 0.35 < held / len(rows) < 0.65
    assert any(row.status == "oom" for row in rows)


@pytest.mark.parametrize(
    ("quantity", "mean", "worst"),
    [("allocated", 0.02, 0.05), ("reserved", 0.04, None), ("host", 0.05, 0.05), ("seconds", 0.10, None)],
)
@pytest.mark.parametrize("held_out_only", [False, True])
def test_predictions_are_as_close_as_promised(
    report: Any, rows: Any, quantity: str, mean: float, worst: float | None, held_out_only: bool
) -> None:
    chosen = [row for row in rows if row.held_out or not held_out_only]
    errors = [abs(error) for error in report.errors(chosen, quantity)]
    assert len(errors) >= 15
    assert statistics.mean(errors) <= mean
    assert worst is None or max(errors) <= worst


def test_what_fits_and_what_does_not_was_said_right(report: Any, rows: Any) -> None:
    assert report.fit_verdicts(rows) == []


def test_the_choice_is_as_fast_as_the_best_that_was_measured(report: Any, rows: Any) -> None:
    shares = report.shares(rows)
    assert len(shares) >= 8
    assert min(shares.values()) >= 0.95, shares
