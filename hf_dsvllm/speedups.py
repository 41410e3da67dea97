"""The speed features of `features`, put into a live Trainer; each says what it did, or why it did nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch

from hf_dsvllm.attention import drop_masks, use_varlen, why_not

__all__ = ["OutsideAutocast", "apply", "attention_order"]


def apply(trainer: Any, features: Collection[str]) -> list[str]:
    """Put the features that belong to model and collator into `trainer`, which has not trained yet; a line for each."""
    lines = ready_for_slices(trainer) if trainer.args.parallelism_config is not None else []
    masks = {"unmasked", "varlen", "padding_free"} & set(features)
    if masks:
        lines += without_masks(trainer, masks)
    if "bf16_adapters" in features:
        lines += bf16_adapters(trainer)
    elif "lean_adapters" in features:
        lines += lean_adapters(trainer)
    if "fused_adapters" in features:
        lines += fused_adapters(trainer)
    if "cudnn" in features and not torch.cuda.is_available():
        lines.append("speed: cudnn left out, because there is no GPU")
    return lines


def ready_for_slices(trainer: Any) -> list[str]:
    """What Ulysses sequence parallelism asks of a Trainer and accelerate 1.15 leaves to its user.

    The attention it spreads must be named, and be the model's own; every batch must have a length that all processes
    can share, and say where in its sequence each token stands, which of all collators only TRL's for SFT does.
    """
    parallel, collator = trainer.args.parallelism_config, trainer.data_collator
    handler = getattr(parallel, "sp_handler", None)
    if handler is None or isinstance(collator, WithPositions):
        return []
    if handler.sp_attn_implementation is None:
        handler.sp_attn_implementation = trainer.model.config._attn_implementation
    if getattr(collator, "pad_to_multiple_of", parallel.sp_size) is None:
        collator.pad_to_multiple_of = parallel.sp_size
    if getattr(collator, "return_position_ids", False):
        return []
    trainer.data_collator = WithPositions(collator)
    return ["sequence parallel: batches carry the position of each token, which Ulysses asks for"]


class WithPositions:
    """A data collator whose batches, (rows, tokens), have `position_ids`: its own, or counted from each row's start."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        if "position_ids" not in batch:
            tokens = batch["input_ids"]
            batch["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
        return batch


def without_masks(trainer: Any, features: Collection[str]) -> list[str]:
    """`unmasked`, `varlen` and `padding_free`, where the model allows it."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    reason = why_not(model)
    if reason is None and trainer.args.parallelism_config is not None:
        reason = "sequences are spread over processes"
    if reason is not None:
        return [f"speed: {', '.join(sorted(features))} left out, because {reason}"]
    lines = []
    if {"varlen", "padding_free"} & set(features):
        use_varlen(model)
        lines.append("speed: packed sequences attend without a mask (varlen)")
    drop_masks(model)
    if "padding_free" in features:
        lines.append(padding_free(trainer))
    elif "unmasked" in features:
        lines.append("speed: padding on the right needs no mask (unmasked)")
    return lines


def padding_free(trainer: Any) -> str:
    """TRL's own collator lays sequences end to end; its flag is refused beside `max_length`, which was applied by now.

    TRL enforces `max_length` while it prepares the dataset, before this is called.
    """
    collator = trainer.data_collator
    fields = {field.name for field in dataclasses.fields(collator)} if dataclasses.is_dataclass(collator) else set()
    if "padding_free" not in fields:
        return f"speed: padding_free left out, because {type(collator).__name__} cannot lay sequences end to end"
    collator.padding_free = True
    return "speed: the sequences of a micro-batch are laid end to end, none is padded (padding_free)"


class OutsideAutocast:
    """False while autocast is on: PEFT's `cast_input_dtype_enabled`, read at every forward pass."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __bool__(self) -> bool:
        return not torch.is_autocast_enabled(self.device)


def lean_adapters(trainer: Any) -> list[str]:
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
        return [f"speed: lean_adapters left out, because {reason}"]
    device = "cuda" if torch.cuda.is_available() and not trainer.args.use_cpu else "cpu"
    for layer in layers:
        layer.cast_input_dtype_enabled = OutsideAutocast(device)
    return [f"speed: {len(layers)} adapted layers take their input as it is under autocast (lean_adapters)"]


def bf16_adapters(trainer: Any) -> list[str]:
    """Adapters in bf16, and so their optimizer states: before the optimizer exists.

    Of `modules_to_save` and DoRA's magnitudes, which are no small differences to a weight, the precision stays.
    """
    names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    found = [
        parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and parameter.dtype == torch.float32 and set(names) & set(name.split("."))
    ]
    reason = None
    if trainer.is_deepspeed_enabled:
        reason = "DeepSpeed holds adapters in the training dtype, beside their fp32 master weights"
    elif not trainer.args.bf16:
        reason = "nothing is computed in bf16"
    elif trainer.optimizer is not None:
        reason = "the optimizer was made before"
    elif not found:
        reason = "there are no fp32 adapters"
    if reason is not None:
        return [f"speed: bf16_adapters left out, because {reason}"]
    for parameter in found:
        parameter.data = parameter.data.to(torch.bfloat16)
    return [f"speed: {len(found)} adapter matrices and their optimizer states in bf16 (bf16_adapters)"]


def fused_adapters(trainer: Any) -> list[str]:
    """Every layer that allows it becomes one operation; the others are counted with what keeps them."""
    from peft.tuners.lora import LoraLayer

    from hf_dsvllm.low_rank import fuse, why_not_fused

    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    reasons = [why_not_fused(layer) for layer in layers]
    kept = Counter(found for found in reasons if found is not None)
    reason = None
    if not layers:
        reason = "there are no LoRA layers"
    elif shards_weights(trainer):
        reason = "ZeRO-3 gathers adapters only where their own modules are called"
    elif kept.total() == len(layers):
        reason = f"of {' and '.join(kept)}"
    if reason is not None:
        return [f"speed: fused_adapters left out, because {reason}"]
    for layer, found in zip(layers, reasons, strict=True):
        if found is None:
            fuse(layer)
    besides = f", {kept.total()} are not because of {' and '.join(kept)}" if kept else ""
    return [f"speed: {len(layers) - kept.total()} adapted layers are one operation each (fused_adapters){besides}"]


def shards_weights(trainer: Any) -> bool:
    """Whether ZeRO-3 has its weights, or will have them once its engine is made."""
    plugin = getattr(getattr(trainer, "accelerator", None), "state", None)
    stage = getattr(getattr(plugin, "deepspeed_plugin", None), "zero_stage", None)
    return stage == 3 or any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())


def casts_its_input(module: Any) -> bool:
    """Whether this is a layer of PEFT's with fp32 adapters, on weights that bitsandbytes did not quantise.

    PEFT's layers on quantised weights cast outside autocast alone (tuners/lora/bnb.py, `requires_conversion`).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer) or type(module).__module__.endswith(".bnb"):
        return False
    return any(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in module.parameters())


@contextlib.contextmanager
def attention_order(features: Collection[str]) -> Iterator[None]:
    """cuDNN's attention first, then PyTorch's order; nothing on CPUs or without the feature."""
    if "cudnn" not in features or not torch.cuda.is_available():
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        yield
