"""RUN/*/export_report.json → what was exported, and the proof that it is what was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.report.records import Export
from hf_dsvllm.report.tolerant import fact, mapping, number, read_object, word

__all__ = ["REPORTS", "read_exports"]

REPORTS = "*/export_report.json"
OF_AN_EARLIER_RUN = re.compile(r"-before-\d+$")  # set aside by a run that started afresh
PROOF = (  # value, its limit, in words
    ("mean_abs_difference", "mean_limit", "mean difference of the logits"),
    ("max_abs_difference", None, "largest difference of the logits"),
    ("greedy_agreement", "greedy_limit", "same next token"),
    ("answer_agreement", "greedy_limit", "same greedy answer"),
    ("mean_logprob_difference", None, "mean difference of log-probabilities"),
    ("adapter_share", None, "share of the adapter's effect that is there"),
)


def read_exports(run: Path, *, ended: bool) -> tuple[tuple[Export, ...], tuple[str, ...]]:
    """Every finished export of the run, and sentences about what is missing; `ended`: training has."""
    gaps: list[str] = []
    found = []
    for path in sorted(run.glob(REPORTS)):
        if OF_AN_EARLIER_RUN.search(path.parent.name):
            continue
        report = read_object(path, gaps, missing=None)
        if report:
            found.append(export_of(path.parent.name, report))
    if not found:
        gaps.append("There is no export in the run folder: it is made at the end, or elsewhere (--export_to, --out).")
    elif not ended:
        gaps.append("Training has not ended: this export was made by hand, or is of an earlier run in this folder.")
    return tuple(found), tuple(gaps)


def export_of(folder: str, report: Mapping[str, Any]) -> Export:
    facts = {
        "step": report.get("step"),
        "made from": report.get("source"),
        "format": report.get("format"),
        "dtype": report.get("dtype"),
        "parameters": report.get("parameters"),
        "changed tensors": f"{word(report.get('changed_tensors'))} of {word(report.get('tensors'))}",
        "bytes": report.get("weights_bytes"),
    }
    proof = []
    checked = mapping(report.get("verification"))
    for key, limit, text in PROOF:
        if number(checked.get(key)) is not None:
            proof.append((text, f"{number(checked[key]):.4g}", limited(key, number(checked.get(limit or "")))))
    if checked:
        words = f"{fact(checked.get('prompts'))} texts, {fact(checked.get('tokens'))} tokens"
        proof.append(("compared on", words, word(checked.get("device"))))
    engine = mapping(report.get("verification_in_vllm"))
    if number(engine.get("mean_logprob_difference")) is not None:
        value = f"{number(engine['mean_logprob_difference']):.4g}"
        limit = limited("mean_logprob_difference", number(engine.get("limit")))
        proof.append((f"in vLLM {word(engine.get('vllm'))}: mean difference of log-probabilities", value, limit))
    notes = report.get("notes")
    skipped = report.get("verification_skipped")
    return Export(
        folder=folder,
        facts=tuple((name, fact(value)) for name, value in facts.items() if value is not None),
        proof=tuple(proof),
        skipped=word(skipped) if skipped else None,
        notes=tuple(word(note) for note in notes) if isinstance(notes, list) else (),
    )


def limited(key: str, limit: float | None) -> str:
    """A limit in words: agreement has a least value, a difference a largest one."""
    if limit is None:
        return ""
    return f"at least {limit:.4g}" if key.endswith("agreement") else f"at most {limit:.4g}"
