"""The tree of errors a user can cause or meet; everything else that escapes is a bug of ours.

Every message says what is wrong (with the values), why, and what to do.  `ConfigError` carries *all* problems found
at once, so that one run of a script is enough to correct a command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = [
    "ConfigError",
    "DsvllmError",
    "EngineError",
    "EvalFileError",
    "ExportError",
    "GpuMemoryError",
    "HardwareError",
    "MissingDependencyError",
    "ModelShapeError",
    "PresetError",
    "Problem",
    "ReportError",
    "WiringError",
]


class DsvllmError(Exception):
    """Base of all errors raised on purpose; the command line prints them without a traceback."""


class PresetError(DsvllmError, ValueError):
    """A preset that does not exist, cannot be composed, or needs what this machine lacks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration: `what` (with the values and the reason) and the `fix`."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}\n    fix: {self.fix}"


class ConfigError(DsvllmError, ValueError):
    """All problems of one configuration, found before any model is loaded."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise AssertionError("ConfigError needs at least one problem")
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1))
        super().__init__(f"{head} in this configuration:\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class MissingDependencyError(DsvllmError, ImportError):
    """An optional package is absent; the message holds the exact `pip install` line."""


class HardwareError(DsvllmError, ValueError):
    """A named machine or card that is not known, or a device that is not there."""


class ModelShapeError(DsvllmError, ValueError):
    """A model configuration from which parameters cannot be counted; names the missing or wrong field."""


class EvalFileError(DsvllmError, ValueError):
    """An evaluation file or metric that cannot be used; names file, line and reason."""


class EngineError(DsvllmError, RuntimeError):
    """The vLLM process did not start, died, or did not answer within its deadline."""


class ExportError(DsvllmError, RuntimeError):
    """An export that could not be made or was not proven equal; nothing is left that looks finished."""


class ReportError(DsvllmError, ValueError):
    """A folder that is no run's, or a report that cannot be written."""


class GpuMemoryError(DsvllmError, MemoryError):
    """A GPU ran out of memory in training; says what was predicted and what to change."""


class WiringError(DsvllmError, RuntimeError):
    """The live Trainer is not what was asked for (engine type, ZeRO stage, world size, adapters)."""
