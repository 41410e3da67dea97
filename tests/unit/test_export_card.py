"""The model card: what a run's files lack or spoil costs a line of the card and never the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm.export.make import REPORT
from tests.export_runs import export, run

__all__ = ["run"]  # a fixture

NAME = "eval_gen_test_exact"


def scored(run: Path, text: str) -> None:
    (run / "evals").mkdir()
    (run / "evals" / "scores.jsonl").write_text(text)


@pytest.mark.parametrize("errors", [{NAME: None}, {}])
def test_a_score_without_a_standard_error_has_a_dash_for_it(errors: dict[str, Any], run: Path, tmp_path: Path) -> None:
    scored(run, json.dumps({"step": 4, "scores": {NAME: 1.0}, "standard_errors": errors}))
    report: Any = export(run, tmp_path / "out")
    assert "| test_exact | 1 | – |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert report.remarks == ()


@pytest.mark.parametrize("text", ['{"step": 4, "sco', '{"step": 4}', "[]", '{"step": 4, "scores": {"x": "high"}}'])
def test_damaged_scores_cost_the_card_its_scores_and_no_export(text: str, run: Path, tmp_path: Path) -> None:
    scored(run, text)
    report: Any = export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Training" in card
    assert "## Scores" not in card
    (remark,) = report.remarks
    assert remark.startswith("the model card lacks the scores of evals/scores.jsonl, which cannot be read (")
    assert json.loads((tmp_path / "out" / REPORT).read_text())["notes"] == [remark]


def test_a_record_with_odd_values_costs_the_card_its_table_and_no_export(run: Path, tmp_path: Path) -> None:
    file = run / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": {"rows": "many"}}))
    report: Any = export(run, tmp_path / "out")
    assert "## Export" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "what run.json says of the training" in report.remarks[0]
