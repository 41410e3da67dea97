"""cells.json and rates.json → README.md, figures.json and a plot."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arms import arms, dry_arms
from figures import Figures, figures, rates_from

__all__ = ["write_report"]

COLUMNS = (
    "arm", "batch", "tok/s/GPU", "against plain", "of matmul", "real share", "step s", "predicted", "allocated GiB",
    "predicted GiB", "reserved", "host GiB", "loss",
)  # fmt: skip
DASH = "–"


def write_report(out: Path) -> None:
    """README.md, figures.json and, where matplotlib is installed, speed.png in `out`."""
    cells = json.loads((out / "cells.json").read_text(encoding="utf-8"))
    rates_path = out / "rates.json"
    measured = json.loads(rates_path.read_text(encoding="utf-8")) if rates_path.exists() else {}
    rates = rates_from(measured)
    order = {arm.name: position for position, arm in enumerate((*arms(), *dry_arms()))}
    found = [figures(cells[name], rates) for name in sorted(cells, key=lambda name: order.get(name, len(order)))]
    (out / "README.md").write_text(page(found, measured), encoding="utf-8")
    record = [dataclasses.asdict(row) | {"name": row.arm.name, "title": row.arm.title} for row in found]
    (out / "figures.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with contextlib.suppress(ImportError):
        plot(found, out / "speed.png")


def page(found: Sequence[Figures], measured: Mapping[str, Any]) -> str:
    lines = ["# Training speed", "", *host_lines(measured), "", *limit_lines(measured), ""]
    for case in dict.fromkeys(row.arm.case for row in found):
        rows = [row for row in found if row.arm.case == case]
        arm = rows[0].arm
        gpus = ", ".join(map(str, sorted({row.arm.world for row in rows})))
        lines += [f"## {case}: {arm.shape}, {gpus} GPU, {arm.length:,} tokens{', chat-like lengths' * arm.mix}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        lines += ["| " + " | ".join(cells_of(row, rows)) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def host_lines(measured: Mapping[str, Any]) -> list[str]:
    host = measured.get("host") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (host.get("versions") or {}).items())
    name = (measured.get("one") or {}).get("device_name", "unknown device")
    text = (
        f"{host.get('gpus', '?')} x {name}, {host.get('cpus', '?')} CPUs, {host.get('date', '?')}; {versions}. Qwen3 "
        "shapes, random weights and tokens; LoRA of rank 16 without dropout. Tokens/s are real tokens, padding left "
        "out, of one GPU, over all steps after the warm-up; of matmul: arithmetic of one token (recomputation not "
        "counted) times tokens/s over the best product measured in the same run; predicted: the planner's formulas. "
        "Written by `python benchmarks/train_speed.py`."
    )
    return [text]


def limit_lines(measured: Mapping[str, Any]) -> list[str]:
    """What the machine reached in the same run."""
    one = measured.get("one") or {}
    if "matmul_flops" not in one:
        return ["The limits were not measured."]
    lines = ["| limit | measured |", "| --- | --- |"]
    lines.append(f"| product, best | {max(one['matmul_flops'].values()) / 1e12:.1f} TFLOP/s |")
    lines.append(f"| device copy, bytes read and written | {one['copy_bytes_per_s'] / 1e12:.2f} TB/s |")
    for key, name in (
        ("host_to_device_bytes_per_s", "host to device"),
        ("device_to_host_bytes_per_s", "device to host"),
    ):
        if one.get(key):
            lines.append(f"| {name}, pinned | {one[key] / 1e9:.1f} GB/s |")
    for name, rate in (measured.get("attention") or {}).items():
        if isinstance(rate, dict):
            both = f"{rate['forward_tflops']:.0f} forward, {rate['backward_tflops']:.0f} backward TFLOP/s"
            lines.append(f"| attention, {name} | {both} |")
    for key, link in measured.items():
        if key.startswith("collectives") and "world" in link:
            best = ", ".join(
                f"{kind.replace('_', '-')} {max(sizes.values()) / 1e9:.0f}"
                for kind, sizes in link.items()
                if isinstance(sizes, dict) and sizes
            )
            lines.append(f"| bus of {link['world']} GPUs | {best} GB/s |")
    return lines


def cells_of(row: Figures, rows: Iterable[Figures]) -> list[str]:
    arm = row.arm
    batch = f"{arm.micro} x {arm.accumulation}"
    if row.real_tokens_per_second is None:
        why = " ".join(row.message.split())[:90].replace("|", "/")
        return [arm.title, batch, f"{row.status}: {why}" if why else row.status, *[DASH] * (len(COLUMNS) - 3)]
    plain = [
        other.real_tokens_per_second
        for other in rows
        if other.arm.kind == "plain" and other.real_tokens_per_second and other.arm.length == arm.length
    ]
    return [
        arm.title,
        batch,
        f"{row.real_tokens_per_second:,.0f}",
        f"x {row.real_tokens_per_second / plain[0]:.2f}" if plain else DASH,
        f"{100 * (row.mfu or 0):.1f} %" if arm.adapter != "qlora" else f"({100 * (row.mfu or 0):.1f} %)",
        f"{100 * (row.real_share or 0):.0f} %",
        f"{row.step_seconds:.3f}",
        number(row.predicted_seconds, 3),
        number(row.allocated_gib, 1),
        number(row.predicted_gib, 1),
        number(row.reserved_gib, 1) + (f" ({row.retries} retries)" if row.retries else ""),
        number(row.host_gib, 1),
        number(row.last_loss, 3),
    ]


def number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def plot(found: Sequence[Figures], path: Path) -> None:
    """Bars of tokens/s by case: plain TRL grey, presets blue."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.arm.case for row in found if row.real_tokens_per_second))
    if not cases:
        return
    count = [sum(row.arm.case == case and bool(row.real_tokens_per_second) for row in found) for case in cases]
    figure, axes = pyplot.subplots(
        len(cases), 1, figsize=(10, sum(0.28 * n + 0.8 for n in count)), squeeze=False,
        gridspec_kw={"height_ratios": [n + 1 for n in count]},
    )  # fmt: skip
    for axis, case in zip(axes[:, 0], cases, strict=True):
        rows = [row for row in reversed(found) if row.arm.case == case and row.real_tokens_per_second]
        labels = [f"{row.arm.title} ({row.arm.world} GPU)" for row in rows]
        colours = ["#9aa0a6" if row.arm.kind == "plain" else "#4e79a7" for row in rows]
        axis.barh(range(len(rows)), [row.real_tokens_per_second for row in rows], color=colours)
        axis.set_yticks(range(len(rows)), labels, fontsize=7)
        axis.set_title(f"{case}: {rows[0].arm.shape}, real tokens/s of one GPU", fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
