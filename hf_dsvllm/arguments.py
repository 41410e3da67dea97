"""`--ds_preset` and its companions as arguments of any TrainingArguments class.

    DsvllmDPOConfig = with_presets(DPOConfig)

gives a dataclass that HfArgumentParser and TRL's parser read like the original, plus the fields of `PresetFields`.
When such arguments are created, the preset becomes a DeepSpeed configuration, every known trap is checked, all problems
are raised as one `ConfigError`, and every value changed is printed with its reason.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments

from hf_dsvllm import traps
from hf_dsvllm.adapters import full_dtype
from hf_dsvllm.console import say
from hf_dsvllm.ds_config import RunShape, build, zero_stage
from hf_dsvllm.errors import ConfigError, DsvllmError, Problem
from hf_dsvllm.fields import PresetFields
from hf_dsvllm.files import read_json_or_problem
from hf_dsvllm.launch import Launch, become_single_process, read_launch
from hf_dsvllm.presets import Preset, get_preset
from hf_dsvllm.tasks import load_task
from hf_dsvllm.traps import Fix

__all__ = [
    "DsvllmSFTConfig",  # noqa: F822 - from __getattr__: TRL is imported only when asked for
    "DsvllmTrainingArguments",
    "full_dtype",
    "resolve_preset",
    "training_device",
    "with_presets",
]

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
        def __post_init__(self) -> None:
            _before(self)
            cls.__post_init__(self)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _empty_instance, (cls,), self.__dict__

    WithPresets.__name__ = WithPresets.__qualname__ = f"Dsvllm{cls.__name__}"
    WithPresets.__module__ = __name__
    WithPresets.__doc__ = cls.__doc__
    _generated[cls] = WithPresets
    return WithPresets


def resolve_preset(args: Any) -> Preset | None:
    """The preset of these arguments, None without one."""
    return get_preset(args.ds_preset) if getattr(args, "ds_preset", None) else None


def training_device(args: Any) -> str:
    """ "cuda" or "cpu", as the run will use it."""
    import torch

    return "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"


def _before(args: Any) -> None:
    """Everything that must be settled before TrainingArguments derives state from its fields."""
    launch = read_launch()
    device = training_device(args)
    problems = list(launch.problems()) + _evaluation_problems(args)
    try:
        preset = resolve_preset(args)
    except DsvllmError as error:
        raise ConfigError([*problems, Problem(str(error), "--ds_preset with one of those names")]) from None
    fixes: list[Fix] = []
    user_config = _user_config(args, problems)
    if preset is not None:
        problems += _preset_problems(args, preset, launch, device, has_config=user_config is not None)
        fixes += _argument_defaults(args, preset)
    fixes += _precision(args, preset, device)
    config = user_config
    if user_config is not None:
        config, corrections = traps.correct(user_config)
        fixes += corrections
    elif preset is not None and not problems:
        config = build(preset, _run_shape(args, launch, device))
    problems += traps.find_problems(_request(args, config, launch, device))
    if problems:
        raise ConfigError(problems)
    fixes += _saving(args, config)
    if config is not None:
        if become_single_process():
            say("started by plain python: running as a one-process group (torchrun or accelerate launch start several)")
        fixes += _on_cpu(args, device)
        args.deepspeed = config
    if preset is not None and preset.sequence_parallel:
        _sequence_parallel(args, launch)
    for fix in fixes:
        say(str(fix))
    if preset is not None and preset.zero_stage in (1, 2) and launch.world_size == 1:
        say(_nothing_sharded(preset))


def _preset_problems(args: Any, preset: Preset, launch: Launch, device: str, *, has_config: bool) -> list[Problem]:
    problems = []
    if has_config and preset.uses_deepspeed:
        problems.append(
            Problem(
                f"--deepspeed and --ds_preset {preset.name} both bring a DeepSpeed configuration",
                "drop one: `hf-dsvllm presets show NAME` prints a preset's JSON, to edit and pass as --deepspeed",
            )
        )
    if preset.name == "none" and launch.world_size > 1:
        problems.append(
            Problem(f"preset none is for one process and {launch.world_size} were started", "--ds_preset ddp or zero2")
        )
    if launch.world_size < preset.min_processes:
        problems.append(
            Problem(
                f"preset {preset.name} needs {preset.min_processes} processes or more, {launch.world_size} was started",
                f"torchrun --nproc_per_node {preset.min_processes} SCRIPT …",
            )
        )
    if preset.needs_onebit and device != "cuda":
        problems.append(Problem(f"preset {preset.name} needs CUDA GPUs and NCCL, none is here", "--ds_preset zero2"))
    if preset.experimental:
        say(f"preset {preset.name} is experimental: {'; '.join(preset.constraints)}")
    if preset.uses_deepspeed and importlib.util.find_spec("deepspeed") is None:
        problems.append(
            Problem(f"preset {preset.name} needs DeepSpeed, which is not installed", "pip install deepspeed")
        )
    if preset.adapter == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(Problem(f"preset {preset.name} needs bitsandbytes, not installed", "pip install bitsandbytes"))
    if getattr(args, "fsdp", None) and preset.uses_deepspeed:
        problems.append(Problem(f"--fsdp and preset {preset.name} both shard the model", "drop --fsdp"))
    if preset.needs_nvme:
        problems += _nvme_problems(args.nvme_path, preset.name)
    return problems


def _nvme_problems(path: str | None, preset: str) -> list[Problem]:
    if not path or path.lower() == "none":
        return [Problem(f"preset {preset} needs a folder on an NVMe disk", "--nvme_path FOLDER")]
    folder = Path(path)
    if not folder.is_dir():
        return [Problem(f"nvme_path={path} is not a folder", f"mkdir -p {path}")]
    if not os.access(folder, os.W_OK):
        return [Problem(f"nvme_path={path} cannot be written", "choose a folder you own")]
    if not os.path.exists("/usr/include/libaio.h") and not os.environ.get("CPATH"):
        return [
            Problem(
                f"preset {preset} needs libaio's header to build DeepSpeed's async_io", "apt-get install libaio-dev"
            )
        ]
    return []


def _evaluation_problems(args: Any) -> list[Problem]:
    """Broken evaluation files and metrics, and a missing vLLM, before anything is loaded."""
    problems = []
    for path in args.gen_eval_file or ():
        try:
            load_task(Path(path), metrics=tuple(args.gen_eval_metrics or ("exact_match",)), limit=args.gen_eval_limit)
        except DsvllmError as error:
            problems.append(Problem(str(error), "correct the file or metric named above"))
    if args.gen_eval_file and args.gen_eval_steps is not None and args.gen_eval_steps < 1:
        problems.append(
            Problem(f"gen_eval_steps={args.gen_eval_steps} is not a number of steps", "--gen_eval_steps 50")
        )
    if not args.gen_eval_file and (args.gen_eval_metrics or args.gen_eval_steps):
        problems.append(Problem("gen_eval options without prompts do nothing", "--gen_eval_file prompts.jsonl"))
    if args.gen_eval_file and read_launch().is_main:
        from hf_dsvllm.engine.server import find_vllm

        try:
            find_vllm(Path(args.vllm_python) if args.vllm_python else None)
        except DsvllmError as error:
            problems.append(Problem(str(error), "install vLLM as shown, or drop --gen_eval_file"))
    return problems


def _user_config(args: Any, problems: list[Problem]) -> dict[str, Any] | None:
    """The user's own DeepSpeed dictionary, read here so that its traps are seen; None without one."""
    given = args.deepspeed
    if not given:
        return None
    if isinstance(given, dict):
        return given
    if isinstance(given, str):
        config, problem = read_json_or_problem(given)
        if problem is not None:
            problems.append(problem)
        return config
    return None


def _argument_defaults(args: Any, preset: Preset) -> list[Fix]:
    """The preset's argument defaults, for the fields the user left at the class's own default."""
    fixes = []
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for setting in preset.arguments:
        before = getattr(args, setting.key)
        if before == defaults.get(setting.key) and before != setting.value:
            setattr(args, setting.key, setting.value)
            fixes.append(Fix(setting.key, before, setting.value, setting.why))
    return fixes


def _precision(args: Any, preset: Preset | None, device: str) -> list[Fix]:
    if preset is None and not args.deepspeed:
        return []
    before = args.bf16
    if device == "cpu":
        args.bf16 = False
        if before:
            return [Fix("bf16", True, False, "CPUs train in float32")]
    elif not args.fp16 and not before:
        args.bf16 = True
        if before is False:
            return [Fix("bf16", False, True, "presets train in bf16; --fp16 true for cards older than Ampere")]
    return []


def _on_cpu(args: Any, device: str) -> list[Fix]:
    """Without a GPU the process group exists only with `use_cpu`, and DeepSpeed only without ACCELERATE_USE_CPU."""
    if device != "cpu":
        return []
    fixes = []
    if not args.use_cpu:
        args.use_cpu = True
        fixes.append(Fix("use_cpu", False, True, "there is no GPU: processes find each other through gloo"))
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
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


def _request(args: Any, config: dict[str, Any] | None, launch: Launch, device: str) -> traps.Request:
    from hf_dsvllm.presets.select import deepspeed_has_onebit

    optim = str(getattr(args.optim, "value", args.optim))
    default = next(field.default for field in dataclasses.fields(args) if field.name == "optim")
    model_kwargs = getattr(args, "model_init_kwargs", None)
    return traps.Request(
        config=config,
        world_size=launch.world_size,
        device=device,
        optim=optim,
        optim_is_default=optim == str(getattr(default, "value", default)),
        max_grad_norm=args.max_grad_norm,
        micro_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        auto_find_batch_size=args.auto_find_batch_size,
        torch_compile=args.torch_compile,
        model_already_loaded=zero_stage(config) == 3 and _a_model_is_loaded(),
        device_map=model_kwargs.get("device_map") if isinstance(model_kwargs, dict) else None,
        accelerate_environment=dict(os.environ),
        onebit_available=deepspeed_has_onebit(),
    )


def _a_model_is_loaded() -> bool:
    """Whether a transformers model is alive in this process and not sharded by ZeRO-3."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return False
    models = [thing for thing in gc.get_objects() if isinstance(thing, modeling.PreTrainedModel)]
    return any(not hasattr(p, "ds_id") and not p.is_meta for model in models for p in list(model.parameters())[:1])


def _run_shape(args: Any, launch: Launch, device: str) -> RunShape:
    return RunShape(
        world_size=launch.world_size,
        gpus_per_node=launch.local_world_size,
        device="cuda" if device == "cuda" else "cpu",
        nvme_path=Path(args.nvme_path).absolute() if args.nvme_path else None,
    )


def _sequence_parallel(args: Any, launch: Launch) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    if args.parallelism_config is None:
        # Every rank holds a slice of every sequence: data parallel size = world size / sequence parallel size = 1.
        args.parallelism_config = ParallelismConfig(
            sp_size=launch.world_size, sp_backend="deepspeed", dp_replicate_size=1
        )
        say(f"parallelism_config: sequence parallel over {launch.world_size} processes (preset long_context)")


def _nothing_sharded(preset: Preset) -> str:
    helps = "qlora or lora (less to train)" if preset.adapter is None else "qlora (4-bit base)"
    return (
        f"preset {preset.name} on one process shards nothing and saves no memory. What would help: more GPUs, "
        f"{helps}, or zero3_offload (weights and optimizer in host RAM)"
    )


def _empty_instance(cls: type[TrainingArguments]) -> TrainingArguments:
    return with_presets(cls).__new__(with_presets(cls))


def __getattr__(name: str) -> Any:
    """TRL is imported only when its class is asked for."""
    if name == "DsvllmSFTConfig":
        from trl import SFTConfig

        return with_presets(SFTConfig)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


DsvllmTrainingArguments = with_presets(TrainingArguments)
