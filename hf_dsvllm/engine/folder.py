"""RUN/engine, where vLLM's logs and its copies of weights lie."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hf_dsvllm.errors import EngineError

__all__ = ["next_log", "writing_for_engine"]


@contextlib.contextmanager
def writing_for_engine(run_dir: Path) -> Iterator[None]:
    """Turn the system's refusal to write into RUN/engine into an EngineError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of the hub's client and the like, not the system's
            raise
        raise EngineError(
            f"vLLM cannot be started: {error.filename or run_dir / 'engine'}: {error.strerror}. Its log and its copies "
            "of weights go there: make room, let this user write it, or take another --output_dir."
        ) from error


def next_log(folder: Path) -> Path:
    """vllm-<n>.log with the first unused number; the folder is made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (folder / f"vllm-{number}.log").exists():
        number += 1
    return folder / f"vllm-{number}.log"
