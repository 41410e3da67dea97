"""Exports that are killed: `kill_exports.py RUN OUT TIMES SEED` forks an export TIMES times and sends each SIGKILL.

Imports are done once; each child exports as a fresh process would and is killed after a random share of the time that a
whole export takes.  After each kill OUT must be absent, or pass every check of a finished export.  One line of JSON at
the end: how many were killed before, and how many after OUT was in place.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hf_dsvllm.export.make import export_model
from hf_dsvllm.export.manifest import check_manifest


def main() -> None:
    run, out, times, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    export_model(run, out, progress=False)  # imports what is imported late
    shutil.rmtree(out)
    started = time.monotonic()
    export_model(run, out, progress=False)
    whole = time.monotonic() - started
    before, after = 0, 0
    moments = random.Random(seed)
    for number in range(times):
        overwrite = number % 2 == 1  # every other time an earlier export stands at OUT, and must stay
        if not overwrite:
            shutil.rmtree(out, ignore_errors=True)
        elif not out.exists():
            export_model(run, out, progress=False)
        # Half of them early, where files are written: most of the time goes to the proof.
        kill_one(run, out, moments.uniform(0, whole if number % 4 < 2 else whole / 5), overwrite)
        if out.exists():
            check_manifest(out)
            after += 1
        else:
            before += 1
    shutil.rmtree(out, ignore_errors=True)
    report = export_model(run, out, progress=False)
    check_manifest(out)
    AutoModelForCausalLM.from_pretrained(out)
    left = [item.name for item in out.parent.iterdir() if item.name.startswith(f".{out.name}")]
    print(json.dumps({"before": before, "after": after, "left": left, "reused": report.reused}))


def kill_one(run: Path, out: Path, delay: float, overwrite: bool) -> None:
    child = os.fork()
    if child == 0:
        # tqdm's own lock is shared with the parent, which would wait for ever for one that a killed child held.
        tqdm.set_lock(threading.RLock())
        try:
            export_model(run, out, overwrite=overwrite, progress=False)
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
