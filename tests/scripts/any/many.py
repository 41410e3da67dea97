"""Several scripts in one torchrun, each as `hf_dsvllm.run` runs it in a rank, in a process of its own.

    torchrun --nproc_per_node 2 many.py CASES.json

The libraries are imported once; then each case is a fork, before any thread or process group exists, with a port of its
own.  CASES is a list of `cases.Case` as JSON with a "port", a "folder" to run in and a "log" folder; NAME.RANK.log
there holds what a case said, and its exit code in the last line.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import_everything()
    for case in cases:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = one(case)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with log_file(case).open("a", encoding="utf-8") as log:
            log.write(f"\nexit code {code}\n")


def import_everything() -> None:
    """What the scripts would import; nothing here starts a thread or chooses a device."""
    import accelerate
    import bitsandbytes
    import datasets
    import deepspeed
    import peft
    import torch
    import transformers.trainer
    import trl

    for name in ("SFTTrainer", "DPOTrainer", "RewardTrainer", "KTOTrainer", "GRPOTrainer"):
        getattr(trl, name)
    assert not torch.distributed.is_initialized()
    del accelerate, bitsandbytes, datasets, deepspeed, peft, transformers


def log_file(case: dict[str, Any]) -> Path:
    return Path(case["log"]) / f"{case['name']}.{os.environ['RANK']}.log"


def one(case: dict[str, Any]) -> int:
    """The case's exit code, in the child."""
    log = os.open(log_file(case), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["MASTER_PORT"] = str(case["port"])
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # the port's first process makes the store itself
    os.environ.update(case["env"])
    os.chdir(case["folder"])
    sys.path[0] = case["folder"]  # as after `python -m`
    if not case["plain"]:
        from hf_dsvllm.run.rank import main as run

        return run(case["argv"])
    sys.argv = case["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    main()
