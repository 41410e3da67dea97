"""The end of a run: what was measured and the exports, and what is said when the disk does not take them."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from hf_dsvllm.console import say
from hf_dsvllm.errors import DsvllmError, ExportError
from hf_dsvllm.export.manifest import REPORT, occupied
from hf_dsvllm.export.source import Which, best_step
from hf_dsvllm.files import write_json
from hf_dsvllm.forecast import Forecast, comparison, learn_from
from hf_dsvllm.live.snapshot import SNAPSHOTS, Snapshot

__all__ = ["EXPORTS", "export_last", "export_places", "remove_engine_copies", "weights_lost", "write_end"]

EXPORTS = ("export", "export-best")  # where a run exports to unless --export_to says otherwise
# Made for vLLM in RUN/engine, a whole model each: the base of a QLoRA run in 16 bit, an adapter merged into its base.
ENGINE_COPIES = ("base", "merged")


def write_end(
    run_dir: Path, forecast: Forecast | None, measured: dict[str, Any], export_to: str | None, snapshot: Snapshot
) -> list[str]:
    """Record what was measured and export; a sentence for each of the two that failed."""
    failed = []
    for what, work in (
        ("measured.json could not be written", lambda: record_measures(run_dir, forecast, measured)),
        ("the export failed", lambda: export_last(run_dir, export_to, snapshot)),
    ):
        try:
            work()
        except Exception as problem:  # whatever it is, the other ranks wait to hear of it
            why = str(problem) if isinstance(problem, DsvllmError) else f"{type(problem).__name__}: {problem}"
            failed.append(f"{what}: {why}")
    return failed


def record_measures(run_dir: Path, forecast: Forecast | None, measured: dict[str, Any]) -> None:
    """measured.json, and the prediction beside it in plan.json and on the console."""
    write_json(run_dir / "measured.json", measured)
    if forecast is None:
        return
    write_json(run_dir / "plan.json", {"predicted": forecast.as_record(), "measured": measured})
    for line in comparison(forecast, measured):
        say(line)
    if learn_from(forecast, measured):
        say("its step time is kept for later plans on this machine")


def export_places(run_dir: Path, export_to: str | None) -> tuple[Path, Path]:
    """Where the last weights are exported to, and the best ones if those are others."""
    last = Path(export_to) if export_to else run_dir / EXPORTS[0]
    return last, last.absolute().parent / f"{last.absolute().name}-best"


def export_last(run_dir: Path, export_to: str | None, snapshot: Snapshot) -> None:
    """Export the snapshot a run ends with, and the best one if that is another; nothing for "none"."""
    if export_to == "none":
        return
    from hf_dsvllm.export.make import export_model

    last, beside = export_places(run_dir, export_to)
    # The snapshot itself: in the run folder a checkpoint of worse weights may be newer.
    asked: list[tuple[Path, Which, str, Path]] = [
        (snapshot.path, "latest", f"{snapshot.kind} of step {snapshot.step}", last)
    ]
    best = best_step(run_dir)
    if best is not None and best != snapshot.step:
        what = f"step {best}, which has the best score,"
        asked.append((run_dir, "best", what, _place_for_best(run_dir, beside, usual=not export_to)))
    elif earlier := _source_of(beside):
        say(f"{beside} is not of this run's end: it was exported before, from {earlier}")
    for source, which, what, folder in asked:
        report = export_model(source, folder, which=which, overwrite=True)
        size = f"{report.weights_bytes / 2**30:.2f} GiB"
        say(f"exported {what} to {folder} ({size}). Serve it: hf-dsvllm serve {folder}")
        for remark in report.remarks:
            say(remark)


def _place_for_best(run_dir: Path, beside: Path, *, usual: bool) -> Path:
    """`beside`, if that is free or holds an export of this run; else the next free folder, and that is said.

    Nobody named it, so that another run's export there is not the user's to overwrite; the usual one is the run's own.
    """
    source = _source_of(beside)
    of_run = source is not None and (usual or source.resolve().is_relative_to(run_dir.resolve()))
    if of_run or not occupied(beside):
        return beside
    free = next(
        place for n in itertools.count(2) if not occupied(place := beside.with_name(f"{beside.name}-{n}"))
    )  # fmt: skip
    held = "something else" if source is None else f"an export of {source}, another run"
    say(f"{beside} holds {held}, and is left as it is: the best weights go to {free}")
    return free


def _source_of(folder: Path) -> Path | None:
    """What the export in `folder` was made from; None if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Path(json.loads((folder / REPORT).read_text(encoding="utf-8"))["source"])
    return None


def remove_engine_copies(run_dir: Path) -> None:
    """Free the disk of what only a running vLLM needs: an export may need the room, and another start makes it anew."""
    for name in ENGINE_COPIES:
        shutil.rmtree(run_dir / "engine" / name, ignore_errors=True)


def weights_lost(run_dir: Path, why: str) -> ExportError:
    """The error for last weights that could not be written: why, and what of the run is on the disk."""
    found = [*run_dir.glob("checkpoint-*"), *(run_dir / SNAPSHOTS).glob("step-*")]
    left = ", ".join(str(path.relative_to(run_dir)) for path in sorted(found, key=lambda path: path.stat().st_mtime))
    return ExportError(
        f"training is complete, but its last weights could not be written to {run_dir / SNAPSHOTS}: {why}. On the disk "
        f"in {run_dir}: {left or 'no other weights of this run'}. Free some space; a checkpoint is finished by "
        "--resume_from_checkpoint last, and exported as it is by `hf-dsvllm export`."
    )
