"""Which processes a run has and what starts them: torchrun, or `accelerate launch` with `--accelerate_config`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import Problem
from hf_dsvllm.presets import Preset
from hf_dsvllm.run.command import Command, says_yes
from hf_dsvllm.run.script_files import read_mapping

__all__ = ["LaunchOptions", "Start", "choose_start"]

# torchrun's options in accelerate's words.
ACCELERATE = {
    "--nnodes": "--num_machines",
    "--node_rank": "--machine_rank",
    "--master_addr": "--main_process_ip",
    "--master_port": "--main_process_port",
    "--rdzv_backend": "--rdzv_backend",
    "--rdzv_conf": "--rdzv_conf",
    "--max_restarts": "--max_restarts",
}
# Values of accelerate's distributed_type with which it starts one process, whatever num_processes says
# (accelerate 1.15, commands/launch.py, launch_command).
ONE_PROCESS = (None, "NO", "MULTI_CPU")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What stands before the script.  `torchrun` are its own multi-node options, as typed."""

    num_processes: str = "auto"
    accelerate_config: Path | None = None
    torchrun: tuple[str, ...] = ()
    module: bool = False

    @property
    def pairs(self) -> dict[str, str]:
        """torchrun's options by flag."""
        return dict(zip(self.torchrun[::2], self.torchrun[1::2], strict=True))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """`processes` are those of this machine; `more_processes` is how N of them are asked for."""

    launcher: tuple[str, ...]
    processes: int
    machines: int
    device: str
    more_processes: str


def choose_start(
    options: LaunchOptions, command: Command, preset: Preset | None, gpus: int
) -> tuple[Start, list[Problem], list[str]]:
    """The start of `command` on a machine with `gpus` GPUs, what is wrong with it, and why it is as it is."""
    problems: list[Problem] = []
    reasons: list[str] = []
    file, content = options.accelerate_config, {}
    if file is not None:
        content, problems = read_mapping(file, f"--accelerate_config {file}")
    uses_cpu = says_yes(command.own.get("use_cpu")) or content.get("use_cpu") is True
    device = "cpu" if uses_cpu or not gpus else "cuda"
    machines = _machines(options, content)
    processes = _asked(options, content, machines, problems, reasons)
    if processes is None:
        processes = _automatic(command, preset, gpus, device, reasons)
    if file is None:
        launcher = _torchrun(options, machines, processes)
        more = "hf-dsvllm run --num_processes {} SCRIPT …"
    else:
        launcher = _accelerate(options, file, content, processes * machines, problems, reasons)
        problems += _alone(file, content, processes)
        more = f"num_processes: {{}} in {file}, or --num_processes {{}} before SCRIPT"
    start = Start(launcher=launcher, processes=processes, machines=machines, device=device, more_processes=more)
    return start, problems, reasons


def _machines(options: LaunchOptions, content: Mapping[str, Any]) -> int:
    """The N of --nnodes, for an elastic MIN:MAX the least; else what accelerate's file says."""
    text = options.pairs.get("--nnodes", str(content.get("num_machines", 1))).partition(":")[0]
    return max(1, int(text)) if text.isdigit() else 1


def _asked(
    options: LaunchOptions, content: Mapping[str, Any], machines: int, problems: list[Problem], reasons: list[str]
) -> int | None:
    """Processes on this machine by --num_processes, or by accelerate's file, which counts those of all machines."""
    if options.num_processes != "auto":
        if options.num_processes.isdigit() and int(options.num_processes) > 0:
            return int(options.num_processes)
        problems.append(Problem(f"--num_processes {options.num_processes} is no number of processes", "auto, 1, 2, …"))
        return 1
    total = content.get("num_processes")
    if not isinstance(total, int) or total < 1:
        return None
    reasons.append(f"{_count(max(1, total // machines))}: num_processes in {options.accelerate_config}")
    return max(1, total // machines)


def _automatic(command: Command, preset: Preset | None, gpus: int, device: str, reasons: list[str]) -> int:
    """One process a GPU, else one."""
    if command.asks_for_help:
        reasons.append("1 process: it is asked for its help")
    elif preset is not None and preset.name == "none":
        reasons.append("1 process: preset none is for one")
    elif device == "cpu":
        reasons.append("1 process: no GPU is used (--num_processes N starts more)")
    else:
        reasons.append(f"{_count(gpus)}: one for each GPU of this machine")
        return gpus
    return 1


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _torchrun(options: LaunchOptions, machines: int, processes: int) -> tuple[str, ...]:
    rendezvous: tuple[str, ...] = ()
    if machines == 1 and not any(flag.startswith(("--rdzv", "--master")) for flag in options.pairs):
        # A free port of loopback, so that several runs on one machine do not meet.
        rendezvous = ("--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
        rendezvous += ("--local-addr", "127.0.0.1")
    started = ("--nproc_per_node", str(processes))
    return (sys.executable, "-m", "torch.distributed.run", *rendezvous, *options.torchrun, *started)


def _accelerate(
    options: LaunchOptions,
    file: Path,
    content: Mapping[str, Any],
    total: int,
    problems: list[Problem],
    reasons: list[str],
) -> tuple[str, ...]:
    reasons.append(f"accelerate launch: {file} says how processes are started")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    for flag, value in options.pairs.items():
        if flag in ACCELERATE and ":" not in value:
            words += [ACCELERATE[flag], value]
        else:
            problems.append(
                Problem(
                    f"accelerate launch has nothing for {flag} {value}",
                    f"leave out --accelerate_config, or use {', '.join(ACCELERATE)} with plain values",
                )
            )
    says = content.get("num_processes")
    if total != says:
        words += ["--num_processes", str(total)]
    return tuple(words)


def _alone(file: Path, content: Mapping[str, Any], processes: int) -> list[Problem]:
    kind = content.get("distributed_type")
    if processes == 1 or kind not in ONE_PROCESS or content.get("mpirun_config"):
        return []
    return [
        Problem(
            f"{file} says distributed_type: {kind}, with which accelerate starts 1 process instead of {processes}",
            f"distributed_type: MULTI_GPU in {file}, on CPUs as well",
        )
    ]
