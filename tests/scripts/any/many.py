"""Several scripts in one torchrun, each as `hf_dsvllm.run` runs it in a rank, in a process of its own.

    torchrun --nproc_per_node 2 many.py CASES.json

The libraries are imported once; then each case is a fork, before any thread or process group exists, with a port of its
own.  CASES is a list of `cases.Case` as JSON with a "folder" to run in and a "log" folder; NAME.RANK.log there holds
what a case said, and its exit code in the last line.  A case that takes longer than its "limit_s" is made to print
where all its threads are, then killed: the cases after it still run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Below the range that the kernel hands out by itself: nothing else on the machine takes one between choice and use.
PORTS = range(15_000, 32_000)
MEET_LIMIT_S = 300.0  # the ranks end a case, and import everything, at different times
LAST_WORDS_S = 5.0


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import_everything()
    for case in cases:
        port = agreed_port(case)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = one(case, port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = wait_for(child, case["limit_s"])
        with log_file(case).open("a", encoding="utf-8") as log:
            log.write(f"\nexit code {code}\n")


def agreed_port(case: dict[str, Any]) -> int:
    """A free port that rank 0 chooses when both ranks are here, so that neither's time starts before the other's."""
    folder, name, rank = Path(case["log"]), case["name"], int(os.environ["RANK"])
    (folder / f"{name}.{rank}.here").touch()
    wait_until((folder / f"{name}.{1 - rank}.here").exists, f"rank {1 - rank} did not come to {name}")
    file = folder / f"{name}.port"
    if rank == 0:
        draft = file.with_suffix(".draft")
        draft.write_text(str(free_port()), encoding="ascii")
        draft.replace(file)
    wait_until(file.exists, f"rank 0 chose no port for {name}")
    return int(file.read_text(encoding="ascii"))


def wait_until(true: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + MEET_LIMIT_S
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{otherwise} within {MEET_LIMIT_S:.0f} s")
        time.sleep(0.01)


def free_port() -> int:
    for _ in range(1000):
        port = random.SystemRandom().choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port in {PORTS}")


def wait_for(child: int, limit_s: float) -> int:
    """The child's exit code; beyond `limit_s` it says where it is and is killed, which gives -SIGABRT or -SIGKILL."""
    for limit, number in ((limit_s, signal.SIGABRT), (LAST_WORDS_S, signal.SIGKILL)):
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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


def one(case: dict[str, Any], port: int) -> int:
    """The case's exit code, in the child."""
    log = os.open(log_file(case), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=2)  # a number: sys.stderr may be replaced by the script
    os.environ["MASTER_PORT"] = str(port)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # the port's first process makes the store itself
    os.environ.pop("TORCHELASTIC_ERROR_FILE", None)  # by it ranks see that another said the same: in an earlier case
    os.environ.update(case["env"])
    os.chdir(case["folder"])
    sys.path[0] = case["folder"]  # as after `python -m`
    if not case["plain"]:
        from hf_dsvllm.run.rank import main as run

        return run(case["argv"])
    keep_groups()
    sys.argv = case["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def keep_groups() -> None:
    """Let no DDP reducer be the last to hold its process group, as it is after TRL's `end_training`.

    torch 2.13 then joins gloo's threads with the GIL held, which one of them may wait for in order to free a tensor:
    6 of 60 plain runs of trl/scripts/sft.py stood still for ever in that place, beside a busy core.
    """
    import torch

    destroy = torch.distributed.destroy_process_group

    def destroy_and_keep(group: Any = None) -> None:
        kept.append(group or torch.distributed.group.WORLD)
        destroy(group)

    kept: list[Any] = []
    torch.distributed.destroy_process_group = destroy_and_keep


if __name__ == "__main__":
    main()
