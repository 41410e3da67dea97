"""The command `hf-dsvllm run`: check what can be checked without torch, start the launcher, end with it."""

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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from hf_dsvllm.auto import is_auto
from hf_dsvllm.console import say
from hf_dsvllm.ds_config import RunShape, build
from hf_dsvllm.errors import ConfigError, DsvllmError, Problem
from hf_dsvllm.fields import PresetFields, added_fields
from hf_dsvllm.hardware import detect, usable_cpus
from hf_dsvllm.launch import Launch
from hf_dsvllm.preflight import evaluation_problems, preset_problems
from hf_dsvllm.presets import Preset, get_preset
from hf_dsvllm.run.command import EXIT_FILE, Command, is_launch_option, says_yes
from hf_dsvllm.run.launcher import LaunchOptions, Start, choose_start
from hf_dsvllm.run.script_files import read_mapping

__all__ = ["LaunchOptions", "Plan", "make_plan", "run_command", "start"]

PR_SET_PDEATHSIG = 1  # linux/prctl.h
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOHUP = (signal.SIGHUP, signal.SIG_IGN)
GRACE_S = 30.0  # as torchrun gives its ranks between SIGTERM and SIGKILL


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
    """Our arguments and those of the Trainer that the checks ask for: the ranks, which have them all, check the rest.

    What the command does not say may stand in the script, so the Trainer's are as no check would refuse them.
    """

    fp16: bool = False
    metric_for_best_model: str | None = None
    save_strategy: str = "steps"
    greater_is_better: bool = False
    predict_with_generate: bool = True


def make_plan(options: LaunchOptions, command: Command) -> Plan:
    """The launcher's command line for `command`; raises ConfigError with every problem found without torch."""
    problems: list[Problem] = []
    preset = _preset(command, problems)
    start, trouble, reasons = choose_start(options, command, preset, len(detect().gpus))
    problems += trouble
    if not command.asks_for_help:
        problems += _shortcomings(options, command, preset, start)
    if problems:
        raise ConfigError(problems)
    reasons += [
        f"{word} is left to the script: as an option of `hf-dsvllm run` it would stand before it"
        for word in command.script_args
        if is_launch_option(word) and word.startswith("--")
    ]
    shape = RunShape(
        world_size=start.processes * start.machines,
        gpus_per_node=start.processes,
        device="cuda" if start.device == "cuda" else "cpu",
        nvme_path=Path(command.value("nvme_path") or ".").absolute(),
    )
    return Plan(
        command=command,
        launcher=start.launcher,
        rank=("-m", "hf_dsvllm.run", *command.adapter.words(), *(["-m"] if options.module else []), *command.words),
        environment=_environment(preset, start.processes, reasons),
        preset=preset,
        processes=start.processes,
        device=start.device,
        ds_config=build(preset, shape) if preset is not None else None,
        reasons=tuple(reasons),
    )


def _shortcomings(options: LaunchOptions, command: Command, preset: Preset | None, start: Start) -> list[Problem]:
    """What preset and evaluation need and are not given."""
    known = _Known(
        **{name: command.value(name) for name in added_fields()},
        metric_for_best_model=command.own.get("metric_for_best_model"),
        save_strategy=command.own.get("save_strategy", "steps"),
        greater_is_better=says_yes(command.own.get("greater_is_better")),
    )
    world = Launch(
        rank=0, local_rank=0, world_size=start.processes * start.machines, local_world_size=start.processes,
        launched=True, asked_processes=None,
    )  # fmt: skip
    problems = []
    if preset is not None:
        problems += preset_problems(known, preset, world, start.device, None, more_processes=start.more_processes)
    problems += evaluation_problems(known, world, start.device)
    problems += _rivals(options, command, preset)
    problems += _nothing_asked(command)
    return problems


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

        # Under nohup a SIGHUP is to end nothing.
        caught = [number for number in FORWARDED if (number, signal.getsignal(number)) != NOHUP]
        before = {number: signal.signal(number, forward) for number in caught}
        try:
            code = process.wait()
            if got:
                _end_group(process.pid, hurried=lambda: len(got) > 1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if got and code:  # with code 0 the launcher had finished by itself
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


def _rivals(options: LaunchOptions, command: Command, preset: Preset | None) -> list[Problem]:
    """FSDP, or a DeepSpeed configuration beside the preset's: in the script's arguments, or in accelerate's file."""
    file = options.accelerate_config
    kind = (read_mapping(file, "")[0] if file is not None else {}).get("distributed_type")
    problems = []
    if kind == "FSDP":
        problems.append(
            Problem(
                f"{file} says distributed_type: FSDP, whose shards can be neither evaluated nor exported",
                f"distributed_type: MULTI_GPU in {file}; --ds_preset zero3 shards as FSDP does",
            )
        )
    if preset is None or not preset.uses_deepspeed:
        return problems
    if any(word.partition("=")[0] == "--deepspeed" for word in command.script_args):
        problems.append(
            Problem(
                f"--deepspeed and --ds_preset {preset.name} both bring a DeepSpeed configuration",
                "drop one: `hf-dsvllm presets show NAME` prints a preset's JSON, to edit and pass as --deepspeed",
            )
        )
    if command.config is not None and command.config.values.get("deepspeed"):
        file = command.config.typed
        problems.append(
            Problem(
                f"{file} sets deepspeed and the command line --ds_preset {preset.name}: two DeepSpeed configurations",
                f"take deepspeed out of {file}, or drop --ds_preset",
            )
        )
    if kind == "DEEPSPEED":
        problems.append(
            Problem(
                f"{options.accelerate_config} says distributed_type: DEEPSPEED, and preset {preset.name} brings a "
                "DeepSpeed configuration of its own",
                f"distributed_type: MULTI_GPU in {options.accelerate_config}, or drop --ds_preset",
            )
        )
    return problems


def _nothing_asked(command: Command) -> list[Problem]:
    """A command that plain torchrun would do as well."""
    if command.given:
        return []
    return [
        Problem(
            "neither --ds_preset nor --gen_eval_file is given: there is nothing to add to the script",
            "--ds_preset NAME; `hf-dsvllm presets` lists them",
        )
    ]


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
