"""DeepSpeed and QLoRA presets, vLLM evaluation during training, and verified export for the Hugging Face Trainer.

Everything in `__all__` is public and is imported from its module on first use, so that `import hf_dsvllm` and the
command line start without torch, transformers or deepspeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_dsvllm.arguments import DsvllmSFTConfig, DsvllmTrainingArguments, with_presets
    from hf_dsvllm.console import friendly
    from hf_dsvllm.errors import (
        ConfigError,
        DsvllmError,
        EngineError,
        EvalFileError,
        ExportError,
        HardwareError,
        MissingDependencyError,
        ModelShapeError,
        PresetError,
        Problem,
        WiringError,
    )
    from hf_dsvllm.export.make import ExportReport, export_model
    from hf_dsvllm.session import Session, prepare
    from hf_dsvllm.tasks import EvalTask, load_task

# Name -> module that defines it.  The same names, in the same modules, as in the block above: kept equal by a test.
_EXPORTS = {
    "ConfigError": "errors",
    "DsvllmError": "errors",
    "DsvllmSFTConfig": "arguments",
    "DsvllmTrainingArguments": "arguments",
    "EngineError": "errors",
    "EvalFileError": "errors",
    "EvalTask": "tasks",
    "ExportError": "errors",
    "ExportReport": "export.make",
    "HardwareError": "errors",
    "MissingDependencyError": "errors",
    "ModelShapeError": "errors",
    "PresetError": "errors",
    "Problem": "errors",
    "Session": "session",
    "WiringError": "errors",
    "export_model": "export.make",
    "friendly": "console",
    "load_task": "tasks",
    "prepare": "session",
    "with_presets": "arguments",
}

__all__ = [
    "ConfigError",
    "DsvllmError",
    "DsvllmSFTConfig",
    "DsvllmTrainingArguments",
    "EngineError",
    "EvalFileError",
    "EvalTask",
    "ExportError",
    "ExportReport",
    "HardwareError",
    "MissingDependencyError",
    "ModelShapeError",
    "PresetError",
    "Problem",
    "Session",
    "WiringError",
    "__version__",
    "export_model",
    "friendly",
    "load_task",
    "prepare",
    "with_presets",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use and keep it."""
    try:
        module = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
