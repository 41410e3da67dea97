"""The speed features of `features`, put into a live Trainer; each says what it did, or why it did nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch

from hf_dsvllm import offload, overlap_offload, rounding, whole_layers
from hf_dsvllm.adapter_features import bf16_adapters, fp32_adapters, fused_adapters, keep_dtypes, lean_adapters
from hf_dsvllm.attention import WithoutMasks, use_varlen, why_no_varlen, why_not
from hf_dsvllm.kernels import INSTALL, use_kernels, why_no_kernels
from hf_dsvllm.outcome import Outcome, plain_model

__all__ = ["Outcome", "apply", "attention_order", "only_while_training", "worth_saying"]


KNOWN_STEPS = ("transformers.trainer", "trl.trainer.sft_trainer")  # what these read of a batch was looked at
STEPS = (
    *("compute_loss", "training_step", "_prepare_inputs", "_prepare_input", "get_batch_samples"),
    "_get_num_items_in_batch",
)


def worth_saying(outcomes: Iterable[Outcome], asked: Collection[str]) -> list[str]:
    """Lines for the console: what was done, and why not where it was `asked` for or something can be done about it."""
    return [
        str(each)
        for each in outcomes
        if each.reason in (None, INSTALL) or "all" in asked or set(each.features) & set(asked)
    ]


def apply(trainer: Any, features: Collection[str]) -> list[Outcome]:
    """Put the features that belong to model and collator into `trainer`, which has not trained yet."""
    outcomes = []
    keep_dtypes(trainer)
    if trainer.args.parallelism_config is not None and ready_for_slices(trainer):
        said = "batches carry the position of each token, which Ulysses asks for"
        outcomes.append(Outcome(("sequence parallel",), said))
    if rounding.attach(trainer):
        said = "AdamW rounds bf16 master weights at random, so that small updates are not lost"
        outcomes.append(Outcome(("bf16 master weights",), said))
    if "fused" in features:
        outcomes.append(fused(trainer))
    masks = tuple(name for name in ("unmasked", "varlen", "padding_free") if name in features)
    if masks:
        outcomes += without_masks(trainer, masks)
    if "fp32_adapters" in features:
        outcomes.append(fp32_adapters(trainer))
    if "bf16_adapters" in features and all(each.reason or "fp32_adapters" not in each.features for each in outcomes):
        outcomes.append(bf16_adapters(trainer))
    elif "lean_adapters" in features:
        outcomes.append(lean_adapters(trainer))
    if "fused_adapters" in features:
        outcomes.append(fused_adapters(trainer))
    if "gpu_gradients" in features:
        outcomes.append(gpu_gradients(trainer))
    if "overlap_offload" in features:
        outcomes.append(overlap_copies(trainer))
    if "whole_layers" in features:
        outcomes.append(gather_layers(trainer))
    if "cudnn" in features and not torch.cuda.is_available():
        outcomes.append(Outcome(("cudnn",), reason="there is no GPU"))
    return outcomes


def fused(trainer: Any) -> Outcome:
    """liger-kernel's kernels in the trainer's model; transformers' own flag for them is left to do it itself."""
    model, on_gpu = plain_model(trainer), torch.cuda.is_available() and not trainer.args.use_cpu
    reason = "--use_liger_kernel does it" if trainer.args.use_liger_kernel else why_no_kernels(model, on_gpu)
    if reason is None:
        use_kernels(model)
    return Outcome(("fused",), "norms, rotation and activation are one kernel each", reason)


def ready_for_slices(trainer: Any) -> bool:
    """What Ulysses sequence parallelism asks of a Trainer and accelerate 1.15 leaves to its user: do batches change?

    The attention it spreads must be named, and be the model's own; every batch must have a length that all processes
    can share, and say where in its sequence each token stands, which of all collators only TRL's for SFT does.
    """
    parallel, collator = trainer.args.parallelism_config, trainer.data_collator
    handler = getattr(parallel, "sp_handler", None)
    if handler is None or isinstance(collator, WithPositions):
        return False
    if handler.sp_attn_implementation is None:
        handler.sp_attn_implementation = trainer.model.config._attn_implementation
    if getattr(collator, "pad_to_multiple_of", parallel.sp_size) is None:
        collator.pad_to_multiple_of = parallel.sp_size
    if getattr(collator, "return_position_ids", False):
        return False
    trainer.data_collator = WithPositions(collator)
    return True


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


def without_masks(trainer: Any, features: tuple[str, ...]) -> list[Outcome]:
    """`unmasked`, `varlen` and `padding_free`, where model, collator and what else reads batches allow it."""
    model, collator = plain_model(trainer), trainer.data_collator
    reason = why_not(model)
    if reason is None and spreads_sequences(trainer):
        reason = "sequences are spread over processes"
    if reason is None and any(config.is_prompt_learning for config in peft_configs(trainer)):
        reason = "prompt learning puts tokens before every row"
    if reason is not None:
        return [Outcome(features, reason=reason)]
    outcomes = [packed(trainer, model, name) for name in ("padding_free", "varlen") if name in features]
    if "unmasked" in features and all(outcome.reason is not None for outcome in outcomes):
        if type(collator).__module__.split(".")[0] == "trl":
            trainer.without_masks = WithoutMasks(model, varlen=False)
            outcomes.append(Outcome(("unmasked",), "padding on the right needs no mask"))
        else:
            outcomes.append(Outcome(("unmasked",), reason="only TRL's own collators surely give padding no labels"))
    return outcomes


def packed(trainer: Any, model: Any, feature: str) -> Outcome:
    """`padding_free` lays sequences end to end for training; `varlen` is for those that TRL's packing has laid so."""
    collator = trainer.data_collator
    laid_already = getattr(collator, "padding_free", False)
    reason = why_no_varlen(torch.cuda.is_available() and not trainer.args.use_cpu)
    if reason is None and feature == "padding_free":
        reason = "they are packed already" if laid_already else why_not_end_to_end(trainer)
    elif reason is None and not laid_already:
        reason = "no sequences are packed"
    before = model.config._attn_implementation
    if reason is None and not use_varlen(model):
        reason = f"{type(model).__name__} does not take another attention"
    if reason is not None:
        return Outcome((feature,), reason=reason)
    model.set_attn_implementation(before)
    trainer.without_masks = WithoutMasks(model, varlen=True)
    if feature == "varlen":
        return Outcome(("varlen",), "packed sequences attend without a mask")
    trainer.get_train_dataloader = EndToEnd(trainer)
    return Outcome(("padding_free", "varlen"), "the sequences of a micro-batch are laid end to end, none is padded")


def only_while_training(trainer: Any) -> Callable[..., Any]:
    """`trainer.train`, after which its model has its own attention again, until it is called once more."""
    train: Callable[..., Any] = trainer.train
    masks: WithoutMasks | None = getattr(trainer, "without_masks", None)
    if masks is None:
        return train

    @functools.wraps(train)
    def training(*args: Any, **kwargs: Any) -> Any:
        masks.put_in()
        try:
            return train(*args, **kwargs)
        finally:
            masks.take_out()

    return training


def why_not_end_to_end(trainer: Any) -> str | None:
    """What keeps training batches from one row.

    TRL's own collator can do it.  NEFTune measures its noise by the length of a row.  TRL refuses its flag beside
    `max_length`, which was enforced while it prepared the dataset, before this is called.
    """
    collator = trainer.data_collator
    fields = {field.name for field in dataclasses.fields(collator)} if dataclasses.is_dataclass(collator) else set()
    if "padding_free" not in fields or type(collator).__module__.split(".")[0] != "trl":
        return f"{type(collator).__name__} cannot lay sequences end to end"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func may read rows of a batch"
    steps = [inspect.unwrap(step) for name in STEPS if (step := getattr(trainer, name, None)) is not None]
    if not all(step.__module__ in KNOWN_STEPS for step in steps):
        return f"{type(trainer).__name__} has steps of its own, which may read rows of a batch"
    if any(getattr(config, "alora_invocation_tokens", None) for config in peft_configs(trainer)):
        return "aLoRA looks for its invocation once a row"
    if "seq_lengths" in (getattr(trainer.train_dataset, "column_names", None) or ()):
        return "the dataset's seq_lengths, which nothing has read so far, would divide its rows"
    return "of --neftune_noise_alpha" if trainer.args.neftune_noise_alpha else None


def peft_configs(trainer: Any) -> tuple[Any, ...]:
    """Of the adapters in the trainer's model."""
    found = getattr(trainer.model, "peft_config", None)
    return tuple(found.values()) if isinstance(found, dict) else ()


class EndToEnd:
    """A Trainer's `get_train_dataloader` whose collator lays sequences end to end; evaluation keeps its rows."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.made = trainer, trainer.get_train_dataloader

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        collator = self.trainer.data_collator
        self.trainer.data_collator = dataclasses.replace(collator, padding_free=True)
        try:
            return self.made(*args, **kwargs)
        finally:
            self.trainer.data_collator = collator


def spreads_sequences(trainer: Any) -> bool:
    """Whether processes share sequences, by arguments or by accelerate's environment."""
    of_accelerate = getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)
    sizes = (getattr(of_accelerate, "sp_size", 1), getattr(of_accelerate, "cp_size", 1))
    return trainer.args.parallelism_config is not None or max(sizes) > 1


def gpu_gradients(trainer: Any) -> Outcome:
    """The sum of a step's gradients on the GPU, where the optimizer is offloaded."""
    reason = offload.why_not(trainer)
    if reason is None:
        offload.keep_gradients(trainer)
    return Outcome(("gpu_gradients",), "gradients are added up on the GPU and cross to the host once a step", reason)


def overlap_copies(trainer: Any) -> Outcome:
    """What an offloaded optimizer sends and fetches, behind the backward pass and behind its own step."""
    reason = overlap_offload.why_not(trainer)
    if reason is None:
        overlap_offload.overlap(trainer)
    said = "gradients leave the GPU behind the backward pass, weights come back while Adam works on the next"
    return Outcome(("overlap_offload",), said, reason)


def gather_layers(trainer: Any) -> Outcome:
    """Under ZeRO-3, a layer's weights as one unit."""
    reason = whole_layers.why_not(trainer)
    said = "" if reason is not None else whole_layers.gather_whole(trainer)
    return Outcome(("whole_layers",), said, reason)


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
