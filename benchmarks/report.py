"""One row per cell of the benchmark, kept as JSON, shown as Markdown; a cell that failed keeps its row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NOTHING = "·"
NOT_RUN = "not run"
KINDS = {"dsvllm": "", "plain": "plain TRL ", "generate": "HF generate"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`kind`: dsvllm (recipes/sft.py), plain (plain_trl.py) or generate (hf_generate.py); seconds and GiB throughout.

    `evaluations` are the rows of evals/scores.jsonl.  `status` is "ok", or why there is no result.  `matmul_share` is
    the arithmetic of one training token times tokens/s per GPU, over the matrix product measured in the same run.
    """

    model: str
    kind: str
    run: str
    processes: int
    status: str
    cell_seconds: float
    command: str
    steps: int | None = None
    micro_batch_size: int | None = None
    length: int | None = None
    tokens_per_second: float | None = None
    median_step_seconds: float | None = None
    matmul_share: float | None = None
    gpu_peak_allocated_gib: float | None = None
    gpu_peak_reserved_gib: float | None = None
    host_peak_gib: float | None = None
    evaluations: tuple[Mapping[str, Any], ...] = ()
    generate_tokens_per_second: float | None = None
    generate_seconds: float | None = None
    export_seconds: float | None = None
    export_note: str | None = None
    wiring: str | None = None
    wiring_as_asked: bool | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Rows with the same key are measurements of the same thing."""
        return self.model, self.kind, self.run, self.processes

    @property
    def title(self) -> str:
        return f"{KINDS[self.kind]}{self.run}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """One start of the benchmark: when, where, with what, and the machine's limits measured then."""

    date: str
    command: str
    hardware: str
    versions: Mapping[str, str]
    limits: Mapping[str, Any]
    lanes: int
    notes: tuple[str, ...] = ()


def store(path: Path, rows: Sequence[Row], invocation: Invocation, earlier: tuple[list[Row], list[Invocation]]) -> None:
    """Write `path` (.json) and its .md: the `earlier` content, its rows replaced where measured again."""
    before = {row.key for row in earlier[0]}
    rows = [row for row in rows if not (row.status.startswith(NOT_RUN) and row.key in before)]
    fresh = {row.key for row in rows}
    everything = [*(row for row in earlier[0] if row.key not in fresh), *rows]
    invocations = [*earlier[1], invocation]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"invocations": [dataclasses.asdict(i) for i in invocations], "rows": [row_record(r) for r in everything]}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(everything, invocations), encoding="utf-8")


def load(path: Path) -> tuple[list[Row], list[Invocation]]:
    """The rows and invocations in `path`; empty without that file."""
    if not path.exists():
        return [], []
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**(row | {"evaluations": tuple(row["evaluations"])})) for row in content["rows"]]
    return rows, [Invocation(**(item | {"notes": tuple(item["notes"])})) for item in content["invocations"]]


def row_record(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row)


def markdown(rows: Sequence[Row], invocations: Sequence[Invocation]) -> str:
    """The whole results page."""
    parts = ["# Main job: train, evaluate with vLLM, export", "Columns are explained in benchmarks/README.md."]
    parts += [describe(number, item) for number, item in enumerate(invocations, start=1)]
    for group in dict.fromkeys((row.model, row.processes) for row in rows):
        chosen = [row for row in rows if (row.model, row.processes) == group]
        processes = "1 process" if group[1] == 1 else f"{group[1]} processes"
        parts += [f"## {group[0]}, {processes}"]
        trained = [r for r in chosen if r.kind != "generate"]
        if trained:
            parts += [table(TRAINING, trained)]
        evaluated = [r for r in chosen if r.evaluations or r.kind == "generate"]
        if evaluated:
            parts += [table(EVALUATION, evaluated)]
        failed = [f"* {row.title}: {row.status}" for row in chosen if row.status != "ok"]
        if failed:
            parts += ["Without a result:", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def describe(number: int, item: Invocation) -> str:
    limits = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in item.limits.items() if name != "device")
    versions = ", ".join(f"{name} {version}" for name, version in item.versions.items())
    lanes = f" {item.lanes} cells at a time, each on its own GPU and CPUs." if item.lanes > 1 else ""
    notes = "".join(f" {note}." for note in item.notes)
    return (
        f"Run {number}, {item.date}: {item.hardware}.{lanes}{notes} Limits measured in the same run: {limits}. "
        f"{versions}.\n\n    {item.command}"
    )


def number(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"


def wiring(row: Row) -> str:
    if row.wiring is None:
        return NOTHING
    mark = {True: "as asked: ", False: "**not as asked**: ", None: ""}[row.wiring_as_asked]
    return mark + row.wiring


def each(row: Row, key: str, digits: int = 2) -> str:
    """One number per evaluation, in order: `0.00 → 1.92`."""
    return " → ".join(number(item.get(key), digits) for item in row.evaluations) or NOTHING


def scores(row: Row) -> str:
    """The first score of each evaluation."""
    return " → ".join(f"{next(iter(item['scores'].values())):.1%}" for item in row.evaluations) or NOTHING


def speed(row: Row) -> str:
    if row.generate_tokens_per_second is not None:
        return number(row.generate_tokens_per_second, 0)
    return each(row, "tokens_per_second", 0)


def generating(row: Row) -> str:
    return number(row.generate_seconds, 2) if row.generate_seconds is not None else each(row, "generate_seconds")


def per_gpu(row: Row) -> str:
    return number(None if row.tokens_per_second is None else row.tokens_per_second / row.processes, 0)


Column = tuple[str, Callable[[Row], str]]
TRAINING: tuple[Column, ...] = (
    ("run", lambda r: r.title),
    ("tokens/s", lambda r: number(r.tokens_per_second, 0)),
    ("per process", per_gpu),
    ("of matmul", lambda r: share(r.matmul_share)),
    ("step s", lambda r: number(r.median_step_seconds, 3)),
    ("steps × batch × length", lambda r: f"{r.steps} × {r.micro_batch_size} × {r.length}" if r.steps else NOTHING),
    ("GPU allocated GiB", lambda r: number(r.gpu_peak_allocated_gib)),
    ("reserved GiB", lambda r: number(r.gpu_peak_reserved_gib)),
    ("host GiB", lambda r: number(r.host_peak_gib)),
    ("export s", lambda r: number(r.export_seconds)),
    ("wiring", wiring),
    ("cell s", lambda r: number(r.cell_seconds, 0)),
)
EVALUATION: tuple[Column, ...] = (
    ("run", lambda r: r.title),
    ("weights by", lambda r: " → ".join(str(item["weights_path"]) for item in r.evaluations) or NOTHING),
    ("wait s", lambda r: each(r, "wait_seconds", 1)),
    ("publish s", lambda r: each(r, "publish_seconds")),
    ("sync s", lambda r: each(r, "sync_seconds")),
    ("generate s", generating),
    ("tokens/s", speed),
    ("score", scores),
)


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A Markdown table; cells must not hold a bar."""
    lines = [[name for name, _ in columns], ["---"] * len(columns)]
    lines += [[show(row).replace("|", "/") for _, show in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
