"""Making training arguments as a script does, and leaving no process group or accelerate state to the next test."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_dsvllm.arguments import with_presets
from hf_dsvllm.errors import ConfigError, Problem

# A DeepSpeed configuration nothing is wrong with.
SOUND: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
}


def sound(**changes: Any) -> dict[str, Any]:
    """`SOUND` with top-level blocks added or replaced."""
    return copy.deepcopy(SOUND) | changes


def enter(folder: Path, cls: type = TrainingArguments, **kwargs: Any) -> Any:
    """Arguments of `with_presets(cls)` that write below `folder`."""
    return with_presets(cls)(output_dir=str(folder / "run"), report_to=[], **kwargs)


def problems_of(folder: Path, cls: type = TrainingArguments, **kwargs: Any) -> tuple[Problem, ...]:
    """The problems these arguments are refused with; () if they are accepted."""
    try:
        enter(folder, cls, **kwargs)
    except ConfigError as error:
        return error.problems
    return ()


def leave() -> None:
    """Forget accelerate's state and end the process group that arguments with DeepSpeed begin."""
    import deepspeed.comm.comm as deepspeed_group
    import deepspeed.utils.groups as of_engines
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    deepspeed_group.cdb = of_engines._WORLD_GROUP = of_engines.mpu = of_engines.mesh_device = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
