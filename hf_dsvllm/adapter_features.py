"""The speed features of adapters: their precision, their casts, and an adapted layer as one operation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from hf_dsvllm.outcome import Outcome, compiles, plain_model, shards_weights

__all__ = ["bf16_adapters", "casts_its_input", "fp32_adapters", "fused_adapters", "keep_dtypes", "lean_adapters"]

SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class OutsideAutocast:
    """False while autocast is on: PEFT's `cast_input_dtype_enabled`, read at every forward pass."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __bool__(self) -> bool:
        return not torch.is_autocast_enabled(self.device)


def lean_adapters(trainer: Any) -> Outcome:
    """Under autocast a layer's input stays bf16: PEFT copies it to the adapter's fp32, and autocast copies it back."""
    layers = [module for module in trainer.model.modules() if casts_its_input(module)]
    reason = None
    if trainer.is_deepspeed_enabled:
        reason = "DeepSpeed holds adapters in the training dtype: there is nothing to cast"
    elif not (trainer.args.bf16 or trainer.args.fp16):
        reason = "nothing is computed under autocast"
    elif not layers:
        reason = "no layer has an fp32 adapter whose input PEFT would cast (4-bit layers never do under autocast)"
    if reason is not None:
        return Outcome(("lean_adapters",), reason=reason)
    device = "cuda" if torch.cuda.is_available() and not trainer.args.use_cpu else "cpu"
    for layer in layers:
        layer.cast_input_dtype_enabled = OutsideAutocast(device)
    return Outcome(("lean_adapters",), f"{len(layers)} adapted layers take their input as it is under autocast")


def bf16_adapters(trainer: Any) -> Outcome:
    """Adapters in bf16, and so their optimizer states: before the optimizer exists."""
    reason = None
    if trainer.is_deepspeed_enabled:
        reason = "DeepSpeed holds adapters in the training dtype, beside their fp32 master weights"
    elif not trainer.args.bf16:
        reason = "nothing is computed in bf16"
    return recast_adapters(trainer, "bf16_adapters", torch.float32, torch.bfloat16, reason)


def fp32_adapters(trainer: Any) -> Outcome:
    """Adapters on a quantised base in fp32, which TRL has rounded to bf16 (trl 1.16, SFTTrainer and others)."""
    reason = None
    if trainer.is_deepspeed_enabled:
        reason = "DeepSpeed has fp32 master weights of adapters"
    elif not is_quantized(trainer):
        reason = "only on a quantised base are adapters in bf16"
    return recast_adapters(trainer, "fp32_adapters", torch.bfloat16, torch.float32, reason)


def is_quantized(trainer: Any) -> bool:
    """Whether the base of the trainer's adapters is in 4 or 8 bit."""
    return bool(getattr(plain_model(trainer), "is_quantized", False))


def keep_dtypes(trainer: Any) -> None:
    """Adapters read from a checkpoint stay in the dtype that they are trained in: `load_adapter` makes them fp32.

    With DeepSpeed, whose checkpoints the Trainer reads in another way, they keep it anyway.
    """
    load = getattr(trainer, "_load_from_checkpoint", None)
    if load is None:
        return

    def loaded(*args: Any, **kwargs: Any) -> None:
        before = {name: each.dtype for name, each in trainer.model.named_parameters() if each.requires_grad}
        load(*args, **kwargs)
        for name, parameter in trainer.model.named_parameters():
            if name in before and parameter.dtype != before[name]:
                parameter.data = parameter.data.to(before[name])

    trainer._load_from_checkpoint = loaded


def recast_adapters(trainer: Any, feature: str, before: torch.dtype, after: torch.dtype, reason: str | None) -> Outcome:
    """LoRA's matrices from one dtype to another, before the optimizer exists.

    Of `modules_to_save` and DoRA's magnitudes, which are no small differences to a weight, the precision stays.
    """
    names = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    found = [
        parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and parameter.dtype == before and names & set(name.split("."))
    ]
    if reason is None and trainer.optimizer is not None:
        reason = "the optimizer was made before"
    elif reason is None and not found:
        reason = f"there are no {SHORT[before]} adapters"
    if reason is not None:
        return Outcome((feature,), reason=reason)
    for parameter in found:
        parameter.data = parameter.data.to(after)
    return Outcome((feature,), f"{len(found)} adapter matrices and their optimizer states in {SHORT[after]}")


def fused_adapters(trainer: Any) -> Outcome:
    """Every layer that allows it becomes one operation; the others are counted with what keeps them."""
    from peft.tuners.lora import LoraLayer

    from hf_dsvllm.low_rank import fuse, why_not_fused

    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    reasons = [why_not_fused(layer) for layer in layers]
    kept = Counter(found for found in reasons if found is not None)
    reason = None
    if not layers:
        reason = "there are no LoRA layers"
    elif compiles(trainer):
        reason = "torch.compile (2.11) loses the shape of what such an operation returns"
    elif shards_weights(trainer):
        reason = "ZeRO-3 gathers adapters only where their own modules are called"
    elif kept.total() == len(layers):
        reason = f"of {' and '.join(kept)}"
    if reason is not None:
        return Outcome(("fused_adapters",), reason=reason)
    for layer, found in zip(layers, reasons, strict=True):
        if found is None:
            fuse(layer)
    besides = f", {kept.total()} are not because of {' and '.join(kept)}" if kept else ""
    return Outcome(("fused_adapters",), f"{len(layers) - kept.total()} adapted layers are one operation each{besides}")


def casts_its_input(module: Any) -> bool:
    """Whether this is a LoRA layer of PEFT's with fp32 adapters, on weights that bitsandbytes did not quantise.

    PEFT's layers on quantised weights cast outside autocast alone (tuners/lora/bnb.py, `requires_conversion`).
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or any(kind.__module__.endswith(".bnb") for kind in type(module).__mro__):
        return False
    if getattr(module, "lora_variant", None):  # DoRA takes its norm in the dtype of the input
        return False
    return any(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in module.parameters())
