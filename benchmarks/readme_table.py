"""Write the measured table of README.md from a results file:

python benchmarks/readme_table.py benchmarks/results/2026-11-22-main-job-2xH200.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
NAMES = {"dsvllm": "`--ds_preset {}`", "plain": "plain TRL, {}", "generate": "HF `generate` of the same prompts"}
PLAIN = {"zero2": "hand-written ZeRO-2", "zero2_fp32": "ZeRO-2 with fp32 accumulation", "lora": "LoRA defaults"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{block(path)}\n{END}{after}", encoding="utf-8")


def block(path: Path) -> str:
    """The caption and the table: every finished one-process cell of the random Qwen3-1.7B shape."""
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        row for row in results["rows"] if row["processes"] == 1 and "Qwen3" in row["model"] and row["status"] == "ok"
    ]
    rows.sort(key=lambda row: (list(NAMES).index(row["kind"]), row["run"]))
    lines = [
        "| run | tokens/s | GPU GiB | new weights → last answer | answers tok/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [line(row) for row in rows]
    invocation = results["invocations"][0]
    versions = invocation["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "deepspeed", "vllm"))
    when = str(invocation["date"]).split(" ")[0]
    return (
        f"Random Qwen3-1.7B shape on one H200 (of two in the host), bf16, 4 x 2,048 tokens a step; evaluation of 128 "
        f"prompts x 64\nnew tokens after training. {named}; {when};\n"
        f"[all cells](benchmarks/results/{path.stem}.md).\n\n" + "\n".join(lines)
    )


def line(row: dict[str, Any]) -> str:
    name = NAMES[row["kind"]].format(PLAIN[row["run"]] if row["kind"] == "plain" else row["run"])
    evaluations = row["evaluations"]
    seconds = answers = "–"
    if row["kind"] == "generate":
        seconds, answers = f"{row['generate_seconds']:.1f} s", f"{row['generate_tokens_per_second']:,.0f}"
    if evaluations:
        last = evaluations[-1]
        took = sum(last[part] for part in ("publish_seconds", "wait_seconds", "sync_seconds", "generate_seconds"))
        seconds, answers = f"{took:.1f} s", f"{last['tokens_per_second']:,.0f}"
    speed = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "–"
    memory = f"{row['gpu_peak_allocated_gib']:.1f}" if row["gpu_peak_allocated_gib"] else "–"
    return f"| {name} | {speed} | {memory} | {seconds} | {answers} |"


if __name__ == "__main__":
    main()
