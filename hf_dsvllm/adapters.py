"""LoRA and QLoRA: the quantisation and adapter configuration of a preset, in TRL's own words.

The values are written into TRL's `ModelConfig`, whose `get_peft_config` and `get_quantization_config` the recipes then
call, so that every flag TRL documents (`--lora_r`, `--lora_target_modules`, …) keeps its meaning.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from typing import Any

from hf_dsvllm.ds_config import zero_stage
from hf_dsvllm.engine.spec import LORA_RANKS
from hf_dsvllm.errors import DsvllmError, Problem
from hf_dsvllm.model_shape import load_shape
from hf_dsvllm.presets import Preset
from hf_dsvllm.traps import Fix, quant_storage_problems

__all__ = [
    "adapter_problems",
    "apply_to_model_config",
    "dtype_in_training",
    "full_dtype",
    "peft_config_of",
    "quant_storage",
    "quantization_record",
    "training_dtype",
    "trl_flags",
    "vocabulary_was_resized",
    "why_merge_for_engine",
    "wrap",
]

# Embeddings and output heads by their usual names; `adapter_format.will_it_serve` looks at the layers themselves.
NOT_WRAPPED = {"lm_head", "embed_out", "embed_tokens", "wte", "word_embeddings", "embed_in"}
ALL_LINEAR = "all-linear"  # PEFT reads the word as a string only


def quant_storage(zero_stage: int | None, training_dtype: str) -> str:
    """The dtype 4-bit weights are packed into.

    ZeRO-3 partitions floating-point tensors only, so they are stored as the training dtype there; any other 16-bit
    type would be cast by the engine, which corrupts them.  Below ZeRO-3 uint8 is never touched.
    """
    return training_dtype if zero_stage == 3 else "uint8"


def training_dtype(args: Any) -> str:
    """The dtype these arguments train in, which DeepSpeed casts to; TRL trains in bf16 unless told otherwise."""
    if args.fp16:
        return "float16"
    return "bfloat16" if args.bf16 or args.bf16 is None else "float32"


def full_dtype(preset: Preset, device: str, training: str = "bfloat16") -> str:
    """The dtype to load the model in, for a run that trains in `training`.

    Without DeepSpeed a fully trained model needs fp32 master weights under autocast; DeepSpeed makes them itself, from
    weights in the training dtype, and frozen weights need none.  CPUs train in float32: bf16 is emulated where
    AVX512-BF16 is missing.
    """
    if device == "cpu":
        return "float32"
    if preset.uses_deepspeed:
        return training
    if preset.adapter is None:
        return "float32"
    return "float16" if training == "float16" else "bfloat16"


def trl_flags(preset: Preset, device: str, training: str = "bfloat16") -> list[str]:
    """The flags of TRL's own scripts that mean the same as `preset`'s adapter; [] for presets without one.

    Equal to what `apply_to_model_config` sets (kept so by a test), without importing TRL.
    """
    if preset.adapter is None:
        return []
    dtype = full_dtype(preset, device, training)
    flags = ["--dtype", dtype, "--use_peft", "--lora_target_modules", ALL_LINEAR]
    if preset.adapter == "qlora":
        storage = quant_storage(preset.zero_stage, dtype)
        flags += ["--load_in_4bit", "--use_bnb_nested_quant", "--bnb_4bit_quant_storage", storage]
    return flags


def apply_to_model_config(config: Any, preset: Preset, *, device: str, full_dtype: str) -> list[Fix]:
    """Set the adapter, quantisation and dtype fields of a TRL `ModelConfig`; returns what was changed and why.

    Fields the user set are kept, but for `dtype`: TRL's default of float32 would become the 4-bit compute dtype and
    twice the memory of a frozen model, and "auto" is no dtype that 4-bit weights could compute in.
    """
    fixes: list[Fix] = []

    def change(field: str, value: Any, why: str) -> None:
        before = getattr(config, field)
        if before != value:
            setattr(config, field, value)
            fixes.append(Fix(field, before, value, why))

    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    open_dtype = config.dtype == defaults["dtype"] or (config.dtype == "auto" and preset.adapter == "qlora")
    if open_dtype and config.dtype != full_dtype:
        change("dtype", full_dtype, _dtype_reason(preset, device))
    if preset.adapter is None:
        return fixes
    change("use_peft", True, f"preset {preset.name} trains adapters")
    if config.lora_target_modules is None and getattr(config, "lora_target_parameters", None) is None:
        change("lora_target_modules", ALL_LINEAR, "adapters on every linear layer (QLoRA paper, section 4)")
    if config.lora_dropout == defaults["lora_dropout"] and _adapts_fused_experts(config):
        change("lora_dropout", 0.0, "PEFT adapts fused experts as parameters, which take no dropout")
    if preset.adapter == "qlora":
        change("load_in_4bit", True, f"preset {preset.name} trains on a 4-bit model")
        change("load_in_8bit", False, "4-bit and 8-bit exclude each other")
        change("use_bnb_nested_quant", True, "double quantisation: 0.37 bits less per weight (QLoRA paper, section 3)")
        if config.bnb_4bit_quant_storage is None:
            storage = quant_storage(preset.zero_stage, full_dtype)  # under DeepSpeed the training dtype
            change("bnb_4bit_quant_storage", storage, "the only storage this ZeRO stage leaves intact")
    return fixes


def adapter_problems(
    config: Any, preset: Preset | None, *, stage: int | None, training: str = "bfloat16"
) -> list[Problem]:
    """What this adapter cannot do: run without bitsandbytes, in this 4-bit storage, or with dropout on experts.

    `stage` is DeepSpeed's ZeRO stage, None without DeepSpeed; `training` the dtype of its engine.
    """
    problems = []
    if config.use_peft and config.lora_dropout and _adapts_fused_experts(config):
        problems.append(
            Problem(
                f"lora_dropout={config.lora_dropout} with adapters on every linear layer of a mixture of experts: PEFT "
                "adapts its fused experts as parameters, which take no dropout",
                "--lora_dropout 0, or layers outside the experts: --lora_target_modules q_proj k_proj v_proj o_proj",
            )
        )
    four_bit = (preset is not None and preset.adapter == "qlora") or getattr(config, "load_in_4bit", False)
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            Problem("4-bit training needs bitsandbytes, which is not installed", "pip install bitsandbytes")
        )
    if four_bit and stage is not None:
        storage = str(config.bnb_4bit_quant_storage or "uint8")
        problems += quant_storage_problems(storage, training, stage)
    return problems


def why_merge_for_engine(config: Any, device: str) -> str | None:
    """Why vLLM gets a merged copy instead of this run's adapters; None when it hot-loads them.

    vLLM refuses DoRA, `modules_to_save`, ranks above 512 and expert parameters (vllm/lora, 0.26 to 0.32).  What other
    settings of PEFT mean is known when the model is (`adapter_format.will_it_serve`).  On CPUs it
    serves adapters at 17 tok/s where the merged model does 52 to 76 (SmolLM2-135M, 32 prompts, 2 AVX2 cores, vLLM 0.32,
    docs/lab-notes.md), and merging takes a second or two.
    """
    if config.use_dora:
        return "vLLM refuses DoRA"
    if config.lora_modules_to_save:
        return "vLLM refuses modules_to_save"
    if getattr(config, "lora_target_parameters", None):
        return "vLLM refuses lora_target_parameters"
    targets = config.lora_target_modules or ()
    outside = sorted(NOT_WRAPPED & {target.rpartition(".")[2] for target in targets if isinstance(targets, list)})
    if outside:
        return f"vLLM leaves adapters on embeddings and output head out: {', '.join(outside)}"
    if config.lora_r > LORA_RANKS[-1]:
        return f"lora_r={config.lora_r} is above vLLM's largest rank, {LORA_RANKS[-1]}"
    return "vLLM serves adapters several times slower on CPUs" if device == "cpu" else None


def wrap(model: Any, peft_config: Any, args: Any) -> Any:
    """`model` with fresh adapters, ready for a plain Trainer; TRL's trainers do this themselves.

    Under ZeRO-3 adapters keep the frozen model's dtype (its gathers need one dtype) and checkpointing is reentrant; a
    4-bit model trains its adapters in bf16 (QLoRA paper, section 3) where it computes in bf16.
    """
    import torch
    from peft import get_peft_model

    four_bit = bool(getattr(model, "is_loaded_in_4bit", False))
    stage = zero_stage(args.deepspeed if isinstance(args.deepspeed, dict) else None)
    model = get_peft_model(model, peft_config, autocast_adapter_dtype=not (stage == 3 and not four_bit))
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
        if stage == 3:
            args.gradient_checkpointing_kwargs = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}
    if four_bit and args.bf16:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def quantization_record(model: Any) -> dict[str, Any] | None:
    """The 4-bit settings a live model was loaded with, as the run record keeps them; None for other models."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None or not getattr(config, "load_in_4bit", False):
        return None
    return {
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": config.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": str(config.bnb_4bit_quant_storage).removeprefix("torch."),
        "llm_int8_skip_modules": config.llm_int8_skip_modules,
    }


def dtype_in_training(model: Any, model_args: Any) -> str:
    """The dtype the live model holds its weights in, which "auto" does not say.

    Weights in 4 bit have another one: that in which they were read, before they were quantised.
    """
    asked = str(model_args.dtype).removeprefix("torch.")
    if getattr(model, "is_loaded_in_4bit", False):
        return str(model.config.dtype).removeprefix("torch.") if asked == "auto" else asked
    frozen = [one.dtype for one in model.parameters() if one.is_floating_point() and not one.requires_grad]
    dtype = collections.Counter(frozen).most_common(1)[0][0] if frozen else model.dtype
    return str(dtype).removeprefix("torch.")


def peft_config_of(model_args: Any) -> Any:
    """TRL's adapter configuration, None without one; the base's revision is in it, for those who load the adapter."""
    from trl import get_peft_config

    config = get_peft_config(model_args)
    if config is not None and model_args.model_revision != "main":
        config.revision = model_args.model_revision
    return config


def _adapts_fused_experts(config: Any) -> bool:
    """Whether "all-linear" reaches experts here; False where the model's shape is not known before it is loaded."""
    if config.lora_target_modules not in (ALL_LINEAR, [ALL_LINEAR]) or not config.model_name_or_path:
        return False
    try:
        return load_shape(config.model_name_or_path, revision=config.model_revision).experts > 0
    except DsvllmError:
        return False


def _dtype_reason(preset: Preset, device: str) -> str:
    if device == "cpu":
        return "CPUs train in float32"
    if preset.adapter:
        return "frozen weights need no fp32 copy; it is the 4-bit compute dtype too"
    return "DeepSpeed keeps the fp32 master weights itself"


def vocabulary_was_resized(model: Any) -> bool:
    """Whether the live model with adapters has more or fewer embeddings than the base they were loaded from."""
    config = next(iter(model.peft_config.values()))
    base = config.base_model_name_or_path
    if not base:
        return False
    try:
        before = type(model.config).from_pretrained(base, revision=config.revision).get_text_config().vocab_size
    except (OSError, ValueError):
        return False
    return bool(model.config.get_text_config().vocab_size != before)
