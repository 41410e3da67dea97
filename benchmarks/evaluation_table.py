"""The rows of evaluation.py as one page: `python benchmarks/evaluation_table.py OUT/evaluation.json`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOTHING = "·"
APART = 50  # steps between two evaluations, of which the slowdown is a share
FIRST_STEPS = 3  # which load kernels and buffers
LIMITS = {
    "2": "At most 1 s (adapters) or 2 s (full) to the first token, 1 s back to training, 2.5 GiB asleep, 0.25 s for a "
    "full update.",
    "3": "At most 1 s of stall for 8B, 2 % slowdown.",
    "4": "At least 30 x ZeRO-3, 8 x gathered, 0.9 x vLLM alone.",
    "5": "At most 70 s cold, hidden behind the load of the model; the second start faster.",
}
Rows = Mapping[str, Mapping[str, Any]]


def page(content: Mapping[str, Any]) -> str:
    """Every table that has rows, then what has no result."""
    rows: Rows = content["rows"]
    parts = ["# Evaluation by generation", "Columns are explained in benchmarks/README.md."]
    for call in content["calls"]:
        versions = ", ".join(f"{name} {version}" for name, version in call["versions"].items())
        lanes = f"{call['gpus']} GPUs, jobs side by side" if call["gpus"] > 1 else "one job at a time"
        parts.append(f"{call['date']}: {call['hardware']}; {lanes}; {versions}.\n\n    {call['command']}")
    trained = {name: row for name, row in rows.items() if row.get("kind") == "train"}
    tables = {
        "2. vLLM on the trainer's GPU": shared_table(trained),
        "3. vLLM on a GPU of its own": spare_table(trained),
        "4. The same prompts": answers_table(rows),
        "5. Starts": starts_table(rows),
        "7. A model that learns": learn_table(rows),
    }
    for title, table in tables.items():
        if table:
            wanted = LIMITS.get(title[0])
            parts += [f"## {title}", *([wanted] if wanted else []), table]
    failed = [f"* {name}: {row['status']}" for name, row in rows.items() if row["status"] != "ok"]
    return "\n\n".join([*parts, *(["## Without a whole result", "\n".join(failed)] if failed else [])]) + "\n"


def table(head: str, lines: Sequence[Sequence[str]]) -> str:
    """`head` with bars between the columns; nothing without lines."""
    if not lines:
        return ""
    columns = head.count("|") + 1
    rows = [" | ".join(cell.replace("|", "/") for cell in line) for line in lines]
    return "\n".join([f"| {head} |", "|" + " --- |" * columns, *(f"| {row} |" for row in rows)])


def number(value: Any, digits: int = 2) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else NOTHING


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"


def pauses_of(row: Mapping[str, Any]) -> dict[int, Mapping[str, float]]:
    return {int(pause["step"]): pause for pause in row.get("measured", {}).get("evaluation_pauses", ())}


def card_of(row: Mapping[str, Any]) -> str:
    """The name of the GPU a row was measured on."""
    found = row.get("card") or row.get("measured", {}).get("gpu")
    return str(found or NOTHING).removeprefix("NVIDIA ")


# -- line 2 ------------------------------------------------------------------------------------------------------------


def shared_table(rows: Rows) -> str:
    """One line for each evaluation that training waited for, with weights of that step."""
    lines = []
    for name, row in rows.items():
        for one in row.get("evaluations", ()):
            pause = pauses_of(row).get(one["step"], {})
            if "before_questions" in pause:
                where = [name, card_of(row), str(one["step"]), str(one["weights_path"])]
                lines.append([*where, *shared_figures(one, pause)])
    head = "run | card | step | weights by | step done → first token | of it canary | answering s"
    head += " | last token → next step | asleep GiB"
    return table(f"{head} | update s | parts s | calls before the questions, number × and s", lines)


def shared_figures(one: Mapping[str, Any], pause: Mapping[str, float]) -> list[str]:
    phases = one["phases"]
    canary = phases.get("trainer's canary", 0.0) + phases.get("engine's canary", 0.0)
    first = pause["before_questions"] + one["task_seconds"].get("first", 0.0)
    parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in phases.items() if seconds >= 0.001)
    calls = ", ".join(f"{what} {count}× {seconds:.3f}" for what, (count, seconds) in one.get("calls", {}).items())
    times = [number(first), number(canary), number(one["generate_seconds"], 1)]
    times += [number(pause["after_answers"]), number(one.get("asleep_gib"))]
    return [*times, number(phases.get("update"), 3), parts, calls or NOTHING]


# -- line 3 ------------------------------------------------------------------------------------------------------------


def spare_table(rows: Rows) -> str:
    """One line a run: what an evaluation holds training up, and both ways to say the slowdown.

    Beside the same run alone only where both were on the same card.
    """
    lines = []
    for name, row in rows.items():
        evaluations = {one["step"]: one for one in row.get("evaluations", ())}
        pauses = [pause for step, pause in pauses_of(row).items() if step]
        if not pauses or any("before_questions" in pause for pause in pauses):
            continue
        measured, beside = row["measured"], rows.get(str(row.get("like")), {})
        alone = beside.get("measured", {}) if card_of(beside) == card_of(row) else {}
        evaluated = {int(pause["step"]) for pause in pauses}
        ordinary = [pause for step, pause in enumerate(measured["pauses"], start=1) if step not in evaluated]
        usual = statistics.median(ordinary) if ordinary else 0.0
        later = [pause["seconds"] for pause in pauses[1:]] or [pauses[0]["seconds"]]
        stall, step = (
            statistics.median(later) - usual,
            alone.get("median_step_seconds") or measured["median_step_seconds"],
        )
        connect = evaluations.get(int(pauses[0]["step"]), {}).get("phases", {}).get("connect")
        lines.append(
            [
                name,
                card_of(row),
                str(row["trainers"]),
                number(measured["median_step_seconds"], 3),
                number(alone.get("median_step_seconds"), 3),
                number(pauses[0]["seconds"]),
                number(connect),
                number(stall),
                number(max(later)),
                percent(stall / (APART * step)),
                percent(slowdown(measured, alone, len(pauses) - 1, int(pauses[0]["step"]))),
                " → ".join(str(one["weights_path"]) for one in evaluations.values()),
                " → ".join(number(one["generate_seconds"], 1) for one in evaluations.values()),
            ]
        )
    head = "run | card | training GPUs | step s | the same alone | first stall s | NCCL connects s | stall s | longest"
    return table(f"{head} | stall of {APART} steps | measured, of {APART} steps | weights by | answering s", lines)


def slowdown(measured: Mapping[str, Any], alone: Mapping[str, Any], evaluations: int, first: int) -> float | None:
    """(seconds with - seconds alone) / evaluations / (APART * step alone), from the first evaluation to the end.

    After the first evaluation, whose stall waits for vLLM's start and NCCL's connection; the pause after step n is
    number n - 1.
    """
    if not alone.get("durations") or evaluations < 1:
        return None
    since = max(first, FIRST_STEPS)
    taken = [sum(each["durations"][since:]) + sum(each["pauses"][since:]) for each in (measured, alone)]
    return float((taken[0] - taken[1]) / evaluations / (APART * statistics.median(alone["durations"][since:])))


# -- lines 4, 5 and 7 --------------------------------------------------------------------------------------------------


def answers_table(rows: Rows) -> str:
    """Tokens per second of each way; for several GPUs of all of them and of one."""
    asked = {name: row for name, row in rows.items() if row.get("tokens_per_second")}
    ours = {
        mode: asked.get(f"start-{mode}-cold", asked.get(f"start-{mode}-warm", {})) for mode in ("eager", "compiled")
    }
    lines = []
    for name, row in asked.items():
        speed, gpus = row["tokens_per_second"], row.get("processes", 1)
        times = [
            f"{of['tokens_per_second'] / speed:.2f} ×" if of and card_of(of) == card_of(row) else NOTHING
            for of in ours.values()
        ]
        given = f"{row.get('answered', row['prompts'])} × {row['new_tokens']}"
        batch = f"{row['batch']} of {row['tried']}" if row.get("tried") else str(row.get("batch", NOTHING))
        cache = number(row.get("cache_gib"), 1)
        figures = [given, batch, cache, number(speed, 0), number(speed / gpus, 0)]
        lines.append([name, card_of(row), str(gpus), *figures, *times])
    head = "way | card | GPUs | prompts × new tokens | batch | cache GiB | tokens/s | of one GPU"
    return table(f"{head} | our engine, eager, is | compiled", lines)


def starts_table(rows: Rows) -> str:
    """Starts with empty and with filled caches of compiled code; then what of a start a run waited for."""
    lines = []
    for name, row in rows.items():
        if row.get("start_seconds") is not None:
            figures = [
                number(row["start_seconds"], 1),
                number(row.get("first_seconds"), 1),
                number(row.get("seconds"), 1),
            ]
            step = row.get("decode_step_seconds")
            lines.append([name, *figures, NOTHING if step is None else f"{1000 * step:.1f}", NOTHING])
    for name, row in rows.items():
        for one in row.get("evaluations", ())[:1]:
            if one["weights_path"] == "start" and row.get("kind") == "train":
                lines.append([name, NOTHING, NOTHING, NOTHING, NOTHING, number(one["wait_seconds"], 1)])
    head = "job | start s | first answers s | all s | decoding step ms | a run waited s"
    return "\n\n".join(filter(None, [table(head, lines), launch_seconds(rows)]))


def launch_seconds(rows: Rows) -> str:
    """LAUNCH_S of hf_dsvllm/engine_size.py: what compiling saves in a decoding step, by layer."""
    steps = {mode: rows.get(f"start-{mode}-cold", {}).get("decode_step_seconds") for mode in ("eager", "compiled")}
    starts = {mode: rows.get(f"start-{mode}-cold", {}).get("start_seconds") for mode in ("eager", "compiled")}
    if None in (*steps.values(), *starts.values()):
        return ""
    saved = (steps["eager"] - steps["compiled"]) / rows["start-eager-cold"]["layers"]
    return (
        f"LAUNCH_S = ({steps['eager']:.4f} - {steps['compiled']:.4f}) / {rows['start-eager-cold']['layers']} layers = "
        f"{saved:.2e}; COMPILE_S = {starts['compiled']:.1f} - {starts['eager']:.1f} = "
        f"{starts['compiled'] - starts['eager']:.0f}"
    )


def learn_table(rows: Rows) -> str:
    """The curve."""
    lines = []
    for one in rows.get("learn", {}).get("evaluations", ()):
        scores = ", ".join(f"{name.removeprefix('eval_gen_')} {value:.1%}" for name, value in one["scores"].items())
        seconds = [number(one[f"{part}_seconds"]) for part in ("publish", "wait", "sync", "generate")]
        lines.append([str(one["step"]), scores, str(one["weights_path"]), *seconds])
    return table("step | scores | weights by | publish s | wait s | sync s | generate s", lines)


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
