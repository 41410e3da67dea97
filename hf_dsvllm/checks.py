"""What can be told about a run before minutes are spent: model there, template there, memory and disk enough."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm import memory
from hf_dsvllm.console import is_main_process
from hf_dsvllm.disk import disk_problems
from hf_dsvllm.ds_config import get_key, zero_stage
from hf_dsvllm.ending import export_places
from hf_dsvllm.errors import ConfigError, DsvllmError, EvalFileError, Problem
from hf_dsvllm.export.manifest import REPORT, occupied
from hf_dsvllm.fields import asks_for_answers, trusts_remote_code
from hf_dsvllm.files import behind_links
from hf_dsvllm.hardware import detect
from hf_dsvllm.launch import read_launch
from hf_dsvllm.model_shape import ModelShape, download_config, load_shape
from hf_dsvllm.optimizers import STATE_BYTES, optimizer_of
from hf_dsvllm.presets import Preset
from hf_dsvllm.tasks import EvalTask, render_prompt
from hf_dsvllm.tensors.weights import has_safetensors

__all__ = ["check_before_loading", "expert_problems", "load_tokenizer", "predict_memory", "trained_problems"]

ANOTHER_EXPORT = "--export_to another folder, or none"


def check_before_loading(
    args: Any, model_args: Any, preset: Preset | None, device: str, tasks: Sequence[EvalTask], *, trained: bool = True
) -> list[Problem]:
    """Problems of this model on this machine with these tasks, as far as can be told without loading weights.

    `trained`: this is known to be the model that is trained, with these adapters, so `trained_problems` are among them.
    """
    missing = _model_problems(args, model_args)
    if missing:
        return missing
    problems = _template_problems(args, model_args, tasks)
    problems += _output_problems(Path(args.output_dir))
    problems += _export_problems(args)
    return problems + trained_problems(args, model_args, preset, device) if trained else problems


def trained_problems(args: Any, model_args: Any, preset: Preset | None, device: str) -> list[Problem]:
    """What training this model in this way lacks in memory and disk, and why its export could not merge adapters."""
    problems = _merge_problems(model_args) if model_args.use_peft and args.export_to != "none" else []
    shape = _shape(model_args)
    if shape is not None:
        problems += _memory_problems(args, model_args, preset, device, shape)
        if is_main_process():  # whose disk takes snapshots and exports; other nodes may have a small one
            problems += disk_problems(args, model_args, device, shape)
    return problems


def _shape(model_args: Any) -> ModelShape | None:
    """None for an architecture the formulas do not know, of which nothing can be said cheaply."""
    try:
        return load_shape(model_args.model_name_or_path, revision=model_args.model_revision)
    except DsvllmError:
        return None


def load_tokenizer(args: Any, model_args: Any) -> Any:
    """The tokenizer training will use, `--chat_template_path` applied.  Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    name = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=model_args.model_revision,
            trust_remote_code=trusts_remote_code(args, model_args),
        )
    except Exception as error:  # tokenizers raises Exception itself for a file it cannot read
        what = f"the tokenizer of {name} cannot be loaded: {_first_line(error)}"
        fix = "copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder"
        raise ConfigError([Problem(what, fix)]) from error
    template = getattr(args, "chat_template_path", None)
    if template and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif template:
        try:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(template).chat_template
        except Exception as error:
            what = f"chat_template_path={template} is no file, nor a model with a tokenizer: {_first_line(error)}"
            raise ConfigError([Problem(what, "--chat_template_path FILE.jinja, or a model's folder")]) from error
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _model_problems(args: Any, model_args: Any) -> list[Problem]:
    name = model_args.model_name_or_path
    if not name:
        return [Problem("no model is named", "--model_name_or_path FOLDER or hub id")]
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            return [Problem(f"{name} has no config.json", "give a folder written by save_pretrained")]
        return []
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        near = _nearest(path)
        return [Problem(f"model folder {name} does not exist", f"did you mean {near}?" if near else "check the path")]
    try:
        from transformers import AutoConfig

        AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=trusts_remote_code(args, model_args)
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        return [Problem(f"model {name!r} is neither a folder nor to be had from the hub: {first}",
                        "check the name, log in with `hf auth login` for gated models, or give a folder")]  # fmt: skip
    return []


def _nearest(path: Path) -> str | None:
    beside = [item.name for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
    return str(path.parent / near[0]) if near else None


def _template_problems(args: Any, model_args: Any, tasks: Sequence[EvalTask]) -> list[Problem]:
    """A tokenizer or chat template that is missing, or a template that refuses the first prompt of a task."""
    if not (tasks or args.gen_eval_lm_eval or getattr(args, "chat_template_path", None)):
        return []
    try:
        tokenizer = load_tokenizer(args, model_args)
    except ConfigError as error:
        return list(error.problems)
    problems = []
    for task in tasks:
        try:
            render_prompt(task.samples[0], tokenizer)
        except EvalFileError as error:
            problems.append(Problem(f"task {task.name}: {error}", "--chat_template_path FILE.jinja"))
    return problems


def _output_problems(folder: Path) -> list[Problem]:
    try:
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    except OSError as error:  # in a folder that may not be entered: Path.exists raises up to Python 3.11
        return [Problem(f"output_dir {folder} cannot be used: {error}", "--output_dir a folder you own")]
    if not existing.is_dir():
        return [Problem(f"output_dir {folder}: {existing} is a file", "--output_dir NEW_FOLDER")]
    if not os.access(existing, os.W_OK):
        return [Problem(f"output_dir {folder} cannot be written", "--output_dir a folder you own")]
    return []


def _export_problems(args: Any) -> list[Problem]:
    """What would make the export fail when training is over."""
    if args.export_to == "none":
        return []
    problems: list[Problem] = []
    if is_main_process():  # who alone writes it
        try:
            problems += _destination_problems(args)
        except OSError as error:  # unreadable, or links in a circle
            problems.append(Problem(f"export_to {args.export_to} cannot be used: {error}", ANOTHER_EXPORT))
    return problems


def _destination_problems(args: Any) -> list[Problem]:
    """Of the folder of the last weights, else of that for the best, if scores may tell them apart."""
    last, best = export_places(Path(args.output_dir), args.export_to)
    problems = _place_problems(args, last, f"{last}")
    if problems or not asks_for_answers(args):
        return problems
    return _place_problems(args, best, f"{last}: {best}, for the best weights,")


def _place_problems(args: Any, out: Path, named: str) -> list[Problem]:
    run_dir = Path(args.output_dir)
    target, run = behind_links(out), run_dir.resolve()
    if target == run or target in run.parents:
        what = f"export_to {named} is the run's own folder {run_dir}, or holds it"
        return [Problem(what, f"--export_to {run_dir / 'export'}, or another folder of its own")]
    if target.is_mount():
        return [Problem(f"export_to {named} is the root of a disk, which cannot be renamed to", "a folder in it")]
    # The usual folder is set aside where a run starts afresh.
    set_aside = not args.export_to and target.is_dir() and not args.resume_from_checkpoint
    if occupied(target) and not set_aside and not (target / REPORT).is_file():
        return [Problem(f"export_to {named} exists and is no export of hf-dsvllm", f"{ANOTHER_EXPORT}, or remove it")]
    existing = next(parent for parent in target.parents if parent.exists())
    if target.parent == run or (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        return []  # in the run's folder: looked at with that
    why = "cannot be written" if existing.is_dir() else "is a file"
    return [Problem(f"export_to {named}: {existing} {why}", ANOTHER_EXPORT)]


def _merge_problems(model_args: Any) -> list[Problem]:
    """A base that adapters cannot be merged into."""
    name = model_args.model_name_or_path
    folder = Path(name).expanduser()
    problems = []
    try:
        file = folder / "config.json" if folder.is_dir() else download_config(name, model_args.model_revision, 10.0)
        quantised = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (DsvllmError, ValueError):
        quantised = None  # whoever loads the model says it better
    if quantised:
        what = f"{name} is stored quantised ({quantised.get('quant_method')}): the export cannot merge adapters into it"
        fix = "the 16-bit model it was made from (a qlora preset makes 4 bit of it), or --export_to none"
        problems.append(Problem(what, fix))
    if folder.is_dir() and not has_safetensors(folder):
        what = f"{name} has no model.safetensors: the export cannot merge adapters into other files"
        problems.append(Problem(what, "load the model and save_pretrained() it once, or --export_to none"))
    return problems


def expert_problems(model: Any, config: dict[str, Any] | None, world_size: int) -> list[Problem]:
    """Experts of the live `model` that are modules of their own, under ZeRO-3 in several processes.

    A rank gathers an expert's weights when a token of its own reaches it.  In transformers 5.19 the experts of a layer
    are one module, always called whole, but for NLLB-MoE and Switch Transformers; models with code of their own differ.
    """
    if zero_stage(config) != 3 or world_size == 1 or get_key(config or {}, "zero_optimization.leaf_module"):
        return []
    apart = [name for name, module in model.named_modules() if _are_experts(name, module)]
    if not apart:
        return []
    return [
        Problem(
            f"the experts of {apart[0]} ({len(apart)} layers) are modules of their own: under ZeRO-3 ranks that choose "
            "different experts wait for each other for ever (DeepSpeed #7461)",
            'ZeRO-2, or --deepspeed with zero_optimization.leaf_module={"classes": [the expert block\'s class]}',
        )
    ]


def _are_experts(name: str, module: Any) -> bool:
    """Whether this is a list of experts, each with weights of its own."""
    lists = {"ModuleList", "ModuleDict"} & {kind.__name__ for kind in type(module).__mro__}
    if not lists or not name.rpartition(".")[2].endswith("experts"):
        return False
    return sum(any(True for _ in child.parameters()) for child in module.children()) > 1


def _memory_problems(
    args: Any, model_args: Any, preset: Preset | None, device: str, shape: ModelShape
) -> list[Problem]:
    """A lower bound of what the run needs against what the machine has; silent unless it surely cannot fit."""
    estimate = predict_memory(args, model_args, preset, device, shape)
    return [] if estimate is None else memory.fits(estimate, detect())


def predict_memory(
    args: Any, model_args: Any, preset: Preset | None, device: str, shape: ModelShape
) -> memory.TrainingMemory | None:
    """The least a run needs by the formulas of `memory`, None without a preset."""
    if preset is None:
        return None
    config = args.deepspeed if isinstance(args.deepspeed, dict) else {}
    return memory.estimate(
        shape,
        zero_stage=preset.zero_stage,
        offload_optimizer=preset.offload_optimizer,
        offload_param=preset.offload_param,
        adapter=_adapter(model_args),
        lora_r=model_args.lora_r,
        world_size=read_launch().world_size,
        micro_batch_size=args.per_device_train_batch_size,
        seq_len=getattr(args, "max_length", None) or 512,
        gradient_checkpointing=args.gradient_checkpointing,
        device="cuda" if device == "cuda" else "cpu",
        weight_dtype="float32" if model_args.dtype == "float32" else "bfloat16",
        fp32_accumulation=get_key(config, "data_types.grad_accum_dtype") == "fp32",
        # One that is not known may keep less than Adam: count nothing then, so that the bound stays a bound.
        optimizer_state_bytes=STATE_BYTES.get(optimizer_of(args), 0.0),
    )


def _adapter(model_args: Any) -> str | None:
    if not model_args.use_peft:
        return None
    return "qlora" if model_args.load_in_4bit else "lora"
