"""The rows of `sync.py` as one file and one page: `python benchmarks/gpu/sync_table.py FOLDER OUT.json OUT.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = ("case", "round", "path", "before → after", "asleep GiB", "sleep s", "weights in s", "first token s", "of it")


def main() -> None:
    folder, out, page = map(Path, sys.argv[1:])
    cases = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("sync-*.json"))]
    for each in cases:
        each.pop("server", None)  # paths of one machine
    out.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    page.write_text(table(cases), encoding="utf-8")


def table(cases: list[dict[str, Any]]) -> str:
    """A row for each round: seconds of each part, and how far vLLM's log-probabilities were from the trainer's."""
    first = cases[0]["case"]
    versions = ", ".join(
        f"{name} {version}" for name, version in (first["versions"] | {"vllm": cases[0]["vllm"]}).items()
    )
    lines = [
        "# Weights into vLLM", "",
        f"{first['card']}; {versions}. Random weights of a Qwen3 shape; the trainer's are changed between rounds.",
        "Before and after: mean |Δ log p| of fixed prompts, vLLM's against the trainer's. Seconds since it began.",
        "", "| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD),
    ]  # fmt: skip
    for each in cases:
        lines += [row(name(each["case"]), one) for one in each["rounds"]]
    lines += ["", "| case | GB | vLLM's start s | bare NCCL GB/s | device copy GB/s |", "|" + " --- |" * 5]
    for each in cases:
        bare = each.get("bare") or {}
        speeds = [f"{bare[key]:.0f}" if key in bare else "·" for key in ("nccl_gb_per_s", "device_copy_gb_per_s")]
        lines.append(
            f"| {name(each['case'])} | {each['weights_gb']:.1f} | {each['start_seconds']:.1f} | {' | '.join(speeds)} |"
        )
    return "\n".join(lines) + "\n"


def name(case: dict[str, Any]) -> str:
    zero = f", ZeRO-{case['zero']}" if case["zero"] else ""
    return f"{case['placement']}: {case['shape']} {case['kind']}{zero}, {case['processes']} process"


def row(case: str, one: dict[str, Any]) -> str:
    before, after = one["difference_before"]["mean"], one["difference_after"]["mean"]
    asleep, sleep = (
        f"{one[key]:.2f}" if key in one else "·" for key in ("gpu_gib_of_others_while_asleep", "sleep_seconds")
    )
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in one["phases"].items() if seconds >= 0.005)
    times = f"{one['sync_seconds']:.2f} | {one['to_first_token_seconds']:.2f}"
    moved = f"{one['path']} | {before:.2f} → {after:.2f}"
    return f"| {case} | {one['round']} | {moved} | {asleep} | {sleep} | {times} | {parts} |"


if __name__ == "__main__":
    main()
