"""docs/evaluation.md says of every tested fault what the test holds it to."""

from __future__ import annotations

import re
from pathlib import Path

from tests.scripts.fault_cases import FAULTS

DOC = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"


def test_the_table_of_what_can_go_wrong_is_the_list_of_tested_faults() -> None:
    section = DOC.read_text(encoding="utf-8").partition("## What can go wrong")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert rows[0] == ("what happens", "what comes of it")
    assert rows[2:] == [(fault.fault, fault.outcome) for fault in FAULTS]
