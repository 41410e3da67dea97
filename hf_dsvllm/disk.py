"""Whether the disks of a run hold what it writes: checkpoints, snapshots, vLLM's copies and exports."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.adapters import why_merge_for_engine
from hf_dsvllm.ds_config import get_key, zero_stage
from hf_dsvllm.ending import export_places
from hf_dsvllm.errors import Problem
from hf_dsvllm.fields import asks_for_answers
from hf_dsvllm.launch import read_launch
from hf_dsvllm.model_shape import ModelShape
from hf_dsvllm.placement import Place, choose_place, for_adapters, visible_gpus

__all__ = ["disk_problems"]

GIB = 1 << 30
WEIGHTS_BYTES_PER_PARAMETER = 2  # bf16, as they are exported
Part = tuple[str, int]  # what it is, bytes


def disk_problems(args: Any, model_args: Any, device: str, shape: ModelShape) -> list[Problem]:
    """Each disk that has less free than is on it at once, while the run trains or when it ends.

    One checkpoint is counted, however many are kept, and adapters are counted as nothing: the least there is.
    """
    try:
        return _problems(args, model_args, device, shape)
    except OSError as error:
        what = f"{error.filename} cannot be looked at: {error.strerror}"
        return [Problem(what, "--output_dir and --export_to in folders that you may read")]


def _problems(args: Any, model_args: Any, device: str, shape: ModelShape) -> list[Problem]:
    run_dir, place = Path(args.output_dir), _place(args, model_args, device)
    checkpoint, engine = _checkpoint(args, model_args, shape), _engine(run_dir, place, model_args, shape)
    while_training, at_end = _snapshots(args, model_args, device, shape, place)
    exports = _exports(args, shape, place)
    out = export_places(run_dir, args.export_to)[0]
    apart = _existing(out).stat().st_dev != _existing(run_dir).stat().st_dev
    ends = [*checkpoint, *at_end, *([] if apart else exports)]
    needs = [(run_dir, max([*checkpoint, *while_training, *engine], ends, key=_bytes))]
    needs += [(out, exports)] if apart else []
    return [problem for folder, parts in needs for problem in _too_small(folder, parts)]


def _checkpoint(args: Any, model_args: Any, shape: ModelShape) -> list[Part]:
    saving = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    if not saving or model_args.use_peft:
        return []
    return [("a checkpoint", _checkpoint_bytes(args, model_args) * shape.parameters)]


def _checkpoint_bytes(args: Any, model_args: Any) -> int:
    """Least bytes of a parameter in a full checkpoint.

    ZeRO: weights 2 + master weights 4 + Adam's moments 8, the last two halved in bf16; else weights w + moments 2 w.
    Optimizers other than Adam may keep less, and count as nothing.
    """
    config = args.deepspeed if isinstance(args.deepspeed, dict) else {}
    optim = str(get_key(config, "optimizer.type") or getattr(args.optim, "value", args.optim)).lower()
    adam = optim in ("adam", "adamw") or (optim.startswith("adamw_torch") and not optim.endswith("bit"))
    if zero_stage(config):
        master = 2 if get_key(config, "bf16.bf16_master_weights_and_grads") else 4
        moments = 4 if get_key(config, "bf16.bf16_optimizer_states") else 8
        weights = WEIGHTS_BYTES_PER_PARAMETER
    else:
        weights = 4 if model_args.dtype == "float32" else WEIGHTS_BYTES_PER_PARAMETER
        master, moments = 0, 2 * weights
    return weights if args.save_only_model else weights + master + (moments if adam else 0)


def _publishing(args: Any) -> int:
    """The least number of evaluations with new weights: those known from the arguments, at least that at the end.

    The first of a run has the weights that vLLM started with.  Steps of a run that counts epochs are not known yet.
    """
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    every = args.gen_eval_steps or (args.eval_steps if strategy == "steps" else None)
    if every and (every < 1 or args.max_steps > 0):
        return max(1, math.ceil(1 / every if every < 1 else args.max_steps / every))
    if not every and strategy == "epoch" and args.max_steps <= 0:
        return max(1, math.ceil(args.num_train_epochs))
    return 1


def _snapshots(
    args: Any, model_args: Any, device: str, shape: ModelShape, place: Place | None
) -> tuple[list[Part], list[Part]]:
    """Snapshots on the disk at once: while training the latest, the best and a new one, then the last and the best.

    Never more than are published.  Of streamed weights the best are written, where scores come late the last alone, and
    before the first step of a resumed run those it begins with.  A resumed run has some of them already.
    """
    if model_args.use_peft:
        return [], []
    while_training, at_end = (0, 1) if place is None else (3, 2)
    if place is not None and place.stream:
        begins = int(bool(args.resume_from_checkpoint and args.gen_eval_on_start))
        while_training, at_end = (begins, 1) if place.late else (2, 2)
    published = _publishing(args)
    while_training, at_end = min(while_training, published), min(at_end, published)
    if args.load_best_model_at_end:  # the last are the best
        at_end = 1
    there = len(list(Path(args.output_dir).glob("snapshots/step-*"))) if args.resume_from_checkpoint else 0
    each = (4 if device == "cpu" else 2) * shape.parameters
    return _several("snapshot", while_training - there, each), _several("snapshot", at_end - there, each)


def _engine(run_dir: Path, place: Place | None, model_args: Any, shape: ModelShape) -> list[Part]:
    """Whole models made for vLLM: the base as a QLoRA trainer holds it, and an adapter merged into its base."""
    if place is None or not model_args.use_peft:
        return []
    parts = []
    if place.url is None and model_args.load_in_4bit:
        each = 4 if model_args.dtype == "float32" else 2
        parts.append(("vLLM's copy of the base", each * shape.parameters, "base"))
    if not place.stream and why_merge_for_engine(model_args, place.device) is not None:
        parts.append(("vLLM's merged copy", (4 if place.device == "cpu" else 2) * shape.parameters, "merged"))
    # One that a killed run has left is removed before another is written.
    return [(what, size) for what, size, name in parts if not (run_dir / "engine" / name).is_dir()]


def _exports(args: Any, shape: ModelShape, place: Place | None) -> list[Part]:
    if args.export_to == "none":
        return []
    has_best = place is not None and not (place.stream and place.late)
    another = has_best and _publishing(args) > 1 and not args.load_best_model_at_end
    return _several("export", 2 if another else 1, WEIGHTS_BYTES_PER_PARAMETER * shape.parameters)


def _several(what: str, count: int, each: int) -> list[Part]:
    if count < 1:
        return []
    return [(f"{count} {what}s" if count > 1 else f"one {what}", count * each)]


def _bytes(parts: Sequence[Part]) -> int:
    return sum(size for _, size in parts)


def _too_small(folder: Path, parts: Sequence[Part]) -> list[Problem]:
    existing, needed = _existing(folder), _bytes(parts)
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return []
    listed = ", ".join(f"{what} {size / GIB:.1f}" for what, size in parts)
    return [
        Problem(
            f"{existing} has {free / GIB:.1f} GiB free, the run needs {needed / GIB:.1f} GiB there at once ({listed})",
            "a larger disk (--output_dir, --export_to), --save_only_model true, --save_strategy no or --export_to none",
        )
    ]


def _existing(folder: Path) -> Path:
    """The nearest folder that is there already."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _place(args: Any, model_args: Any, device: str) -> Place | None:
    """Where vLLM will run, None for a run that asks it nothing."""
    if not asks_for_answers(args):
        return None
    place = choose_place(args, device, read_launch(), visible_gpus() if device == "cuda" else [])
    return for_adapters(place, args) if model_args.use_peft else place
