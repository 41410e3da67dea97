"""`hf-dsvllm plan` on the terminal, as JSON, or as a page."""

from __future__ import annotations

import html
import json
from pathlib import Path

from hf_dsvllm.errors import ConfigError, Problem
from hf_dsvllm.files import write_text
from hf_dsvllm.planner.explain import HEADINGS, bars, best_of_each, command_line, record, sentences, table_rows
from hf_dsvllm.planner.footprint import PHASES
from hf_dsvllm.planner.request import Request
from hf_dsvllm.planner.search import Candidate, Job, Plan, gib, make_plan

__all__ = ["page", "show"]

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f", "#bab0ac", "#ff9da7")


def show(
    request: Request, job: Job, *, explain: bool = False, as_json: bool = False, html_file: Path | None = None
) -> bool:
    """Plan and print; True if something fits.  ConfigError for a page that cannot be written."""
    if html_file is not None and html_file.is_dir():
        raise ConfigError([Problem(f"--html {html_file} is a folder", f"--html {html_file / 'plan.html'}")])
    plan = make_plan(job)
    if html_file is not None:
        write_page(html_file, page(plan, request.model))
    if as_json:
        print(json.dumps(record(plan, request.model), indent=2))
        return plan.chosen is not None
    print_plan(plan, request, explain=explain)
    return plan.chosen is not None


def write_page(file: Path, text: str) -> None:
    """Raises ConfigError where the page cannot be written."""
    try:
        write_text(file, text)
    except OSError as error:
        why = f"--html {file} cannot be written: {error.strerror or error}"
        raise ConfigError([Problem(why, "--html with a file in a folder of yours")]) from error


def print_plan(plan: Plan, request: Request, *, explain: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    job = plan.job
    console = Console(highlight=False)
    title = f"{request.model} on {job.machine.describe()}, {job.length:,} tokens, {job.global_batch} sequences a step"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in HEADINGS:  # in 80 columns, only verdicts are wrapped
        table.add_column(heading.replace(" ", "\n"), overflow="fold", no_wrap=heading != "verdict")
    for preset, *cells in table_rows(plan):
        table.add_row(preset.replace(" (", "\n("), *cells)
    console.print(table, markup=False)
    for sentence in sentences(plan):
        console.print(sentence, markup=False)
    if plan.chosen is not None:
        if explain:
            console.print("\nMemory of one GPU, by phase", markup=False)
            for line in bars(plan, plan.chosen):
                console.print(line, markup=False, soft_wrap=True)
        print(f"\n{command_line(plan, request.model)}")


def page(plan: Plan, model: str) -> str:
    """One self-contained page: the choice, a chart of each candidate's phases, the table."""
    chosen = plan.chosen
    text = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences(plan))
    command = f"<pre>{html.escape(command_line(plan, model))}</pre>" if chosen is not None else ""
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table_rows(plan)
    )
    charts = "".join(chart(plan, found) for found in best_of_each(plan))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Plan</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}"
        "pre{background:#f4f4f4;padding:.8em;overflow:auto}</style>"
        f"<h1>{html.escape(model)} on {html.escape(plan.job.machine.describe())}</h1>{text}{command}"
        f"<h2>Candidates</h2><table><tr>{head}</tr>{rows}</table><h2>Memory of one GPU, by phase</h2>{charts}</html>\n"
    )


def chart(plan: Plan, found: Candidate) -> str:
    """Horizontal bars of the phases; the vertical line is the card."""
    card = plan.job.gpu.memory_bytes if plan.job.machine.gpus else found.footprint.peak
    scale = 620 / max(card, found.footprint.peak)
    names = sorted({name for parts in found.footprint.parts.values() for name in parts})
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    drawn = []
    for line, phase in enumerate(PHASES):
        x, y = 80.0, 8 + 22 * line
        drawn.append(f'<text x="0" y="{y + 13}" font-size="12">{phase}</text>')
        for name, size in found.footprint.parts[phase].items():
            label = html.escape(f"{phase}: {name} {gib(size)}")
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="16" fill="{colour[name]}">'
                f"<title>{label}</title></rect>"
            )
            x += size * scale
    edge = 80 + card * scale
    drawn.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="120" stroke="#c00" stroke-dasharray="4"/>')
    legend = " ".join(f'<span style="color:{colour[name]}">&#9632;</span> {html.escape(name)}' for name in names)
    title = html.escape(f"{found.setup.preset.name}: {gib(found.footprint.peak)} in the {found.footprint.peak_phase}")
    return f'<h3>{title}</h3><svg width="720" height="122" role="img">{"".join(drawn)}</svg><div>{legend}</div>'
