"""What the benchmark of exports measures with: seconds and memory of a block, the rate of a disk, the host's name."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Seconds, and how far host memory rose above its start: all of it, and what is not mapped files."""
    seen: dict[str, Any] = {}
    ended = threading.Event()
    peak = {"VmRSS": 0, "RssAnon": 0}
    before = memory()

    def look() -> None:
        while not ended.wait(0.01):
            now = memory()
            for key in peak:
                peak[key] = max(peak[key], now[key])

    watcher = threading.Thread(target=look)
    watcher.start()
    started = time.perf_counter()
    try:
        yield seen
    finally:
        seen["seconds"] = round(time.perf_counter() - started, 2)
        ended.set()
        watcher.join()
        seen["peak_added_gib"] = round((peak["VmRSS"] - before["VmRSS"]) / 2**20, 2)
        seen["peak_added_anonymous_gib"] = round((peak["RssAnon"] - before["RssAnon"]) / 2**20, 2)


def memory() -> dict[str, int]:
    """KiB by key of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    pairs = (line.split(":", 1) for line in text.splitlines())
    return {key: int(value.split()[0]) for key, value in pairs if key in ("VmRSS", "RssAnon")}


def disk_rate(folder: Path, size: int = 8 << 30) -> float:
    """GB/s of eight plain writers with fsync at the end; the disk's own rate, or the memory's."""
    size = min(size, shutil.disk_usage(folder).free // 4)
    block = os.urandom(64 << 20)

    def write(number: int) -> None:
        with (folder / f"rate-{number}").open("wb", buffering=0) as file:
            for _ in range(size // 8 // len(block) or 1):
                file.write(block)
            os.fsync(file.fileno())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    written = sum((folder / f"rate-{number}").stat().st_size for number in range(8))
    for number in range(8):
        (folder / f"rate-{number}").unlink()
    return round(written / seconds / 1e9, 2)


def use_memory(folder: Path, size: int) -> None:
    """Have `size` bytes of the machine's memory in use, and let go of them: eight files in `folder`, deleted.

    A virtual machine gives back to its host what nobody has used for seconds, and gets it again slowly: eight writers
    filled 4 GB/s on two H200 hosts (2026-11-28).  Whoever comes first would pay for it.
    """
    block = bytes(64 << 20)

    def write(number: int) -> None:
        with (folder / f"used-{number}").open("wb", buffering=0) as file:
            for _ in range(-(-size // 8 // len(block))):
                file.write(block)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        (folder / f"used-{number}").unlink()


def sync_folder(folder: Path) -> None:
    """What an export does for its own files: they are on the disk when it says so."""
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def host() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{gpu}, {os.cpu_count()} CPUs"
