"""Unmodified scripts through `hf-dsvllm run` on a real shape: TRL's sft and a script of the run_clm kind.

    python benchmarks/run_scripts.py --shape 1.7b --processes 2
    python benchmarks/run_scripts.py --shape tiny --device cpu --processes 1 --steps 2 --length 128   # tries it out

Each cell is a process tree with a time limit, and ends as a user would end it (SIGTERM to the command).  Results go to
OUT/<date>-run-scripts-<hardware>.json and .md; a failed cell keeps its row with the reason, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cells import HERE, last_error, read_json
from main_job import GRACE_S, short_name, versions
from standin import SHAPES, write_jsonl, write_random_data

from hf_dsvllm.files import write_text
from hf_dsvllm.hardware import detect
from hf_dsvllm.presets import get_preset

CLM = HERE.parent / "tests" / "scripts" / "any" / "clm.py"
LINES = re.compile(r"hf-dsvllm: (?:running|wired): (.*)")
LOSS = re.compile(r"\{'loss': '?([\d.einf-]+)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One script under one preset."""

    script: str
    preset: str
    evaluate: bool = False

    @property
    def name(self) -> str:
        return f"{self.script}-{self.preset}"


CELLS = (
    Cell(script="sft", preset="zero3", evaluate=True),
    Cell(script="clm", preset="qlora"),
    Cell(script="clm", preset="zero3"),
    Cell(script="sft", preset="qlora"),
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.7b", help="random weights of this Qwen3 shape")
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS], help="first the most wanted")
    parser.add_argument("--processes", type=int, default=2, help="training processes (GPUs)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries out the benchmark itself")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro_batch_size", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--vllm_args", default="", help="more arguments for vLLM, as one string: --vllm_args='--a b'")
    parser.add_argument("--cell_s", type=float, default=100.0, help="time limit of a cell, in seconds")
    parser.add_argument("--budget_s", type=float, default=240.0, help="time limit of all cells, in seconds")
    parser.add_argument("--work", type=Path, default=Path("runs/run-scripts"), help="scratch folder")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results")
    parser.add_argument("--note", default="", help="a sentence to keep with the results")
    return parser.parse_args()


def main() -> int:
    options = parse()
    options.work = options.work.absolute()
    model = make_inputs(options)
    deadline = time.monotonic() + options.budget_s
    rows: list[dict[str, Any]] = []
    chosen = {cell.name: cell for cell in CELLS}
    for name in options.cells:
        left = deadline - time.monotonic()
        rows.append(measure(chosen[name], options, model, min(left, options.cell_s)))
        print(f"{name:12} {rows[-1]['status']}", flush=True)
        write_results(options, rows)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def make_inputs(options: argparse.Namespace) -> Path:
    """A random model, conversations in a folder for TRL, the same as plain texts for the clm script."""
    model: Path = options.work / f"model-{options.shape}"
    if not (model / "config.json").exists():
        making = model.with_suffix(".tmp")
        words = [str(HERE / "standin.py"), "--shape", options.shape, "--out", str(making)]
        subprocess.run([sys.executable, *words], check=True)
        making.rename(model)
    samples = options.steps * options.micro_batch_size * options.processes
    folder = options.work / "data"
    train, prompts = write_random_data(
        SHAPES[options.shape], folder, samples=samples, length=options.length, prompts=16
    )
    prompts.rename(options.work / "questions.jsonl")  # what is left in the folder is a data set to `load_dataset`
    rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    texts = [{"text": " ".join(turn["content"] for turn in row["messages"])} for row in rows]
    write_jsonl(options.work / "texts.jsonl", texts)
    return model


def command(cell: Cell, options: argparse.Namespace, model: Path, out: Path) -> list[str]:
    """What a user would type, `hf-dsvllm` spelt as `python -m hf_dsvllm`."""
    script = ["trl", "sft", "--dataset_name", str(options.work / "data"), "--max_length", str(options.length)]
    if cell.script == "clm":
        script = [str(CLM), "--train_file", str(options.work / "texts.jsonl"), "--block_size", str(options.length)]
    flags = {
        "model_name_or_path": model,
        "output_dir": out,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.micro_batch_size,
        "learning_rate": "1e-5",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "ds_preset": cell.preset,
        "export_to": "none",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if cell.evaluate:
        words += ["--gen_eval_file", str(options.work / "questions.jsonl"), "--gen_eval_max_new_tokens", "16"]
        words += [f"--vllm_args={options.vllm_args}"] if options.vllm_args else []
    launch = [sys.executable, "-m", "hf_dsvllm", "run", "--num_processes", str(options.processes)]
    return [*launch, *script, *words]


def measure(cell: Cell, options: argparse.Namespace, model: Path, limit_s: float) -> dict[str, Any]:
    """Run one cell; its row."""
    row: dict[str, Any] = {"script": cell.script, "preset": cell.preset, "processes": options.processes}
    if limit_s < 20:
        return row | {"status": "no time left"}
    out = options.work / cell.name
    shutil.rmtree(out, ignore_errors=True)
    words = command(cell, options, model, out)
    log = options.work / f"{cell.name}.log"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    begun = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **hidden})
        try:
            status = "ok" if process.wait(limit_s) == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"not within {limit_s:.0f} s"
            end(process)
    text = log.read_text(encoding="utf-8", errors="replace")
    if status != "ok":
        status += f": {last_error(text)}"
    record, measured = read_json(out / "run.json"), read_json(out / "measured.json")
    scores = out / "evals" / "scores.jsonl"
    evaluations = [json.loads(line) for line in scores.read_text().splitlines()] if scores.exists() else []
    if status == "ok":
        status = judge(cell, options, record, evaluations)
    return row | {
        "status": status,
        "cell_seconds": round(time.monotonic() - begun, 1),
        "losses": [float(loss) for loss in LOSS.findall(text)],
        "said": LINES.findall(text),
        "median_step_seconds": measured.get("median_step_seconds"),
        "gpu_peak_allocated_gib": measured.get("gpu_peak_allocated_gib"),
        "evaluations": evaluations,
        "command": shlex.join(["python", *words[1:]]).replace(str(options.work), "WORK"),
    }


def judge(cell: Cell, options: argparse.Namespace, record: dict[str, Any], evaluations: list[Any]) -> str:
    """ "ok", or what is not as asked although the command ended well."""
    preset = get_preset(cell.preset)
    asked = {"world_size": options.processes, "zero_stage": preset.zero_stage, "adapter": preset.adapter}
    wrong = {key: record.get(key) for key, value in asked.items() if record.get(key) != value}
    if wrong:
        return f"not what was asked for: {wrong}"
    return "evaluation did not finish" if cell.evaluate and len(evaluations) < 2 else "ok"


def end(process: subprocess.Popen[bytes]) -> None:
    """As a user would: SIGTERM, and a second one that is not to be refused."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        return


def write_results(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The rows so far, as JSON and as a table."""
    machine = detect()
    today = datetime.date.today().isoformat()
    where = short_name(machine) if options.device == "cuda" else "cpu"
    base = options.out / f"{today}-run-scripts-{where}"
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"date": today, "machine": machine.describe(), "versions": versions(), "note": options.note,
             "shape": options.shape, "steps": options.steps, "micro_batch_size": options.micro_batch_size,
             "length": options.length}  # fmt: skip
    write_text(base.with_suffix(".json"), json.dumps({**about, "rows": rows}, indent=2) + "\n")
    tokens = f"{options.micro_batch_size} x {options.length}"
    lines = [
        f"# Unmodified scripts, {today}",
        "",
        f"{machine.describe()}; random Qwen3-{options.shape} shape, {options.steps} steps of {tokens} tokens.",
        *([options.note] if options.note else []),
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
        "| script | preset | processes | status | step s | GPU GiB | first, last loss | evaluations | cell s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        losses = row.get("losses") or []
        cells = (row["script"], row["preset"], row["processes"], row["status"], row.get("median_step_seconds"),
                 row.get("gpu_peak_allocated_gib"), f"{losses[0]}, {losses[-1]}" if losses else None,
                 len(row.get("evaluations") or []), row.get("cell_seconds"))  # fmt: skip
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    said = [f"* {row['script']} {row['preset']}: {line}" for row in rows for line in row.get("said", [])]
    write_text(base.with_suffix(".md"), "\n".join([*lines, "", "What the runs said of themselves:", "", *said]) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
