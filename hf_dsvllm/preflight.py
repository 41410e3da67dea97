"""What is wrong with a run's arguments, found before TrainingArguments derives state from them.

Each function returns problems and changes nothing; `hf_dsvllm.arguments` raises all of them as one `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hf_dsvllm import harness, metrics, traps
from hf_dsvllm.adapters import training_dtype
from hf_dsvllm.ds_config import zero_stage
from hf_dsvllm.engine.spec import find_vllm
from hf_dsvllm.errors import DsvllmError, EngineError, Problem
from hf_dsvllm.fields import asks_for_answers, metric_key, steers
from hf_dsvllm.files import read_json_or_problem
from hf_dsvllm.forwarder import listen
from hf_dsvllm.launch import Launch
from hf_dsvllm.optimizers import ROUNDED, optimizer_of
from hf_dsvllm.placement import choose_place, place_problems, visible_gpus
from hf_dsvllm.presets import Preset
from hf_dsvllm.presets.select import deepspeed_has_onebit
from hf_dsvllm.tasks import EvalTask, load_task
from hf_dsvllm.toolchain import cxx_compiler, links_libaio

__all__ = ["evaluation_problems", "left_at_default", "preset_problems", "read_user_config", "trap_problems"]


# vLLM's own flags → ours, which choose its GPUs too.
PARALLEL = {
    "--tensor-parallel-size": "gen_eval_tensor_parallel",
    "-tp": "gen_eval_tensor_parallel",
    "--data-parallel-size": "gen_eval_data_parallel",
    "-dp": "gen_eval_data_parallel",
}


# TRL's arguments whose trainers hold a frozen model besides the trained one, and those that do so for a KL term alone
# (read in 1.16, every caller of `prepare_deepspeed` whose other model does not depend on what the trainer is given).
TWO_MODELS = frozenset({"DPOConfig", "KTOConfig", "OnlineDPOConfig", "GKDConfig", "GOLDConfig"})
TWO_MODELS_WITH_BETA = frozenset({"GRPOConfig", "RLOOConfig"})


def left_at_default(args: Any, name: str) -> bool:
    """Whether the field still holds its class's own default (a user who typed that same value cannot be told apart)."""
    default = next(field.default for field in dataclasses.fields(args) if field.name == name)
    return bool(_plain(getattr(args, name)) == _plain(default))


def read_user_config(args: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The user's own DeepSpeed dictionary, read here so that its traps are seen; None without one."""
    given = args.deepspeed
    if not given:
        return None, []
    if isinstance(given, dict):
        return given, []
    if isinstance(given, str | os.PathLike):
        config, problem = read_json_or_problem(os.fspath(given))
        return config, [problem] if problem else []
    return None, [Problem(f"deepspeed={given!r} is a {type(given).__name__}", "give a path or a dictionary")]


def preset_problems(
    args: Any,
    preset: Preset,
    launch: Launch,
    device: str,
    user_config: dict[str, Any] | None,
    *,
    more_processes: str = "torchrun --nproc_per_node {} SCRIPT …",
) -> list[Problem]:
    """What the preset needs and this run, machine or installation lacks; `user_config` is a rival to the preset's.

    `more_processes` is how N processes are asked for.
    """
    problems = []
    if user_config is not None and preset.uses_deepspeed:
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
                more_processes.replace("{}", str(preset.min_processes)),
            )
        )
    if preset.needs_onebit and device != "cuda":
        problems.append(Problem(f"preset {preset.name} needs CUDA GPUs and NCCL, none is here", "--ds_preset zero2"))
    if args.fp16 and any(setting.key == "bf16" for setting in preset.arguments):
        problems.append(Problem(f"--fp16 and preset {preset.name}, which exists in bf16 only", "drop --fp16"))
    if preset.name == "zero2_lowmem" and (kind := _second_model(args)):
        problems.append(
            Problem(
                f"preset zero2_lowmem and {kind}: TRL gives DeepSpeed the frozen second model with ZeRO switched off, "
                "without which bf16 master weights do not exist",
                "--ds_preset zero2, or lora_zero2, which needs no second model",
            )
        )
    if preset.name == "zero2_lowmem" and optimizer_of(args) not in ROUNDED:
        problems.append(
            Problem(
                f"preset zero2_lowmem and --optim {optimizer_of(args)}: bf16 rounds small updates away, and only "
                "AdamW's are rounded at random instead",
                "drop --optim, or --ds_preset zero2",
            )
        )
    problems += _package_problems(preset)
    if "cpu" in (preset.offload_optimizer, preset.offload_param) and cxx_compiler() is None:
        problems.append(
            Problem(
                f"preset {preset.name} builds DeepSpeed's CPUAdam and no C++ compiler is on the PATH",
                "apt-get install build-essential",
            )
        )
    if preset.needs_nvme:
        problems += _nvme_problems(args.nvme_path, preset.name)
    return problems


def evaluation_problems(args: Any, launch: Launch, device: str) -> list[Problem]:
    """Broken evaluation files, metrics and numbers, and a missing vLLM."""
    problems, tasks = [], []
    chosen = tuple(args.gen_eval_metrics or ("exact_match",))
    for path in args.gen_eval_file or ():
        try:
            tasks.append(load_task(Path(path), metrics=chosen, limit=args.gen_eval_limit))
        except DsvllmError as error:
            problems.append(Problem(str(error), "correct the file or metric named above"))
    if not asks_for_answers(args):
        if args.gen_eval_metrics or args.gen_eval_steps or args.gen_eval_expose is not None:
            problems.append(Problem("gen_eval options without prompts do nothing", "--gen_eval_file prompts.jsonl"))
        return problems + _unasked_problems(args)
    problems += _number_problems(args)
    problems += _sampling_problems(args, tasks)
    problems += _vllm_args_problems(args.vllm_args)
    if launch.is_main:
        problems += _harness_problems(args, tasks)
        problems += _port_problems(args.gen_eval_expose)
    if len(tasks) == len(args.gen_eval_file or ()):
        problems += _steering_problems(args, tasks)
    visible = visible_gpus() if device == "cuda" else []
    wrong_place = place_problems(args, device, launch, visible)
    problems += wrong_place
    if launch.is_main and not wrong_place:
        place = choose_place(args, device, launch, visible)
        if place.kind == "remote":
            return problems
        kind: Literal["cuda", "cpu"] = place.device
        try:
            find_vllm(Path(args.vllm_python) if args.vllm_python else None, device=kind)
        except DsvllmError as error:
            problems.append(Problem(str(error), "install vLLM as shown, or drop --gen_eval_file"))
    return problems


def trap_problems(args: Any, config: dict[str, Any] | None, launch: Launch, device: str) -> list[Problem]:
    """Every trap of `hf_dsvllm.traps` these arguments fall into with this DeepSpeed configuration."""
    model_kwargs = getattr(args, "model_init_kwargs", None)
    model_kwargs = model_kwargs if isinstance(model_kwargs, dict) else {}
    return traps.find_problems(
        traps.Request(
            config=config,
            world_size=launch.world_size,
            device=device,
            optim=str(_plain(args.optim)),
            optim_is_default=left_at_default(args, "optim"),
            trainer_values=_trainer_values(args, launch),
            auto_find_batch_size=args.auto_find_batch_size,
            torch_compile=args.torch_compile,
            resuming=bool(getattr(args, "resume_from_checkpoint", None)),
            model_already_loaded=zero_stage(config) == 3 and _a_model_is_loaded(),
            device_map=model_kwargs.get("device_map"),
            quant_storage=_quant_storage(model_kwargs.get("quantization_config")),
            training_dtype=training_dtype(args),
            accelerate_environment=dict(os.environ),
            onebit_available=deepspeed_has_onebit(),
        )
    )


def _trainer_values(args: Any, launch: Launch) -> dict[str, tuple[Any, str]]:
    """What the Trainer will hold against the DeepSpeed JSON: key → its own value and that value's name.

    transformers 5.19, integrations/deepspeed.py, trainer_config_process; what it adds once steps are counted is left
    to it.
    """
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    values: dict[str, tuple[Any, str]] = {
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "gradient_clipping": (args.max_grad_norm, "max_grad_norm"),
        "optimizer.params.lr": (args.learning_rate, "learning_rate"),
        "optimizer.params.betas": ([args.adam_beta1, args.adam_beta2], "adam_beta1 and adam_beta2"),
        "optimizer.params.eps": (args.adam_epsilon, "adam_epsilon"),
        "optimizer.params.weight_decay": (args.weight_decay, "weight_decay"),
        "scheduler.params.warmup_max_lr": (args.learning_rate, "learning_rate"),
        "fp16.enabled": (bool(args.fp16 or args.fp16_full_eval), "fp16"),
    }
    if not args.auto_find_batch_size:
        total = micro * accumulation * launch.world_size
        values["train_micro_batch_size_per_gpu"] = (micro, "per_device_train_batch_size")
        values["train_batch_size"] = (total, "micro batch x accumulation x processes")
    # TRL decides an open bf16 itself: on, unless fp16 is.
    bf16 = not args.fp16 if args.bf16 is None else args.bf16
    values["bf16.enabled"] = (bool(bf16 or args.bf16_full_eval), "bf16")
    return values


def _second_model(args: Any) -> str | None:
    """The name of TRL's arguments whose trainer gives DeepSpeed a second model, None for any others."""
    names = {parent.__name__ for parent in type(args).__mro__ if parent.__module__.startswith("trl.")}
    found = names & TWO_MODELS or (names & TWO_MODELS_WITH_BETA if getattr(args, "beta", 0.0) else set())
    return min(found, default=None)


def _package_problems(preset: Preset) -> list[Problem]:
    needed = [("deepspeed", "DeepSpeed")] if preset.uses_deepspeed else []
    needed += [("bitsandbytes", "bitsandbytes")] if preset.adapter == "qlora" else []
    return [
        Problem(f"preset {preset.name} needs {name}, which is not installed", f"pip install {package}")
        for package, name in needed
        if importlib.util.find_spec(package) is None
    ]


def _nvme_problems(path: str | None, preset: str) -> list[Problem]:
    problems = []
    if not path or path.lower() == "none":
        problems.append(Problem(f"preset {preset} needs a folder on an NVMe disk", "--nvme_path FOLDER"))
    elif not Path(path).is_dir():
        problems.append(Problem(f"nvme_path={path} is not a folder", f"mkdir -p {path}"))
    elif not os.access(path, os.W_OK):
        problems.append(Problem(f"nvme_path={path} cannot be written", "choose a folder you own"))
    if not links_libaio():
        problems.append(
            Problem(
                f"preset {preset} builds DeepSpeed's async_io, and a program using libaio does not compile here",
                "apt-get install libaio-dev (elsewhere than in /usr: set CFLAGS and LDFLAGS)",
            )
        )
    return problems


def _number_problems(args: Any) -> list[Problem]:
    wrong = [
        (args.gen_eval_steps is not None and args.gen_eval_steps < 1, "gen_eval_steps", "--gen_eval_steps 50"),
        *(
            ((count := getattr(args, name)) is not None and count < 1, name, f"--{name} 2, or leave it out")
            for name in ("gen_eval_tensor_parallel", "gen_eval_data_parallel")
        ),
        (args.gen_eval_max_new_tokens < 1, "gen_eval_max_new_tokens", "--gen_eval_max_new_tokens 256"),
        (args.gen_eval_samples < 1, "gen_eval_samples", "--gen_eval_samples 8"),
        (args.gen_eval_temperature < 0, "gen_eval_temperature", "--gen_eval_temperature 0 for greedy answers"),
        (args.gen_eval_timeout <= 0, "gen_eval_timeout", "--gen_eval_timeout 900, in seconds"),
    ]
    return [Problem(f"{name}={getattr(args, name)} is out of range", fix) for is_wrong, name, fix in wrong if is_wrong]


def _sampling_problems(args: Any, tasks: Sequence[EvalTask]) -> list[Problem]:
    """Several answers to a prompt, all of them the same."""
    return [
        Problem(
            f"task {task.name} asks for {count} answers to each prompt at temperature 0, which are all the same",
            "--gen_eval_temperature 0.8, or 1 answer",
        )
        for task in tasks
        if (count := task.settings.samples or args.gen_eval_samples) > 1
        and (args.gen_eval_temperature if task.settings.temperature is None else task.settings.temperature) == 0
    ]


def _harness_problems(args: Any, tasks: Sequence[EvalTask]) -> list[Problem]:
    """Tasks of lm-evaluation-harness that are not there, or whose data is not."""
    names = harness.names_of(args.gen_eval_lm_eval)
    ours = {task.name for task in tasks}
    return [
        Problem(f"gen_eval_lm_eval and gen_eval_file both have a task {name}", "give the file another name")
        for name in names
        if name in ours
    ] + (harness.check_tasks(names) if names else [])


def _unasked_problems(args: Any) -> list[Problem]:
    """A score by generation that is to steer, and nothing is asked; Seq2SeqTrainer may log a gen_len of its own."""
    if not steers(args) or getattr(args, "predict_with_generate", False):
        return []
    what = f"metric_for_best_model={args.metric_for_best_model} is a score of generation, and there are no prompts"
    return [Problem(what, "--gen_eval_file prompts.jsonl, or --gen_eval_lm_eval TASK, or another metric")]


def _steering_problems(args: Any, tasks: Sequence[EvalTask]) -> list[Problem]:
    """A metric_for_best_model that no task logs, or of which less is better and the Trainer would take the most.

    Of lm-eval's tasks the metrics are known only once they have run: a name that begins like theirs passes.
    """
    if not steers(args):
        return []
    names = harness.names_of(args.gen_eval_lm_eval)
    of_lm_eval = harness.logged_tasks(names) if names else ()
    ours = {
        metrics.score_key(task.name, name): name
        for task in tasks
        for name in metrics.score_names(task.metrics, task.settings.samples or args.gen_eval_samples)
    }
    wanted, given = metric_key(args), args.metric_for_best_model
    begins = [metrics.score_key(task, "") for task in of_lm_eval or ()]
    rest = next((wanted.removeprefix(begin) for begin in begins if wanted.startswith(begin) and wanted != begin), None)
    name = ours.get(wanted, rest)
    if name is None and of_lm_eval is None:
        return []  # rank 0 has loaded lm-eval's tasks, or has said why they cannot be
    if name is None:
        possible = [*ours, *(f"{begin}METRIC" for begin in begins)]
        near = difflib.get_close_matches(wanted, possible, n=3)
        fix = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(possible)}"
        return [Problem(f"metric_for_best_model={given} is a score that no task of this run has", fix)]
    higher = not given.endswith("loss") if args.greater_is_better is None else args.greater_is_better
    if not (metrics.less_is_better(name) and higher):
        return []
    if wanted in ours and args.greater_is_better:
        return []  # a function of the user's own, who knows
    fix = "--greater_is_better false" + (" (or true, if more of it is better)" if wanted in ours else "")
    return [Problem(f"metric_for_best_model={given} is better the lower it is, and the highest would be kept", fix)]


def _vllm_args_problems(given: str | None) -> list[Problem]:
    """Arguments for vLLM that are no words, or that ask for more GPUs than vLLM is shown."""
    try:
        words = shlex.split(given or "")
    except ValueError as error:
        return [Problem(f"vllm_args={given} cannot be taken apart into words: {error}", "close its quotes")]
    flags = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("-")}
    return [
        Problem(f"vllm_args has {flag}, and vLLM is shown only the GPUs that --{name} gives it", f"--{name} N")
        for flag, name in PARALLEL.items()
        if flag in flags
    ]


def _port_problems(port: int | None) -> list[Problem]:
    """A port for `--gen_eval_expose` that is no port, or taken."""
    if port is None:
        return []
    try:
        listen(port).close()
    except EngineError as error:
        return [Problem(f"gen_eval_expose={port}: {error}", "another port, or 0 for any free one")]
    return []


def _quant_storage(quantization: Any) -> str | None:
    """The storage dtype of a BitsAndBytesConfig or of the dictionary that makes one; None where nothing is 4-bit."""
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if not quantization.get("load_in_4bit"):
        return None
    return str(quantization.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")


def _a_model_is_loaded() -> bool:
    """Whether a transformers model is alive in this process and not sharded by ZeRO-3."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return False
    if not any(map(_is_whole, models_alive(modeling.PreTrainedModel))):
        return False
    gc.collect()  # a model the user has let go of may still hang in a reference cycle
    return any(map(_is_whole, models_alive(modeling.PreTrainedModel)))


def models_alive(cls: type) -> list[Any]:
    """Every object of `cls` that Python's collector knows."""
    # By type(), not isinstance(): that asks every object for its __class__, which a dead weak proxy answers by raising.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), cls)]


def _is_whole(model: Any) -> bool:
    return any(not hasattr(p, "ds_id") and not p.is_meta for p in list(model.parameters())[:1])


def _plain(value: Any) -> Any:
    """The value of an enum member, anything else as it is."""
    return getattr(value, "value", value)
