"""The model card of an export: what it was made from, how it was trained and how it scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.export.manifest import MANIFEST, REPORT, ExportReport
from hf_dsvllm.export.source import RunRecord

__all__ = ["write_card"]


def write_card(folder: Path, report: ExportReport, record: RunRecord | None) -> tuple[str, ...]:
    """Write README.md: the hub's metadata, training, scores, how it was merged and proven, versions.

    Returns a remark for each part that the run's files were too damaged for: the export is made and proven by then.
    """
    from huggingface_hub import ModelCardData

    remarks: list[str] = []

    def section(what: str, make: Callable[[], str]) -> str:
        try:
            return make()
        except Exception as error:  # whatever is wrong with the files of a run, its weights are whole
            remarks.append(f"the model card lacks {what}, which cannot be read ({type(error).__name__}: {error})")
            return ""

    run = {} if record is None else json.loads((record.folder / "run.json").read_text(encoding="utf-8"))
    base = str(run.get("base_model") or report.base or "")
    data = ModelCardData(
        base_model=base if "/" in base and not Path(base).exists() else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf-dsvllm"],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {folder_name(report)}",
        section("what run.json says of the training", lambda: _training(run, base)),
        section("the scores of evals/scores.jsonl", lambda: _scores(record, report.step)),
        _proof(report),
        _versions(report.versions),
    ]
    (folder / "README.md").write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return tuple(remarks)


def folder_name(report: ExportReport) -> str:
    """What the export is called: the folder it was written to."""
    return Path(report.out).name


def _training(run: Mapping[str, Any], base: str) -> str:
    data = run.get("data") or {}
    rows = {
        "base model": _shown(base),
        "base revision": run.get("base_revision"),
        "data": data.get("name"),
        "examples": f"{data['rows']:,}" if data.get("rows") else None,
        "preset": run.get("preset"),
        "adapter": run.get("adapter"),
        "quantised in training": "4 bit" if run.get("quantization") else None,
        "processes": run.get("world_size"),
        "trained parameters": f"{run['trainable_parameters']:,}" if run.get("trainable_parameters") else None,
    }
    return "## Training\n\n" + _table(("what", "value"), [(key, value) for key, value in rows.items() if value])


def _shown(name: str) -> str:
    """A path of the machine that trained says nothing to a reader: its last part does."""
    return Path(name).name if Path(name).is_absolute() else name


def _scores(record: RunRecord | None, step: int | None) -> str:
    """The scores of the exported step, else the last ones, from RUN/evals/scores.jsonl."""
    file = None if record is None else record.folder / "evals" / "scores.jsonl"
    if file is None or not file.is_file():
        return ""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = next((row for row in rows if row["step"] == step), rows[-1] if rows else None)
    if chosen is None:
        return ""
    table = [
        (name.removeprefix("eval_gen_"), _number(value, 4), _number(chosen["standard_errors"].get(name), 2))
        for name, value in chosen["scores"].items()
    ]
    return f"## Scores at step {chosen['step']}\n\n" + _table(("metric", "mean", "standard error"), table)


def _number(value: float | None, digits: int) -> str:
    """One answer has no standard error, and lm-eval gives none for some metrics."""
    return "–" if value is None else f"{value:.{digits}g}"


def _proof(report: ExportReport) -> str:
    found = report.verification
    text = (
        f"## Export\n\n{report.parameters:,} parameters in {report.dtype}, {report.tensors} tensors, "
        f"{report.changed_tensors} of them trained. `{REPORT}` has the figures, `{MANIFEST}` the BLAKE3 hashes of "
        "everything it was made from and of every file."
    )
    if found is None:
        return f"{text}\n\nNot compared with the trained model: {report.verification_skipped}."
    return (
        f"{text}\n\nCompared with the trained model over {found.tokens} tokens of {found.prompts} texts: mean "
        f"difference of the logits {found.mean_abs_difference:.2g} (their spread is {found.reference_std:.2g}), "
        f"greedy tokens alike on {found.greedy_agreement:.1%}."
        + "".join(f"\n\nNote: {note}." for note in report.notes)
    )  # fmt: skip


def _versions(versions: Mapping[str, str]) -> str:
    return "## Versions\n\n" + _table(("package", "version"), list(versions.items()))


def _table(heading: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
