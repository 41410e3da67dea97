"""`--dry_run`: what would be started, as a shell script: comments, the JSON, and the same command without us."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.adapters import ALL_LINEAR, trl_flags
from hf_dsvllm.auto import is_auto
from hf_dsvllm.ds_config import explain
from hf_dsvllm.fields import added_fields
from hf_dsvllm.presets import Preset
from hf_dsvllm.run.command import Command, says_yes, split
from hf_dsvllm.run.parent import Plan
from hf_dsvllm.run.script_files import args_file
from hf_dsvllm.run.state import TASK_TYPES

__all__ = ["as_text"]

# TRL's defaults (kept so by a test), which adapters in scripts without flags for them have.
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": ALL_LINEAR}


def as_text(plan: Plan) -> str:
    """The resolved command, environment, DeepSpeed JSON and changed defaults, then the version without this package."""
    lines = [f"# hf-dsvllm run, not started. Script: {plan.command.target.name}"]
    lines += [f"# {reason}" for reason in plan.reasons]
    lines += ["", "# what would be started"]
    lines.append(_shell(plan.words, plan.environment, comment=True))
    if plan.preset is not None:
        lines += ["", *_explained(plan.preset, plan.ds_config, plan.device)]
    elif is_auto(plan.command.value("ds_preset")):
        lines += [
            "",
            "# preset auto: the ranks let the planner choose (`hf-dsvllm plan` shows it); not in what follows",
        ]
    lines += ["", "# the same without this package" + _left_out(plan)]
    lines += _without_us(plan)
    return "\n".join(lines)


def _shell(words: tuple[str, ...] | list[str], environment: object, *, comment: bool = False) -> str:
    named = [f"{name}={shlex.quote(value)}" for name, value in dict(environment or {}).items()]  # type: ignore[call-overload]
    text = " ".join([*named, shlex.join(words)])
    return f"#   {text}" if comment else text


def _explained(preset: Preset, config: dict[str, Any] | None, device: str) -> list[str]:
    lines = [f"# preset {preset.name}: {preset.summary}"]
    lines += [f"#   {key} = {json.dumps(value)}: {why}" for key, value, why in explain(preset, config)]
    precision = "--bf16 false: CPUs train in float32" if device == "cpu" else "--bf16 true: unless --fp16 is set"
    lines.append(f"# defaults of the arguments it changes, where the script leaves them alone\n#   {precision}")
    lines += [f"#   --{setting.key} {setting.value}: {setting.why}" for setting in preset.arguments]
    return lines


def _left_out(plan: Plan) -> str:
    asked = [name for name in plan.command.given if name.startswith("gen_eval")]
    return f", which leaves out: {', '.join(asked)}" if asked else ""


def _without_us(plan: Plan) -> list[str]:
    preset, command = plan.preset, plan.command
    source = command.target.source
    parses = "HfArgumentParser" in source or "TrlParser" in source or command.target.file is None
    knows_peft = "ModelConfig" in source
    lines, changed, environment = [], {}, dict(plan.environment)
    if plan.ds_config is not None and preset is not None:
        file = f"ds_{preset.name.replace('+', '_')}.json"
        lines += _file(file, json.dumps(plan.ds_config, indent=2))
        if parses:
            changed["deepspeed"] = file
        else:
            lines.append("# the script makes its TrainingArguments itself: accelerate hands the file to them")
            environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}
    if preset is not None:
        changed |= _changed(preset, plan.device, command)
    if changed and not parses:
        values = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        lines.append(f"# and in its TrainingArguments, where it leaves them alone: {values}")
    more, script_args = _script_args(command, changed if parses else {})
    lines += more
    words = [*plan.launcher, *(["-m"] if command.target.path is None else []), command.target.name, *script_args]
    if knows_peft:
        words += _adapter_flags(plan, "RewardConfig" in source)
    elif preset is not None and preset.adapter:
        lines += _adapter_code(preset, plan.device, command, source)
    return [*lines, _shell(words, environment)]


def _file(name: str, text: str) -> list[str]:
    return [f"cat > {shlex.quote(name)} <<'HF_DSVLLM_END'", text, "HF_DSVLLM_END"]


def _script_args(command: Command, changed: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Lines before the command, and the script's arguments with what is changed and without what is ours.

    Its YAML or JSON is copied without our keys; one that is its only argument must stay so, and takes the changes.  The
    .args file is found by the script's name: what has to go from it is said.
    """
    config, args, lines = command.config, list(command.script_args), []
    alone = config is not None and args == [config.typed]
    if config is not None and (alone or set(config.values) & set(added_fields())):
        old = Path(config.typed)
        new = f"{old.stem}_without_hf_dsvllm{old.suffix}"
        text = config.text_without(added_fields(), changed if alone else {})
        lines += [f"# {old} without the arguments of this package", *_file(new, text)]
        args = [word.removesuffix(config.typed) + new if word.endswith(config.typed) else word for word in args]
    name, words = args_file(command.target.file)
    rest, ours, _ = split(words)
    if ours:
        lines.append(f"# FIRST take {', '.join(f'--{key}' for key in ours)} out of {name}, which then reads:")
        lines.append(f"#   {shlex.join(rest)}")
    flags = [word for name, value in changed.items() for word in (f"--{name}", _typed(value))]
    return lines, args if alone else [*args, *flags]


def _changed(preset: Preset, device: str, command: Command) -> dict[str, Any]:
    """The arguments that a run changes: nothing that its user has typed, but for what a CPU needs."""
    changed = {setting.key: setting.value for setting in preset.arguments if setting.key not in command.own}
    decided = any(setting.key == "bf16" for setting in preset.arguments)
    if device == "cpu":
        changed = ({} if decided else {"bf16": False}) | {"use_cpu": True} | changed
    elif not decided and "bf16" not in command.own and not says_yes(command.own.get("fp16")):
        changed = {"bf16": True} | changed
    return {name: value for name, value in changed.items() if command.own.get(name, "").lower() != _typed(value)}


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _half(command: Command) -> str:
    """The 16-bit dtype the command trains in."""
    return "float16" if says_yes(command.own.get("fp16")) else "bfloat16"


def _adapter_flags(plan: Plan, rewards: bool) -> list[str]:
    """TRL's own flags for the preset's adapter, but for those the script has been given, and the command's options."""
    flags: dict[str, list[str]] = {}
    for word in trl_flags(plan.preset, plan.device, _half(plan.command)) if plan.preset is not None else ():
        if word.startswith("--"):
            values = flags.setdefault(word, [])
        else:
            values.append(word)
    if rewards and flags:
        flags["--lora_task_type"] = ["SEQ_CLS"]  # as `for_arguments` settles a reward model
    flags = {flag: values for flag, values in flags.items() if flag[2:] not in plan.command.own}
    for name, value in plan.command.adapter.chosen().items():
        flags[f"--{name}"] = [str(v) for v in (value if isinstance(value, list) else [value])]
    return [word for flag, values in flags.items() for word in (flag, *values)]


def _adapter_code(preset: Preset, device: str, command: Command, source: str) -> list[str]:
    """What has to be added to a script that knows no adapters; its kind of model is guessed from its text."""
    dtype = "float32" if device == "cpu" else _half(command)
    lines = ["# and in the script, which knows no adapters:"]
    if preset.adapter == "qlora":
        storage = dtype if preset.zero_stage == 3 else "uint8"
        loaded = [*re.findall(r"\bAutoModelFor\w+", source), "AutoModelForCausalLM"][0]
        lines += [
            "#   quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4',",
            f"#       bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype='{dtype}',",
            f"#       bnb_4bit_quant_storage='{storage}')",
            f"#   model = {loaded}.from_pretrained(..., quantization_config=quantization_config)",
        ]
    values: dict[str, Any] = LORA | command.adapter.chosen()
    rank, alpha, dropout, targets = (values[name] for name in LORA)
    return [
        *lines,
        f"#   lora = LoraConfig(r={rank}, lora_alpha={alpha}, lora_dropout={dropout}, target_modules={targets!r},",
        f"#       task_type='{_task_type(source)}')",
        "#   model = get_peft_model(model, lora)  # before the Trainer",
    ]


def _task_type(source: str) -> str:
    if "ForSeq2SeqLM" in source or "ForConditionalGeneration" in source:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in TASK_TYPES.items() if end in source), "CAUSAL_LM")
