"""--resume_from_checkpoint before anything is loaded: which checkpoint is meant, and whether this run can go on."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.ds_config import get_key, zero_stage
from hf_dsvllm.errors import DsvllmError, Problem
from hf_dsvllm.launch import Launch
from hf_dsvllm.presets import Preset, get_preset

__all__ = ["checkpoint_problems", "find_checkpoint"]

LAST = ("true", "last")
STATE = "trainer_state.json"
# What the Trainer looks for where DeepSpeed is not at work (transformers 5.19, Trainer._load_from_checkpoint).
WEIGHTS = ("model*.safetensors*", "pytorch_model*", "adapter_model.*", "*/adapter_model.*")
SHOWN = 5


def find_checkpoint(given: str | bool | None, output_dir: Path) -> tuple[Path | None, list[Problem]]:
    """The checkpoint folder that `given` names, None where a run does not resume, and what is wrong with it.

    `true` and `last` are the last checkpoint in `output_dir`, unless there is a folder of that name.
    """
    if not given:
        return None, []
    there = sorted((path for path in output_dir.glob("checkpoint-*") if path.is_dir()), key=_step)
    folder = Path(str(given)).expanduser()
    if str(given).lower() in LAST and not folder.is_dir():
        if there:
            return there[-1], _damages(there[-1], there[:-1])
        what = f"resume_from_checkpoint={given}: {output_dir} has no checkpoint-*"
        return None, [Problem(what, "leave it out to start afresh, or give the earlier run's --output_dir")]
    if not folder.is_dir():
        return None, [Problem(f"resume_from_checkpoint={given} is no folder", _others(folder, there))]
    return folder, _damages(folder, sorted(folder.glob("checkpoint-*"), key=_step) or there)


def checkpoint_problems(
    checkpoint: Path, config: dict[str, Any] | None, preset: Preset | None, launch: Launch
) -> list[Problem]:
    """What the run that wrote `checkpoint` has otherwise than this one, as far as resuming it would fail.

    `config` is DeepSpeed's, None without.  Its ZeRO optimizer state can be loaded only as it was cut, unless it was
    converted to a universal checkpoint; of others the Trainer takes what it finds.
    """
    if config is None:
        if any(any(checkpoint.glob(pattern)) for pattern in WEIGHTS):
            return []
        what = f"{checkpoint} has no weights that a run without DeepSpeed can go on from"
        return [Problem(what, "--ds_preset as it was written")]
    if not any(checkpoint.glob("global_step*")):
        what = f"{checkpoint} has no global_step* folder, DeepSpeed's own part of a checkpoint"
        return [Problem(what, "--ds_preset as it was written; one of --save_only_model cannot be resumed")]
    if not zero_stage(config) or get_key(config, "checkpoint.load_universal"):
        return []
    record = _record(checkpoint.parent)
    differ = []
    if (saved := record.get("world_size")) not in (None, launch.world_size):
        differ.append((f"{saved} processes", f"{launch.world_size}"))
    if preset is not None and (other := _other_preset(record, preset)) is not None:
        differ.append((f"preset {other}", f"preset {preset.name}"))
    elif (stage := record.get("zero_stage")) not in (None, zero_stage(config)):
        differ.append((f"ZeRO stage {stage}", f"stage {zero_stage(config)}"))
    return [
        Problem(
            f"{checkpoint} is of a run with {before}, this one has {now}: DeepSpeed loads the optimizer only as it was "
            "cut",
            f"start with {before}, as {checkpoint.parent / 'run.json'} says (if that is of a later run, move it away)",
        )
        for before, now in differ
    ]


def _damages(checkpoint: Path, others: list[Path]) -> list[Problem]:
    if (checkpoint / STATE).is_file():
        return []
    what = f"resume_from_checkpoint: {checkpoint} is no checkpoint, it has no {STATE}"
    return [Problem(what, _others(checkpoint, others))]


def _others(missed: Path, there: list[Path]) -> str:
    """The nearest of the checkpoints that are there, or the last ones."""
    near = difflib.get_close_matches(missed.name, [path.name for path in there], n=1, cutoff=0.8)
    named = [str(path) for path in there if path.name in near] or [str(path) for path in there[-SHOWN:]]
    return " or ".join(named) or "leave it out: there is no checkpoint-* in --output_dir"


def _record(run_dir: Path) -> Mapping[str, Any]:
    """run.json, empty where there is none that can be read."""
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _other_preset(record: Mapping[str, Any], preset: Preset) -> str | None:
    """The recorded preset, if it is known and cuts the optimizer otherwise than this one."""
    name = record.get("preset")
    if not isinstance(name, str):
        return None
    try:
        saved = get_preset(name)
    except DsvllmError:
        return None
    return None if _cut(saved) == _cut(preset) else saved.name


def _cut(preset: Preset) -> tuple[object, ...]:
    """What decides how DeepSpeed cuts the optimizer and where it lies.

    Not `offload_param`: the weights' partitions have the same sizes on the CPU, and the fp32 ones are made of those
    (DeepSpeed 0.19.8, runtime/zero/stage3.py, _create_fp16_sub_groups and _rigid_load_state_dict).
    """
    settings = tuple((setting.key, setting.value) for setting in preset.deepspeed)
    return preset.zero_stage, preset.offload_optimizer, preset.adapter, preset.sequence_parallel, settings


def _step(checkpoint: Path) -> int:
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
