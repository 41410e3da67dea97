"""What a person reads in the terminal: a line per decision, from the main process only; errors without traceback."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from hf_dsvllm.errors import DsvllmError

__all__ = ["friendly", "friendly_errors", "is_main_process", "say"]

EXIT_CODE = 2
P = ParamSpec("P")
R = TypeVar("R")


def is_main_process() -> bool:
    """Whether this is global rank 0 (or the only process)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a decision or a change, with its reason, to stderr; silent on every rank but 0."""
    if is_main_process():
        print(f"hf-dsvllm: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn an error of ours into its message and exit code 2, and Ctrl-C into 130; others pass."""
    try:
        yield
    except DsvllmError as error:
        if is_main_process():
            print(f"\nhf-dsvllm: error: {error}\n", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(130) from None


def friendly(main: Callable[P, R]) -> Callable[P, R]:
    """Decorator for a script's `main`: `friendly_errors` around the call, and the process group ended after it."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with friendly_errors():
            result = main(*args, **kwargs)
        end_process_group()
        return result

    return wrapped


def end_process_group() -> None:
    """End torch's process group, if this process has one.

    torch asks for it: left to the interpreter's exit, a process that has done all its work may be aborted by threads
    still alive ("terminate called without an active exception"), and the launcher reports a failed run.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
