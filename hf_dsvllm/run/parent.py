"""The command `hf-dsvllm run`: check what can be checked without torch, choose the processes, start the launcher.

The launcher is torchrun, or `accelerate launch` with `--accelerate_config`; nothing here distributes anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml

from hf_dsvllm.auto import is_auto
from hf_dsvllm.console import say
from hf_dsvllm.ds_config import RunShape, build
from hf_dsvllm.errors import ConfigError, DsvllmError, Problem
from hf_dsvllm.fields import PresetFields, added_fields
from hf_dsvllm.hardware import detect, usable_cpus
from hf_dsvllm.launch import Launch
from hf_dsvllm.preflight import evaluation_problems, preset_problems
from hf_dsvllm.presets import Preset, get_preset
from hf_dsvllm.run.command import EXIT_FILE, Command, nearest_of_ours

__all__ = ["LaunchOptions", "Plan", "make_plan", "run_command", "start"]

PR_SET_PDEATHSIG = 1  # linux/prctl.h
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 30.0  # as torchrun gives its ranks between SIGTERM and SIGKILL


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What stands before the script.  `torchrun` are its own multi-node options, as typed."""

    num_processes: str = "auto"
    accelerate_config: Path | None = None
    torchrun: tuple[str, ...] = ()
    module: bool = False

    @property
    def nodes(self) -> int:
        """The N of --nnodes; for an elastic MIN:MAX the least."""
        values = [b for a, b in zip(self.torchrun, self.torchrun[1:], strict=False) if a == "--nnodes"]
        text = values[-1].partition(":")[0] if values else "1"
        return int(text) if text.isdigit() else 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be started, and why; `ds_config` is None where DeepSpeed is not used."""

    command: Command
    launcher: tuple[str, ...]
    rank: tuple[str, ...]
    environment: Mapping[str, str]
    preset: Preset | None
    processes: int
    device: str
    ds_config: dict[str, Any] | None
    reasons: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.launcher, *self.rank)


@dataclasses.dataclass
class _Known(PresetFields):
    """Our arguments and those of the Trainer that the checks ask for, at their defaults: the ranks check the rest."""

    fp16: bool = False
    fsdp: Any = None


def make_plan(options: LaunchOptions, command: Command) -> Plan:
    """The launcher's command line for `command`; raises ConfigError with every problem found without torch."""
    problems: list[Problem] = []
    reasons: list[str] = []
    preset = _preset(command, problems)
    gpus = len(detect().gpus)
    device = "cpu" if "--use_cpu" in command.script_args or not gpus else "cuda"
    processes = _processes(options, preset, gpus, device, problems, reasons)
    known = _Known(**{name: command.value(name) for name in added_fields()})
    world = Launch(
        rank=0, local_rank=0, world_size=processes * options.nodes, local_world_size=processes, launched=True,
        asked_processes=None,
    )  # fmt: skip
    if preset is not None:
        problems += preset_problems(known, preset, world, device, None)
    problems += evaluation_problems(known, world, device)
    problems += _rivals(options, command, preset)
    problems += _forgotten(command)
    if problems:
        raise ConfigError(problems)
    shape = RunShape(
        world_size=world.world_size,
        gpus_per_node=processes,
        device="cuda" if device == "cuda" else "cpu",
        nvme_path=Path(known.nvme_path or ".").absolute(),
    )
    return Plan(
        command=command,
        launcher=_launcher(options, processes, reasons),
        rank=("-m", "hf_dsvllm.run", *command.adapter.words(), *(["-m"] if options.module else []), *command.words),
        environment=_environment(preset, processes, reasons),
        preset=preset,
        processes=processes,
        device=device,
        ds_config=build(preset, shape) if preset is not None else None,
        reasons=tuple(reasons),
    )


def start(plan: Plan) -> int:
    """Run the plan in the foreground; the exit code is the script's, 128 + N after signal N.

    However this process ends, the launcher gets SIGTERM, and with it every rank; a rank's engine ends with the rank.
    """
    got: list[int] = []
    with tempfile.TemporaryDirectory(prefix="hf-dsvllm-run-") as folder:
        code_file = Path(folder) / "code"
        process = subprocess.Popen(
            plan.words,
            env={**os.environ, **plan.environment, EXIT_FILE: str(code_file)},
            # Its own session: a Ctrl-C reaches it once, through us, and not a second time while it ends its ranks.
            start_new_session=True,
            preexec_fn=_die_with_us,
        )

        def forward(number: int, frame: FrameType | None) -> None:
            del frame
            got.append(number)
            process.send_signal(number if len(got) == 1 else signal.SIGKILL)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            code = process.wait()
            if got:
                _end_group(process.pid, hurried=lambda: len(got) > 1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if got:
            return 128 + got[0]
        left = code_file.read_text(encoding="utf-8") if code_file.exists() else ""
    if code < 0:
        return 128 - code
    return int(left) if code and left else code


def _end_group(leader: int, *, hurried: Callable[[], bool]) -> None:
    """End what an interrupted launcher leaves in its process group: accelerate's of one process hands no signal on."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, number)
        while _lives(leader):
            if time.monotonic() > deadline or (number == signal.SIGTERM and hurried()):
                break
            time.sleep(0.05)
        else:
            return


def _lives(group: int) -> bool:
    """Whether the process group has a member that is not just waiting to be reaped."""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _die_with_us() -> None:
    # A shell starts commands in the background with SIGINT ignored, and a launcher would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _preset(command: Command, problems: list[Problem]) -> Preset | None:
    name = command.value("ds_preset")
    if not name or is_auto(name):
        return None  # the planner chooses in the ranks, from the script's own arguments
    try:
        return get_preset(name)
    except DsvllmError as error:
        problems.append(Problem(str(error), "--ds_preset with one of those names"))
        return None


def _processes(
    options: LaunchOptions, preset: Preset | None, gpus: int, device: str, problems: list[Problem], reasons: list[str]
) -> int:
    """Processes on this machine: as asked, else one a GPU, else one."""
    if options.num_processes != "auto":
        if options.num_processes.isdigit() and int(options.num_processes) > 0:
            return int(options.num_processes)
        problems.append(Problem(f"--num_processes {options.num_processes} is no number of processes", "auto, 1, 2, …"))
        return 1
    if preset is not None and preset.name == "none":
        reasons.append("1 process: preset none is for one")
        return 1
    if device == "cpu":
        reasons.append("1 process: no GPU is used (--num_processes N starts more)")
        return 1
    reasons.append(f"{gpus} processes: one for each GPU of this machine")
    return gpus


def _rivals(options: LaunchOptions, command: Command, preset: Preset | None) -> list[Problem]:
    """Another DeepSpeed configuration beside the preset's: in the script's arguments, or in accelerate's file."""
    if preset is None or not preset.uses_deepspeed:
        return []
    problems = []
    if any(word.partition("=")[0] == "--deepspeed" for word in command.script_args):
        problems.append(
            Problem(
                f"--deepspeed and --ds_preset {preset.name} both bring a DeepSpeed configuration",
                "drop one: `hf-dsvllm presets show NAME` prints a preset's JSON, to edit and pass as --deepspeed",
            )
        )
    file = _script_yaml(command.script_args)
    if file is not None and _read_yaml(file).get("deepspeed"):
        problems.append(
            Problem(
                f"{file} sets deepspeed and the command line --ds_preset {preset.name}: two DeepSpeed configurations",
                f"take deepspeed out of {file}, or drop --ds_preset",
            )
        )
    accelerate = _read_yaml(options.accelerate_config) if options.accelerate_config else {}
    if accelerate.get("distributed_type") in ("DEEPSPEED", "FSDP"):
        problems.append(
            Problem(
                f"{options.accelerate_config} says distributed_type: {accelerate['distributed_type']}, and preset "
                f"{preset.name} brings a DeepSpeed configuration of its own",
                f"distributed_type: MULTI_GPU in {options.accelerate_config}, or drop --ds_preset",
            )
        )
    return problems


def _script_yaml(script_args: Sequence[str]) -> Path | None:
    words = list(script_args)
    if "--config" not in words[:-1]:
        return None
    file = Path(words[words.index("--config") + 1])
    return file if file.suffix in (".yaml", ".yml") and file.is_file() else None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([Problem(f"{file} cannot be read: {error}", "correct the file or its name")]) from None
    return content if isinstance(content, dict) else {}


def _forgotten(command: Command) -> list[Problem]:
    """Nothing of ours was asked for: a misspelt flag, or a command that plain torchrun would do as well."""
    if command.given or command.asks_for_help:
        return []
    words = [word for word in command.script_args if word.startswith("--")]
    meant = next(((word, near) for word in words if (near := nearest_of_ours(word)) is not None), None)
    hint = (
        f"{meant[0]} is not one of ours: {meant[1]}?" if meant else "--ds_preset NAME; `hf-dsvllm presets` lists them"
    )
    return [Problem("neither --ds_preset nor --gen_eval_file is given: there is nothing to add to the script", hint)]


def _launcher(options: LaunchOptions, processes: int, reasons: list[str]) -> tuple[str, ...]:
    if options.accelerate_config is not None:
        asked = () if options.num_processes == "auto" else ("--num_processes", options.num_processes)
        reasons.append(f"accelerate launch: {options.accelerate_config} says how processes are started")
        return (
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(options.accelerate_config),
            *asked,
        )
    rendezvous = options.torchrun
    if not rendezvous:
        # A free port of loopback, so that several runs on one machine do not meet.
        rendezvous = ("--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
        rendezvous += ("--local-addr", "127.0.0.1")
    return (sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc_per_node", str(processes))


def _environment(preset: Preset | None, processes: int, reasons: list[str]) -> dict[str, str]:
    """What is added to the environment of the launcher."""
    if "OMP_NUM_THREADS" in os.environ or preset is None or preset.offload_optimizer == "none":
        return {}
    share = max(1, usable_cpus() // processes)
    reasons.append(f"OMP_NUM_THREADS={share}: the optimizer steps on the CPU, and torchrun would give it one thread")
    return {"OMP_NUM_THREADS": str(share)}


def run_command(options: LaunchOptions, command: Command, *, dry_run: bool) -> int:
    """`hf-dsvllm run`: plan, then start it or print it."""
    plan = make_plan(options, command)
    if dry_run:
        from hf_dsvllm.run.dry import as_text

        print(as_text(plan))
        return 0
    for reason in plan.reasons:
        say(reason)
    return start(plan)
