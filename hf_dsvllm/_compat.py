"""Workarounds for upstream, each with its reason and the condition for its removal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

__all__ = [
    "join_deepspeed_on_cpu",
    "keep_4bit_weights_packed",
    "log_through_trainer",
    "note_best",
    "outside_zero3",
]


def join_deepspeed_on_cpu() -> None:
    """Let DeepSpeed see the gloo group that TrainingArguments made; without it ZeRO-3 takes the world size to be 1.

    `zero.Init` then fails in `from_pretrained` ("train_batch_size is not equal to …").  On GPUs accelerate makes the
    group through DeepSpeed.  Remove when transformers does so with `use_cpu` too (read in 5.19, training_args.py).
    """
    import deepspeed
    import torch

    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)


@contextlib.contextmanager
def outside_zero3() -> Iterator[None]:
    """Make and load other models whole while a ZeRO-3 run is alive; context manager and decorator.

    transformers shards every model made in a process that holds ZeRO-3 arguments: on one rank alone that waits for the
    others for ever, and on the meta device it fails ("Cannot copy out of meta tensor").  Remove when transformers takes
    the choice as an argument of `from_pretrained` and `from_config` (read in 5.19, integrations/deepspeed.py).
    """
    module: Any = sys.modules.get("transformers.integrations.deepspeed")
    config = module.deepspeed_config() if module is not None else None
    if config is None:
        yield
        return
    holder = module._hf_deepspeed_config_weak_ref
    module.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        module._hf_deepspeed_config_weak_ref = holder


def keep_4bit_weights_packed(model: Any) -> int:
    """Stop bitsandbytes from repacking 4-bit weights in a CPU evaluation forward; returns the layers touched.

    On CPUs with AVX512-BF16 `Linear4bit.forward` repacks its weight in place the first time it runs without gradients;
    training afterwards has wrong gradients (cosine 0.38) and a merge gives garbage.  Only an autograd warning shows it.
    Remove when bitsandbytes unpacks before training (read in 0.50.2, nn/modules.py).
    """
    touched = 0
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", None):
            module.support_avx512bf16_for_cpu = False
            touched += 1
    return touched


def log_through_trainer(trainer: Any, values: dict[str, float]) -> None:
    """Log with the Trainer's step, history and `report_to` backends.

    The base class's method on purpose: TRL's overrides add and clear their running training averages.
    Remove when TRL separates the two (read in 1.16, SFTTrainer.log).
    """
    from transformers import Trainer

    Trainer.log(trainer, dict(values))


def note_best(trainer: Any, metrics: dict[str, float]) -> bool:
    """Let the Trainer compare `metrics[metric_for_best_model]` with its best; True if it is the new best.

    The method is private but has no public counterpart.  Remove when callbacks can report a metric (asked for in
    transformers#38829).
    """
    return bool(trainer._determine_best_metric(metrics=metrics, trial=None))
