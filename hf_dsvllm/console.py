"""What a person reads in the terminal: a line per decision, from the main process only; errors without traceback."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import functools
import hashlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

from hf_dsvllm.errors import ConfigError, DsvllmError, GpuMemoryError, Problem

__all__ = ["friendly", "friendly_errors", "is_main_process", "say", "say_error"]

EXIT_CODE = 2
UNUSED = "not used by the HfArgumentParser"  # transformers and TRL, of unknown arguments
P = ParamSpec("P")
R = TypeVar("R")


def is_main_process() -> bool:
    """Whether this is global rank 0 (or the only process)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a decision or a change, with its reason, to stderr; silent on every rank but 0."""
    if is_main_process():
        print(f"hf-dsvllm: {message}", file=sys.stderr, flush=True)


def say_error(error: DsvllmError) -> None:
    """Print an error of ours to stderr, from whatever rank: of ranks that say the same, the first one of a machine."""
    text = str(error)
    if isinstance(error, GpuMemoryError) and error.__cause__ is not None:
        text += f"\n    cause: {_one_line(error.__cause__)}"
    if _said_by_another_rank(text):
        return
    who = "" if is_main_process() else f"rank {os.environ['RANK']}: "
    print(f"\nhf-dsvllm: error: {who}{text}\n", file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    """`OutOfMemoryError at modeling.py:240: the message`."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())}"


def _said_by_another_rank(text: str) -> bool:
    """Whether a rank of this machine has printed `text`: torchrun gives the ranks of each start a folder for errors.

    Without that folder, or where it cannot be written, nobody knows, and every rank prints.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/RANK/error.json
    if not own:
        return False
    name = f"hf-dsvllm-error-{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
    try:
        with (Path(own).parent.parent / name).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn an error of ours or in the arguments into its message and exit code 2, Ctrl-C into 130; others pass."""
    try:
        yield
    except DsvllmError as error:
        say_error(error)
        raise SystemExit(EXIT_CODE) from None
    except (ValueError, OSError) as error:
        wrong = arguments_error(error)
        if wrong is None:
            raise
        say_error(wrong)
        raise SystemExit(EXIT_CODE) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(130) from None


def arguments_error(error: Exception) -> ConfigError | None:
    """What transformers' or TRL's parser raised, as a problem with its fix; None for what comes from elsewhere."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    parser = next((one for one in frames if isinstance(one, argparse.ArgumentParser)), None)
    if parser is None:
        return None
    if UNUSED not in str(error):
        return ConfigError([Problem(f"the arguments: {error}", "correct it; --help lists all arguments")])
    known = [action.option_strings[0] for action in parser._actions if action.option_strings]
    words = re.findall(r"'([^']*)'", str(error))
    flags = [word for word in words if word.startswith("-")]  # besides them their values are listed
    return ConfigError([_unknown(word, known) for word in flags or words])


def _unknown(word: str, known: Sequence[str]) -> Problem:
    near = difflib.get_close_matches(word, known, n=3)
    fix = f"did you mean {', '.join(near)}?" if near else "leave it out; --help lists all arguments"
    return Problem(f"{word} is no argument of this script", fix)


def friendly(main: Callable[P, R]) -> Callable[P, R]:
    """Decorator for a script's `main`: `friendly_errors` around the call, and a rank ended cleanly after it."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with friendly_errors():
            result = main(*args, **kwargs)
        # Called by the program itself: under a profiler, a debugger or runpy somebody is still to come.
        if end_process_group() and sys._getframe(1).f_back is None:
            end_process()
        return result

    return wrapped


def end_process_group() -> bool:
    """End torch's process group; whether this process had one.  torch asks for it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    distributed.destroy_process_group()
    return True


def end_process() -> NoReturn:
    """End this process with 0 as the interpreter would, but without taking it apart.

    There a rank that has done all its work may be aborted by native threads that are still alive ("terminate called
    without an active exception", exit code -6: seen twice beside other work, torch 2.13 with gloo), and
    the launcher reports a failed run.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
