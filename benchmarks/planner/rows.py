"""What the measurement writes: the verdict on a cell, the record of the host, the files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

__all__ = ["copy_results", "host_record", "read", "shared", "tail", "verdict"]

PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "deepspeed", "bitsandbytes")
ALONE_BYTES = int(2.2 * 2**30)  # what CUDA, cuBLAS and NCCL of one process take beside the allocator


def verdict(ranks: list[dict[str, Any]], count: int, killed: str | None, log: Path) -> dict[str, Any]:
    """`status` of a cell from its ranks: out of memory on one is out of memory."""
    statuses = [rank.get("status") for rank in ranks]
    peaks = [
        phase["allocated_peak"] for rank in ranks for phase in rank["phases"].values() if "allocated_peak" in phase
    ]
    peak = {"allocated_gib": round(max(peaks) / 2**30, 2)} if peaks else {}
    if "oom" in statuses:
        worst = ranks[statuses.index("oom")]
        return {"status": "oom", "phase": worst["phase"], "message": worst["message"][:300]} | peak
    if len(ranks) == count and set(statuses) == {"ok"}:
        return {"status": "ok"} | peak
    failed = next((rank for rank in ranks if rank.get("status") == "failed"), None)
    message = failed["message"] if failed else killed or tail(log)
    return {"status": "failed" if failed or not killed else "timeout", "message": message[:1500]} | peak


def shared(ranks: list[dict[str, Any]]) -> bool:
    """Whether another program had memory on one of the GPUs: its times are no measurement."""
    return any(rank.get("outside_allocator", 0) > ALONE_BYTES for rank in ranks)


def host_record(gpus: int, threads: int) -> dict[str, Any]:
    """Where and with what the cells were measured."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": platform.python_version(),
        "versions": versions,
        "cpus": os.cpu_count(),
        "threads_per_process": threads,
        "gpus": gpus,
    }


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-600:] if path.exists() else ""


def copy_results(out: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in ("cells.json", "rates.json"):
        if (out / name).exists():
            shutil.copy(out / name, target / name)
    logs = sorted((out / "work").glob("*.log"))
    text = "".join(f"==== {log.name}\n{tail(log)}\n" for log in logs)
    (target / "logs.txt").write_text(text, encoding="utf-8")
