"""`--dry_run`: what would be started, as a shell script: comments, the JSON, and the same command without us."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from hf_dsvllm.adapters import ALL_LINEAR, trl_flags
from hf_dsvllm.auto import is_auto
from hf_dsvllm.presets import Preset
from hf_dsvllm.run.command import Command
from hf_dsvllm.run.parent import Plan
from hf_dsvllm.run.state import TASK_TYPES

__all__ = ["as_text"]

# TRL's defaults (kept so by a test), which adapters in scripts without flags for them have.
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": ALL_LINEAR}


def as_text(plan: Plan) -> str:
    """The resolved command, environment, DeepSpeed JSON and changed defaults, then the version without this package."""
    lines = [f"# hf-dsvllm run, not started. Script: {plan.command.target}"]
    lines += [f"# {reason}" for reason in plan.reasons]
    lines += ["", "# what would be started"]
    lines.append(_shell(plan.words, plan.environment, comment=True))
    if plan.preset is not None:
        lines += ["", *_explained(plan.preset, plan.device)]
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


def _explained(preset: Preset, device: str) -> list[str]:
    lines = [f"# preset {preset.name}: {preset.summary}"]
    lines += [f"#   {setting.key} = {setting.value}: {setting.why}" for setting in preset.deepspeed]
    precision = "--bf16 false: CPUs train in float32" if device == "cpu" else "--bf16 true: unless --fp16 is set"
    lines.append(f"# defaults of the arguments it changes, where the script leaves them alone\n#   {precision}")
    lines += [f"#   --{setting.key} {setting.value}: {setting.why}" for setting in preset.arguments]
    return lines


def _left_out(plan: Plan) -> str:
    asked = [name for name in plan.command.given if name.startswith("gen_eval")]
    return f", which leaves out: {', '.join(asked)}" if asked else ""


def _without_us(plan: Plan) -> list[str]:
    preset, command = plan.preset, plan.command
    source = command.path.read_text(encoding="utf-8", errors="replace") if command.path is not None else ""
    parses = "HfArgumentParser" in source or "TrlParser" in source or command.path is None
    knows_peft = "ModelConfig" in source
    target = ["-m", command.target] if command.path is None else [command.target]
    words = [*plan.launcher, *target, *command.script_args]
    environment = dict(plan.environment)
    lines = []
    if plan.ds_config is not None and preset is not None:
        file = f"ds_{preset.name.replace('+', '_')}.json"
        lines += [f"cat > {file} <<'JSON'", json.dumps(plan.ds_config, indent=2), "JSON"]
        if parses:
            words += ["--deepspeed", file]
        else:
            lines.append("# the script makes its TrainingArguments itself: accelerate hands the file to them")
            environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}
    if preset is not None and parses:
        words += ["--bf16", "false" if plan.device == "cpu" else "true"]
        words += ["--use_cpu", "true"] if plan.device == "cpu" else []
        words += [word for setting in preset.arguments for word in (f"--{setting.key}", str(setting.value))]
    elif preset is not None and preset.arguments:
        values = ", ".join(f"{setting.key}={setting.value!r}" for setting in preset.arguments)
        lines.append(f"# and in its TrainingArguments: {values}")
    if knows_peft:
        words += _adapter_flags(plan, "RewardConfig" in source)
    elif preset is not None and preset.adapter:
        lines += _adapter_code(preset, plan.device, command, source)
    return [*lines, _shell(words, environment)]


def _adapter_flags(plan: Plan, rewards: bool) -> list[str]:
    """TRL's own flags for the preset's adapter, but for those the script has been given, and the command's options."""
    typed = {word.partition("=")[0].replace("-", "_") for word in plan.command.script_args}
    flags: dict[str, list[str]] = {}
    for word in trl_flags(plan.preset, plan.device) if plan.preset is not None else ():
        if word.startswith("--"):
            values = flags.setdefault(word, [])
        else:
            values.append(word)
    if rewards and flags:
        flags["--lora_task_type"] = ["SEQ_CLS"]  # as `for_arguments` settles a reward model
    flags = {flag: values for flag, values in flags.items() if flag.replace("-", "_") not in typed}
    for name, value in plan.command.adapter.chosen().items():
        flags[f"--{name}"] = [str(v) for v in (value if isinstance(value, list) else [value])]
    return [word for flag, values in flags.items() for word in (flag, *values)]


def _adapter_code(preset: Preset, device: str, command: Command, source: str) -> list[str]:
    """What has to be added to a script that knows no adapters; its kind of model is guessed from its text."""
    dtype = "float32" if device == "cpu" else "bfloat16"
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
