"""A run folder, finished or in progress → `RunReport`.  What is missing is said in the section that would show it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import ReportError
from hf_dsvllm.report.answers import read_tasks
from hf_dsvllm.report.exports import REPORTS, read_exports
from hf_dsvllm.report.records import Evaluation, LossLog, Memory, RunReport, Times, Versus
from hf_dsvllm.report.tolerant import count, fact, mapping, number, numbers, read_lines, read_object, word

__all__ = ["EVALUATION_PHASES", "is_run", "read_run", "record_files"]

GIB = 1 << 30
EVALUATION_PHASES = ("wait", "publish", "sync", "generate")
RECORDS = ("run.json", "plan.json", "measured.json", "ds_config.json", "trainer_state.json", "snapshots/best.json")
PATTERNS = ("checkpoint-*/trainer_state.json", "evals/*.jsonl", REPORTS)
FACTS = {
    "base_model": "base model",
    "preset": "preset",
    "adapter": "adapter",
    "dtype": "dtype",
    "device": "device",
    "world_size": "processes",
    "zero_stage": "ZeRO stage",
    "trainable_parameters": "trainable parameters",
}


def record_files(run: Path) -> list[Path]:
    """Every file of the folder that a report reads and that is there."""
    named = [run / name for name in RECORDS]
    found = sorted(path for pattern in PATTERNS for path in run.glob(pattern))
    return [path for path in [*named, *found] if os.path.isfile(path)]


def is_run(folder: Path) -> bool:
    """Whether the folder holds anything that a report shows."""
    # os.path.isfile: Path.is_file raises for a folder of somebody else
    return os.path.isfile(folder / "run.json") or any(any(folder.glob(pattern)) for pattern in PATTERNS[:2])


def read_run(run: Path) -> RunReport:
    """Everything the folder says; ReportError if it is none, or not that of a run."""
    check_folder(run)
    gaps: list[str] = []
    record = read_object(
        run / "run.json", gaps, missing="There is no run.json: training has not begun, or was not ours."
    )
    plan = read_object(run / "plan.json", gaps, missing=None)
    measured = read_measured(run, plan, gaps)
    ended = bool(measured) and measured.get("finished") is not False
    best = read_best(run, gaps)
    evaluations, evaluation_gaps = read_evaluations(run / "evals" / "scores.jsonl")
    tasks, task_gaps = read_tasks(run / "evals", best[0] if best else None)
    exports, export_gaps = read_exports(run, ended=ended)
    config: list[str] = []
    ds_config = read_object(run / "ds_config.json", config, missing=None)
    return RunReport(
        name=run.absolute().name,
        ended=ended,
        facts=tuple((text, fact(record[key])) for key, text in FACTS.items() if record.get(key) is not None),
        best=best,
        loss=read_loss(run),
        evaluations=evaluations,
        evaluation_gaps=evaluation_gaps,
        tasks=tasks,
        task_gaps=task_gaps,
        memory=read_memory(record, mapping(plan.get("predicted")), measured),
        times=read_times(measured, evaluations),
        exports=exports,
        export_gaps=export_gaps,
        versions={name: word(version) for name, version in mapping(record.get("versions")).items()},
        ds_config=json.dumps(ds_config, indent=2, ensure_ascii=False) if ds_config else None,
        gaps=tuple(gaps + config),
    )


def check_folder(run: Path) -> None:
    if not run.is_dir():
        beside = [item.name for item in folders(run.parent)]
        near = difflib.get_close_matches(run.name, beside, n=3, cutoff=0.4) or beside[:8]
        hint = f" Nearest beside it: {', '.join(near)}." if near else ""
        raise ReportError(f"{run} is no folder: name the --output_dir of a run.{hint}")
    if not is_run(run):
        inside = [str(item) for item in folders(run) if is_run(item)]
        above = [str(folder) for folder in run.absolute().parents[:2] if os.path.isfile(folder / "run.json")]
        hint = f" Runs near it: {', '.join([*inside, *above][:8])}." if inside or above else ""
        lacks = "it has no run.json, no evals/*.jsonl and no checkpoint with its log"
        raise ReportError(f"{run} is no run: {lacks}.{hint}")


def folders(path: Path) -> list[Path]:
    """The folders in `path`; none where it cannot be listed."""
    try:
        return sorted(item for item in path.iterdir() if os.path.isdir(item))
    except OSError:
        return []


def read_measured(run: Path, plan: Mapping[str, Any], gaps: list[str]) -> dict[str, Any]:
    """measured.json, unless it is of an earlier run: a new one rewrites plan.json without measures at its start.

    That of a run that is not finished is of this run if it is younger than its plan.
    """
    measured = read_object(run / "measured.json", gaps, missing=None)
    if measured.get("finished") is False:
        if plan and modified(run / "measured.json") < modified(run / "plan.json"):
            gaps.append("measured.json is of an earlier run in this folder and is not shown.")
            return {}
        gaps.append("The run is not finished, or was ended: what was measured is until then.")
        return measured
    if measured and plan and "measured" not in plan:
        gaps.append("measured.json is of an earlier run in this folder and is not shown.")
        return {}
    return measured


def read_best(run: Path, gaps: list[str]) -> tuple[int, str, float] | None:
    """Step, metric and score of the best snapshot."""
    found = read_object(run / "snapshots" / "best.json", gaps, missing=None)
    step, score = count(found.get("step")), number(found.get("score"))
    return None if step is None or score is None else (step, word(found.get("metric")), score)


def read_loss(run: Path) -> LossLog:
    """The Trainer's log of losses.  Each trainer_state.json holds all of it so far, so the newest one is read."""
    files = [path for path in record_files(run) if path.name == "trainer_state.json"]
    if not files:
        return LossLog(
            gaps=(
                (
                    "There is no log of the loss: the Trainer writes it with its checkpoints "
                    "(checkpoint-*/trainer_state.json), and the folder holds none."
                ),
            )
        )
    gaps: list[str] = []
    newest = max(files, key=modified)
    rows = read_object(newest, gaps, missing=None).get("log_history")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if (run / "run.json").is_file() and modified(newest) < modified(run / "run.json"):
        gaps.append(
            "This log is older than run.json: the run went on from that checkpoint and has written none since, "
            "or the log is of an earlier run in this folder."
        )
    training, evaluation = series(rows, "loss"), series(rows, "eval_loss")
    if not training and not evaluation:
        gaps.append("The log holds no loss: none was logged before it was written (--logging_steps).")
    return LossLog(
        training=training, evaluation=evaluation, source=str(newest.relative_to(run)), gaps=tuple(gaps)
    )  # fmt: skip


def modified(path: Path) -> int:
    """Nanoseconds of the last change; 0 for a file that has just gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def series(rows: list[dict[str, Any]], key: str) -> tuple[tuple[int, float], ...]:
    """(step, value) of every row that has a finite one, in the order of steps; of a repeated step the last."""
    found = {}
    for row in rows:
        step, value = count(row.get("step")), number(row.get(key))
        if step is not None and value is not None:
            found[step] = value
    return tuple(sorted(found.items()))


def read_evaluations(path: Path) -> tuple[tuple[Evaluation, ...], tuple[str, ...]]:
    """The lines of evals/scores.jsonl in the order of steps."""
    if not path.is_file():
        return (), ("There are no scores (evals/scores.jsonl): no evaluation by generation has ended.",)
    gaps: list[str] = []
    found = {}
    for row in read_lines(path, gaps):
        step = count(row.get("step"))
        if step is None:
            gaps.append("A line of scores.jsonl without a step is left out.")
        else:
            found[step] = evaluation_of(step, row)
    return tuple(found[step] for step in sorted(found)), tuple(dict.fromkeys(gaps))


def evaluation_of(step: int, row: Mapping[str, Any]) -> Evaluation:
    seconds = {name: number(row.get(f"{name}_seconds")) or 0.0 for name in EVALUATION_PHASES}
    if harness := number(row.get("harness_seconds")):
        seconds["lm-eval"] = harness
    total = number(row.get("total_seconds"))
    if total is not None:
        seconds["scoring and writing"] = max(0.0, total - sum(seconds.values()))
    return Evaluation(
        step=step,
        scores=numbers(row.get("scores")),
        standard_errors=numbers(row.get("standard_errors")),
        samples=count(row.get("samples")),
        generated_tokens=count(row.get("generated_tokens")),
        tokens_per_second=number(row.get("tokens_per_second")),
        weights_path=word(row.get("weights_path")),
        weights_why=word(row.get("weights_why")),
        seconds=seconds,
        total_seconds=total,
        compared={
            metric: sentence
            for metric, told in mapping(row.get("comparisons")).items()
            if (sentence := word(mapping(told).get("sentence")))
        },
        late=row.get("late") is True,
        came_at=count(row.get("evaluated_at_step")),
    )


def read_memory(record: Mapping[str, Any], predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> Memory:
    """Predicted and measured peaks, in GiB."""
    allocated = numbers(predicted.get("gpu_allocated_bytes"))
    parts = {str(phase): numbers(sizes) for phase, sizes in mapping(predicted.get("gpu_parts_bytes")).items()}
    line = number(measured.get("gpu_peak_allocated_gib"))
    rows = (
        Versus(name="GPU, allocated", predicted=gib(max(allocated.values(), default=None)), measured=line, unit="GiB"),
        Versus(
            name="GPU, reserved by PyTorch",
            predicted=None,
            measured=number(measured.get("gpu_peak_reserved_gib")),
            unit="GiB",
        ),
        Versus(
            name="host, all processes",
            predicted=gib(number(predicted.get("host_bytes"))),
            measured=number(measured.get("host_peak_all_gib")),
            unit="GiB",
        ),
        Versus(
            name="least that the main process needs",
            predicted=number(record.get("predicted_gib")),
            measured=None,
            unit="GiB",
        ),
        Versus(
            name="one step",
            predicted=number(predicted.get("step_seconds")),
            measured=number(measured.get("median_step_seconds")),
            unit="s",
        ),
    )
    gaps = []
    if not predicted:
        gaps.append("Nothing was predicted: there is no plan.json (no preset, or an architecture without formulas).")
    if not measured:
        gaps.append("Nothing is measured yet: measured.json is written while training logs.")
    return Memory(
        rows=tuple(row for row in rows if row.predicted is not None or row.measured is not None),
        parts={phase: sizes for phase, sizes in parts.items() if sizes},
        phases={str(phase): numbers(peaks) for phase, peaks in mapping(measured.get("phases")).items()},
        line_gib=line,
        of_gpu=bool(allocated),
        gaps=tuple(gaps),
    )


def gib(size: float | None) -> float | None:
    return None if size is None else size / GIB


def read_times(measured: Mapping[str, Any], evaluations: tuple[Evaluation, ...]) -> Times:
    """Seconds in training, and in each phase of all evaluations together."""
    phases: dict[str, float] = {}
    for evaluation in evaluations:
        for name, seconds in evaluation.seconds.items():
            phases[name] = phases.get(name, 0.0) + seconds
    training = number(measured.get("step_seconds"))
    gaps = [] if measured else ["Seconds in training steps are known once training logs (measured.json)."]
    return Times(
        training=training,
        steps=count(measured.get("steps")),
        median_step=number(measured.get("median_step_seconds")),
        tokens_per_second=number(measured.get("tokens_per_second")),
        phases=phases,
        gaps=tuple(gaps),
    )
