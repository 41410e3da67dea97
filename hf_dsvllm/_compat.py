"""Workarounds for upstream, each with its reason and the condition for its removal."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "forget_earlier_deepspeed",
    "join_deepspeed_on_cpu",
    "keep_4bit_weights_packed",
    "keep_out_of_uploads",
    "log_through_trainer",
    "note_best",
    "outside_zero3",
    "quiet_early_stopping",
]

# What a run writes into its output folder beside the Trainer's own files, as patterns of huggingface_hub.
OF_A_RUN = (
    *("export/*", "export-*/*", "snapshots/*", "snapshots-before-*/*", "evals/*", "evals-before-*/*", "engine/*"),
    *("tokenizer/*", "run.json", "plan.json", "measured.json", "ds_config.json", "report.html"),
    *(".running", ".*.tmp", ".*.tmp/*"),
)
_kept_out: dict[Path, tuple[str, ...]] = {}  # patterns by output folder


def forget_earlier_deepspeed() -> None:
    """Take back ACCELERATE_USE_DEEPSPEED, which accelerate sets for a run with DeepSpeed and leaves in the process.

    A later run without DeepSpeed, as in a notebook, would get ZeRO-2 by it.  Its launcher sets more beside it, by which
    it is known.  Remove when Accelerator restores the variable (read in 1.15, accelerator.py, `__init__`).
    """
    of_the_launcher = (
        "ACCELERATE_CONFIG_DS_FIELDS",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    )
    if not any(name in os.environ for name in of_the_launcher):
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


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


def log_through_trainer(trainer: Any, values: dict[str, float], *, step: int) -> None:
    """Log under `step`, which may be past, with the Trainer's history and `report_to` backends.

    The base class's method on purpose: TRL's overrides add and clear their running training averages.  Backends take
    the step from the Trainer's state.  Remove when TRL separates the two (read in 1.16, SFTTrainer.log) and
    `Trainer.log` takes a step.
    """
    from transformers import Trainer

    state = trainer.state
    now = state.global_step, state.epoch
    if step != now[0] and now[0] and now[1] is not None:
        state.epoch = now[1] * step / now[0]
    state.global_step = step
    try:
        Trainer.log(trainer, dict(values))
    finally:
        state.global_step, state.epoch = now


def note_best(trainer: Any, metrics: dict[str, float], *, step: int) -> bool:
    """Let the Trainer compare `metrics[metric_for_best_model]` of `step` with its best; True if it is the new best.

    The method is private but has no public counterpart.  It takes the current step for the one of the score, and the
    checkpoint's folder from the next checkpoint that is saved.  Remove when callbacks can report a metric (asked for in
    transformers#38829).
    """
    state = trainer.state
    is_best = bool(trainer._determine_best_metric(metrics=metrics, trial=None))
    if is_best and step != state.global_step:
        state.best_global_step = step
        checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        state.best_model_checkpoint = str(checkpoint) if checkpoint.is_dir() else None
    return is_best


def quiet_early_stopping() -> None:
    """Drop EarlyStoppingCallback's "early stopping is disabled" where a score of ours is late, or was counted before.

    It says so at every evaluation without the score, and is wrong: it counts as soon as the score comes.  Remove when
    it can be told that a metric comes later (read in 5.19, trainer_callback.py).
    """
    logger = logging.getLogger("transformers.trainer_callback")
    if not any(is_about_something_else is known for known in logger.filters):
        logger.addFilter(is_about_something_else)


def is_about_something_else(record: logging.LogRecord) -> bool:
    """Whether a log record is not the one above."""
    return re.search(r"did not find eval_gen_\S+ so early stopping is disabled", record.getMessage()) is None


def keep_out_of_uploads(trainer: Any) -> None:
    """Let `push_to_hub` of the Trainer leave what a run writes in its output folder: weights, prompts, logs.

    It uploads everything there but checkpoints, by patterns that nobody can add to; remove when they are an argument
    (read in transformers 5.19, trainer.py, `push_to_hub` and `_push_from_checkpoint`).
    """
    folder, export = Path(trainer.args.output_dir).absolute(), trainer.args.export_to
    patterns = OF_A_RUN
    if export and Path(export).absolute().is_relative_to(folder):
        name = Path(export).absolute().relative_to(folder).as_posix()
        patterns += () if name == "." else (f"{name}/*", f"{name}-*/*")
    _kept_out[folder] = tuple(dict.fromkeys((*_kept_out.get(folder, ()), *patterns)))
    module: Any = sys.modules["transformers.trainer"]
    if not isinstance(module.hf_api, _HubOfTheTrainer):
        module.hf_api = _HubOfTheTrainer(module.hf_api)


class _HubOfTheTrainer:
    """transformers' `hf_api`, and the client it returns, with our patterns in `upload_folder`."""

    def __init__(self, hf_api: Callable[[], Any]) -> None:
        self._hf_api = hf_api

    def __call__(self) -> _HubOfTheTrainer:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hf_api(), name)

    def upload_folder(self, *, folder_path: Any, ignore_patterns: Any = None, **more: Any) -> Any:
        patterns = [*(ignore_patterns or ()), *_kept_out.get(Path(folder_path).absolute(), ())]
        return self._hf_api().upload_folder(folder_path=folder_path, ignore_patterns=patterns or None, **more)
