"""How this process was started: by torchrun, accelerate, the deepspeed launcher, or by hand."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence

import psutil

from hf_dsvllm.errors import Problem

__all__ = ["Launch", "become_single_process", "processes_asked_for", "read_launch"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """`asked_processes` is what the launcher's command line says, None where it says nothing."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launched: bool
    asked_processes: int | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def problems(self) -> list[Problem]:
        """A launcher that was asked for several processes and started one trains silently alone."""
        if self.asked_processes is None or self.asked_processes <= self.world_size:
            return []
        return [
            Problem(
                f"the launcher was asked for {self.asked_processes} processes and started {self.world_size}: "
                "accelerate starts several only on GPUs, and drops the rest without a word",
                f"torchrun --nproc_per_node {self.asked_processes} SCRIPT …, or accelerate launch --multi_gpu "
                f"--num_processes {self.asked_processes} SCRIPT … (works on CPUs too)",
            )
        ]


def read_launch(env: Mapping[str, str] | None = None, parent_command: Sequence[str] | None = None) -> Launch:
    """Read the environment torch.distributed reads, and the parent's command line for the number asked for."""
    env = os.environ if env is None else env
    parent_command = _parent_command() if parent_command is None else parent_command
    launched = "RANK" in env and "WORLD_SIZE" in env
    world_size = int(env.get("WORLD_SIZE", "1")) if launched else 1
    return Launch(
        rank=int(env.get("RANK", "0")) if launched else 0,
        local_rank=int(env.get("LOCAL_RANK", "0")) if launched else 0,
        world_size=world_size,
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", str(world_size))) if launched else 1,
        launched=launched,
        asked_processes=processes_asked_for(parent_command),
    )


def processes_asked_for(command: Sequence[str]) -> int | None:
    """The N of `accelerate launch --num_processes N SCRIPT …`; None for any other command.

    Only what stands between the launcher and the script counts: the script may have a -n of its own.
    """
    words = [word for argument in command for word in argument.split("=", 1)]
    start = next((index for index, word in enumerate(words) if _is_accelerate(word)), None)
    if start is None:
        return None
    for flag, value in itertools.pairwise(words[start + 1 :]):
        if flag.endswith(".py") or (flag in ("-m", "--module") and not value.startswith("-")):
            return None
        if flag in ("--num_processes", "--num-processes", "-n") and value.isdigit():
            return int(value)
    return None


def _is_accelerate(word: str) -> bool:
    """The console command, `-m accelerate.commands.launch`, or the file of that module."""
    return os.path.basename(word) in ("accelerate", "accelerate-launch") or word.endswith(
        ("accelerate.commands.launch", "accelerate/commands/launch.py", "accelerate.commands.accelerate_cli")
    )


def become_single_process(env: MutableMapping[str, str] | None = None) -> bool:
    """Give a process started by plain `python` the variables of a one-process group; True if it needed them.

    Without them DeepSpeed looks for MPI and asks for mpi4py.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        return False
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    return True


def _parent_command() -> list[str]:
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
