"""`--ds_preset` and its companions as arguments of any TrainingArguments class.

    DsvllmDPOConfig = with_presets(DPOConfig)

gives a dataclass that HfArgumentParser and TRL's parser read like the original, plus the fields of `PresetFields`.
When such arguments are created, the preset becomes a DeepSpeed configuration, every known trap is checked, all problems
are raised as one `ConfigError`, and every value changed is printed with its reason.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments

from hf_dsvllm import auto, traps
from hf_dsvllm._compat import forget_earlier_deepspeed, join_deepspeed_on_cpu
from hf_dsvllm.adapters import full_dtype
from hf_dsvllm.console import say
from hf_dsvllm.ds_config import RunShape, build, get_key
from hf_dsvllm.errors import ConfigError, DsvllmError, Problem
from hf_dsvllm.features import feature_problems
from hf_dsvllm.fields import PresetFields, asks_for_answers
from hf_dsvllm.given import note_given
from hf_dsvllm.hardware import usable_cpus
from hf_dsvllm.launch import Launch, become_single_process, read_launch
from hf_dsvllm.preflight import (
    evaluation_problems,
    left_at_default,
    preset_problems,
    read_user_config,
    trap_problems,
)
from hf_dsvllm.presets import Preset, get_preset
from hf_dsvllm.resume import checkpoint_problems, find_checkpoint
from hf_dsvllm.traps import Fix

__all__ = [
    "DsvllmSFTConfig",  # noqa: F822 - from __getattr__: TRL is imported only when asked for
    "DsvllmTrainingArguments",
    "full_dtype",
    "has_generated_init",
    "on_one_gpu",
    "resolve_preset",
    "training_device",
    "with_presets",
]

TRAINERS_FOLDER = "trainer_output"  # where transformers writes without --output_dir
Args = TypeVar("Args", bound=TrainingArguments)
_generated: dict[type, type] = {}


def with_presets(cls: type[Args]) -> type[Args]:
    """A subclass of `cls` with the preset fields; the same class each time, picklable, copied like `cls`.

    Raises TypeError if `cls` is not a TrainingArguments class or already uses one of the names.
    """
    if issubclass(cls, PresetFields):
        return cls
    if cls in _generated:
        return _generated[cls]
    if not issubclass(cls, TrainingArguments):
        raise TypeError(f"{cls.__name__} is not a TrainingArguments class; with_presets extends only those")
    taken = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(PresetFields)}
    if taken:
        raise TypeError(f"{cls.__name__} has fields named {sorted(taken)} of its own; rename them")

    @dataclasses.dataclass
    class WithPresets(PresetFields, cls):  # type: ignore[misc, valid-type]
        def __new__(new: type, *_args: Any, **keywords: Any) -> Any:
            made = super().__new__(new)  # type: ignore[misc]
            note_given(made, keywords)
            return made

        def __post_init__(self) -> None:
            _before(self)
            cls.__post_init__(self)
            _on_one_gpu(self)
            if self.deepspeed and self.use_cpu:
                join_deepspeed_on_cpu()

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            if type(self) is not WithPresets:  # a user's subclass, which pickle finds by its own name
                return super().__reduce_ex__(protocol)
            return _empty_instance, (cls,), self.__dict__

    if not has_generated_init(cls):
        WithPresets.__init__ = cls.__init__  # type: ignore[method-assign]
    WithPresets.__name__ = WithPresets.__qualname__ = f"Dsvllm{cls.__name__}"
    WithPresets.__module__ = __name__
    WithPresets.__doc__ = cls.__doc__
    _generated[cls] = WithPresets
    return WithPresets


def has_generated_init(cls: type) -> bool:
    """Whether `cls` is made by a dataclass's constructor; one written by hand is not to be replaced."""
    return bool(cls.__init__.__code__.co_filename == "<string>")  # type: ignore[misc]


def resolve_preset(args: Any) -> Preset | None:
    """The preset of these arguments, None without one."""
    return get_preset(args.ds_preset) if getattr(args, "ds_preset", None) else None


def training_device(args: Any) -> str:
    """ "cuda" or "cpu", as the run will use it."""
    import torch

    return "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"


def on_one_gpu(args: Any) -> dict[str, Any]:
    """What keeps `from_pretrained` on the one GPU that a single process without DeepSpeed trains on.

    TRL's trainers would split a model given by name over all GPUs they see ("auto"), also those vLLM takes.
    """
    if args.ds_preset is None or args.deepspeed or read_launch().world_size > 1 or training_device(args) == "cpu":
        return {}
    return {"device_map": {"": 0}}


def _before(args: Any) -> None:
    """Everything that must be settled before TrainingArguments derives state from its fields."""
    if args.ds_preset is not None or args.deepspeed:
        forget_earlier_deepspeed()
    launch = read_launch()
    device = training_device(args)
    problems = [*launch.problems(), *evaluation_problems(args, launch, device), *feature_problems(args.ds_speed)]
    user_config, unreadable = read_user_config(args)
    problems += unreadable
    if args.ds_preset is not None or args.deepspeed or asks_for_answers(args) or args.export_to not in (None, "none"):
        problems += traps.fsdp_problems(args.fsdp, os.environ)
    preset: Preset | None = None
    planned = auto.choose(args, launch, device) if auto.is_auto(args.ds_preset) else None
    problems += planned.problems if planned else ()
    try:
        preset = None if planned and planned.problems else resolve_preset(args)
    except DsvllmError as error:
        problems.append(Problem(str(error), "--ds_preset with one of those names"))
    own_config = None if preset is None else build(preset, _run_shape(args, launch, device))
    if own_config == user_config:
        # Arguments made from others (dataclasses.replace, to_dict) carry the preset's configuration: no rival.
        user_config = None
    fixes: list[Fix] = []
    if preset is not None:
        problems += preset_problems(args, preset, launch, device, user_config)
        fixes += _argument_defaults(args, preset)
    fixes += _precision(args, preset, user_config, device)
    config = own_config
    if user_config is not None:
        config, corrections = traps.correct(user_config)
        fixes += corrections
    problems += trap_problems(args, config, launch, device)
    checkpoint, unusable = find_checkpoint(args.resume_from_checkpoint, Path(args.output_dir or TRAINERS_FOLDER))
    problems += unusable
    if checkpoint is not None and not unusable:
        problems += checkpoint_problems(checkpoint, config, preset, launch)
    if config is not None:
        problems += _accelerator_problems(device)
    if problems:
        raise ConfigError(problems)
    fixes += _saving(args, config)
    if checkpoint is not None and Path(str(args.resume_from_checkpoint)) != checkpoint:
        fixes.append(Fix("resume_from_checkpoint", args.resume_from_checkpoint, checkpoint, "the one meant"))
        args.resume_from_checkpoint = str(checkpoint)
    if config is not None:
        if become_single_process():
            say("started by plain python: running as a one-process group (torchrun or accelerate launch start several)")
        args.deepspeed = config
    if config is not None or launch.world_size > 1:
        fixes += _on_cpu(args, device)
    if preset is not None and preset.sequence_parallel:
        _sequence_parallel(args, launch)
    chosen = (*planned.sentences, *map(str, planned.fixes)) if planned else ()
    for line in (*chosen, *map(str, fixes), *_notices(preset, launch)):
        say(line)


def _on_one_gpu(args: Any) -> None:
    """A process without launcher sees every GPU: nn.DataParallel would multiply the batch, and TRL refuses it late."""
    count = args.n_gpu
    if args.ds_preset is None or count <= 1:
        return
    args._n_gpu = 1
    several = " --ds_preset ddp" if args.ds_preset == "none" else ""
    say(
        f"started without a launcher: training on 1 of {count} GPUs. All of them: torchrun --nproc_per_node {count} "
        f"SCRIPT …{several}"
    )


def _argument_defaults(args: Any, preset: Preset) -> list[Fix]:
    """The preset's argument defaults, for the fields the user left at the class's own default."""
    fixes = []
    for setting in preset.arguments:
        before = getattr(args, setting.key)
        if before != setting.value and left_at_default(args, setting.key):
            setattr(args, setting.key, setting.value)
            fixes.append(Fix(setting.key, before, setting.value, setting.why))
    return fixes


def _precision(args: Any, preset: Preset | None, user_config: dict[str, Any] | None, device: str) -> list[Fix]:
    """bf16 on GPUs and fp32 on CPUs, where a preset or the Trainer's "auto" leaves it open."""
    before = args.bf16
    if preset is None or user_config is not None:
        # The user's own configuration or flags decide; only TRL's default (bf16 everywhere) is corrected on a CPU.
        is_open = user_config is None or get_key(user_config, "bf16.enabled", "auto") == "auto"
        if not (is_open and before is None and device == "cpu"):
            return []
    elif any(setting.key == "bf16" for setting in preset.arguments):
        return []
    if device == "cpu":
        args.bf16 = False
        return [] if before is False else [Fix("bf16", before, False, "CPUs train in float32")]
    if not args.fp16 and not before and left_at_default(args, "bf16"):
        args.bf16 = True
        if before is False:
            return [Fix("bf16", False, True, "presets train in bf16; --fp16 true for cards older than Ampere")]
    return []


def _accelerator_problems(device: str) -> list[Problem]:
    """DeepSpeed takes a GPU that is there, whatever `use_cpu` says, unless DS_ACCELERATOR=cpu is set in time."""
    import torch

    if device != "cpu" or not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    if "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = "cpu"
        return []
    return [Problem("use_cpu, but DeepSpeed was imported before and has chosen the GPU", "export DS_ACCELERATOR=cpu")]


def _on_cpu(args: Any, device: str) -> list[Fix]:
    """Without a GPU the process group exists only with `use_cpu`, and DeepSpeed only without ACCELERATE_USE_CPU."""
    if device != "cpu":
        return []
    fixes = []
    if not args.use_cpu:
        args.use_cpu = True
        fixes.append(Fix("use_cpu", False, True, "there is no GPU: processes find each other through gloo"))
    if args.deepspeed and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        os.environ["ACCELERATE_USE_CPU"] = "false"
        fixes.append(Fix("ACCELERATE_USE_CPU", True, False, "accelerate drops DeepSpeed silently when it is set"))
    return fixes


def _saving(args: Any, config: dict[str, Any] | None) -> list[Fix]:
    """`save_only_model` with `load_best_model_at_end` raises inside the Trainer under DeepSpeed, after loading."""
    if config is not None and args.save_only_model and args.load_best_model_at_end:
        args.save_only_model = False
        why = "DeepSpeed loads the best checkpoint through its engine, which needs the optimizer files"
        return [Fix("save_only_model", True, False, why)]
    return []


def _run_shape(args: Any, launch: Launch, device: str) -> RunShape:
    return RunShape(
        world_size=launch.world_size,
        gpus_per_node=launch.local_world_size,
        device="cuda" if device == "cuda" else "cpu",
        # Without a path there is a problem already; the rest of the configuration is still worth checking.
        nvme_path=Path(args.nvme_path or ".").absolute(),
    )


def _sequence_parallel(args: Any, launch: Launch) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    if args.parallelism_config is None:
        # Every rank holds a slice of every sequence: data parallel size = world size / sequence parallel size = 1.
        args.parallelism_config = ParallelismConfig(
            sp_size=launch.world_size, sp_backend="deepspeed", dp_replicate_size=1
        )
        say(f"parallelism_config: sequence parallel over {launch.world_size} processes (preset long_context)")


def _notices(preset: Preset | None, launch: Launch) -> list[str]:
    """What the user should know about the preset on this launch, and what would help instead."""
    if preset is None:
        return []
    notices = []
    if preset.experimental:
        notices.append(f"preset {preset.name} is experimental: {'; '.join(preset.constraints)}")
    if preset.zero_stage in (1, 2) and launch.world_size == 1 and preset.offload_optimizer == "none":
        helps = "qlora or lora (less to train)" if preset.adapter is None else "qlora (4-bit base)"
        notices.append(
            f"preset {preset.name} on one process shards nothing and saves no memory. What would help: more GPUs, "
            f"{helps}, or zero3_offload (weights and optimizer in host RAM)"
        )
    share = max(1, usable_cpus() // launch.local_world_size)
    if preset.offload_optimizer != "none" and share > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        notices.append(
            "OMP_NUM_THREADS=1, which torchrun and accelerate set by themselves: the optimizer step on the CPU would "
            f"use one core. Start with OMP_NUM_THREADS={share} (accelerate: --num_cpu_threads_per_process {share})"
        )
    return notices


def _empty_instance(cls: type[TrainingArguments]) -> TrainingArguments:
    return with_presets(cls).__new__(with_presets(cls))


def __getattr__(name: str) -> Any:
    """TRL is imported only when its class is asked for."""
    if name == "DsvllmSFTConfig":
        from trl import SFTConfig

        return with_presets(SFTConfig)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


DsvllmTrainingArguments = with_presets(TrainingArguments)
