"""recipes/sft.py with a stopwatch at the calls that an evaluation is made of: `torchrun … watched.py FLAGS`.

Writes OUTPUT_DIR/calls.json on the main process: for each call what, when it began (time.time()), seconds; and all
steps and pauses in measured.json.  GPU work is queued: "made" and "packed" are the seconds until it was, "offered" and
the requests wait for it.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_dsvllm.engine.client import EngineClient
from hf_dsvllm.live import stream
from hf_dsvllm.measure import RunMeasure
from hf_dsvllm.transfer.ipc import Parcel
from hf_dsvllm.transfer.nccl import NcclTransfer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "sft.py"
MOST = 20_000
calls: list[tuple[str, float, float]] = []


def timed(owner: Any, name: str, label: Callable[..., str]) -> None:
    """Replace `owner.name` by itself with a stopwatch."""
    work = getattr(owner, name)

    @functools.wraps(work)
    def watched(*args: Any, **kwargs: Any) -> Any:
        began, started = time.time(), time.monotonic()
        try:
            return work(*args, **kwargs)
        finally:
            if len(calls) < MOST:
                calls.append((label(*args), began, time.monotonic() - started))

    setattr(owner, name, watched)


def with_each_step(record: Callable[[RunMeasure], dict[str, Any]]) -> Callable[[RunMeasure], dict[str, Any]]:
    return lambda measure: record(measure) | {"durations": measure.durations, "pauses": measure.pauses}


def main() -> None:
    timed(EngineClient, "_call", lambda _, method, path, *__: f"{method} {path}")
    timed(stream, "_made", lambda *_: "made (gathered, cast, merged)")
    timed(Parcel, "__init__", lambda *_: "packed")
    timed(Parcel, "export", lambda *_: "offered (CUDA IPC handles)")
    timed(NcclTransfer, "send", lambda *_: "packed, and the bucket before awaited")
    timed(NcclTransfer, "_broadcast", lambda *_: "broadcast (beside the rest)")
    RunMeasure.as_record = with_each_step(RunMeasure.as_record)  # type: ignore[method-assign]
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    sys.argv[0] = str(RECIPE)
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    finally:
        if int(os.environ.get("RANK", "0")) == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "calls.json").write_text(json.dumps(calls), encoding="utf-8")


if __name__ == "__main__":
    main()
