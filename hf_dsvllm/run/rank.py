"""One rank of a run: the script as `__main__`, as python itself would run it, with the doors put in before."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import os
import runpy
import signal
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

from hf_dsvllm.console import EXIT_CODE, end_process_group, friendly_errors, say, say_error
from hf_dsvllm.errors import DsvllmError
from hf_dsvllm.run.command import EXIT_FILE, Command, is_launch_option, read_rank
from hf_dsvllm.run.doors import install
from hf_dsvllm.run.lines import without_our_frames
from hf_dsvllm.run.state import Run

__all__ = ["execute", "main"]

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: Sequence[str]) -> int:
    """Run the script of `argv` and return its exit code; ours is 2."""
    _die_with_the_launcher()
    try:
        with friendly_errors():
            command = read_rank(argv)
            run = Run(command)
            install(run)
        code = _run(command, run)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    if code == 0:
        end_process_group()
    else:
        _leave_code(code)
    return code


def _run(command: Command, run: Run) -> int:
    """The script's exit code, or ours where it was not what the run promised."""
    code = 0
    try:
        execute(command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except DsvllmError as error:
        return _refuse(error)
    except BaseException as error:
        traceback.print_exception(without_our_frames(error))
        code = 1
    if code:
        if run.failed is not None:  # the script caught it
            say_error(run.failed)
        _explain_flags(command)
        return code
    if run.failed is not None:
        return _refuse(run.failed)
    missing = None if command.asks_for_help else what_is_missing(run)
    if missing is not None:
        return _refuse(DsvllmError(missing))
    if not run.trained and not command.asks_for_help:
        say("the script made a Trainer and did not call train(): nothing was trained or evaluated by generation")
    return 0


def execute(command: Command) -> None:
    """Run the script or module as `__main__`: `sys.argv`, `sys.path[0]`, `__file__` and pickling as under python."""
    name, path = command.target.name, command.target.path
    sys.argv = [name, *command.script_args]
    if path is None:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path:
        sys.path[0] = str(path.resolve().parent)
    file = os.path.abspath(name)  # as python does since 3.9
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(
        __file__=file,
        __builtins__=__builtins__,
        __loader__=importlib.machinery.SourceFileLoader("__main__", file),
        __cached__=None,
    )
    sys.modules["__main__"] = main_module
    # Not with this file's own `from __future__` imports.
    exec(compile(path.read_bytes(), file, "exec", dont_inherit=True), main_module.__dict__)


def what_is_missing(run: Run) -> str | None:
    """Why a script that ended well was no Trainer run; None if it was one."""
    if run.trainers:
        return None
    if run.args is None:
        return (
            "the script made no TrainingArguments: it is not a Trainer script, and nothing of preset or evaluation was "
            "used. `hf-dsvllm run` is for scripts that train with transformers' or TRL's trainers"
        )
    return "the script made TrainingArguments and no Trainer: nothing was trained by this preset"


def _refuse(error: DsvllmError) -> int:
    say_error(error)
    return EXIT_CODE


def _explain_flags(command: Command) -> None:
    """After a script failed: which of its flags would be ours in another place."""
    for word in command.script_args:
        if word.startswith("--") and is_launch_option(word):
            say(f"{word} was left to the script: as an option of `hf-dsvllm run` it stands before the script")


def _leave_code(code: int) -> None:
    path = os.environ.get(EXIT_FILE)
    if path is None:
        return
    with contextlib.suppress(FileExistsError), Path(path).open("x", encoding="utf-8") as file:
        file.write(str(code))


def _die_with_the_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher dies; a run under plain python belongs to nobody.

    accelerate's launcher of one process sets no RANK: that it is one of ours shows in the file for the exit code.
    """
    if sys.platform != "linux" or not {"RANK", EXIT_FILE} & set(os.environ):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died just before
        os.kill(os.getpid(), signal.SIGTERM)
