"""`--ds_preset auto`: the planner's choice for this model on this machine, made before the arguments derive anything.

    --ds_preset auto            train all weights, in the fastest way that fits
    --ds_preset auto+lora       adapters (auto+qlora: on 4-bit weights; auto+any: all weights, or adapters)
    --ds_preset auto:MODEL      the same in a script whose command line does not name the model

Every rank computes the same from the same numbers: sizes of the machine, never what is free at the moment.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm import features
from hf_dsvllm.engine.capabilities import why_no_transfer
from hf_dsvllm.errors import DsvllmError, Problem
from hf_dsvllm.fields import asks_for_answers
from hf_dsvllm.given import was_given
from hf_dsvllm.hardware import Machine, detect
from hf_dsvllm.launch import Launch, read_launch
from hf_dsvllm.model_shape import load_shape
from hf_dsvllm.optimizers import optimizer_of
from hf_dsvllm.planner.cards import machine_rates
from hf_dsvllm.planner.explain import sentences, suggestions
from hf_dsvllm.planner.search import TIE, Candidate, Job, Plan, gib, judge, make_plan, placements
from hf_dsvllm.planner.setup import Loss
from hf_dsvllm.presets import Preset
from hf_dsvllm.traps import Fix

__all__ = ["AutoChoice", "choose", "is_auto", "keep_activations", "planned_length", "sum_gradients", "trl_config"]

METHODS = ("full", "lora", "qlora", "any")
DEFAULT_LENGTH = 1024  # TRL's SFTConfig.max_length
ADDED_IN_BF16 = (
    1,
    3,
)  # ZeRO stages that add up gradients of micro-batches in the training dtype (speed.gradient_bytes)
EVALUATION_SEQUENCES = 64  # what placement reserves KV cache for


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AutoChoice:
    """What `auto` became: a plan and the arguments it changed; or the problems that kept it from choosing."""

    plan: Plan | None
    fixes: tuple[Fix, ...]
    problems: tuple[Problem, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The choice in words, for the console."""
        return tuple(sentences(self.plan)) if self.plan is not None else ()


def is_auto(name: str | None) -> bool:
    """Whether a preset's name leaves the choice to the planner."""
    return name is not None and name.split(":", 1)[0].split("+", 1)[0].strip().lower() == "auto"


def trl_config(args: Any) -> str | None:
    """The TRL class these arguments are of, None for those of a plain Trainer; GKDConfig is no SFTConfig."""
    named = (parent.__name__ for parent in type(args).__mro__ if parent.__module__.split(".")[0] == "trl")
    return next(named, None)


def choose(args: Any, launch: Launch, device: str, argv: Sequence[str] | None = None) -> AutoChoice:
    """Plan for these arguments and write the choice into them: preset, micro-batch, accumulation, recompute."""
    argv = sys.argv[1:] if argv is None else argv
    kind, _, named = str(args.ds_preset).partition(":")
    method = kind.partition("+")[2].strip().lower() or "full"
    model = named or flag(argv, "--model_name_or_path") or flag(argv, "--model")
    problems, config = [], trl_config(args)
    if config not in (None, "SFTConfig"):
        problems.append(
            Problem(
                f"--ds_preset auto plans SFTConfig and TrainingArguments, these are {config}: what a reference model, "
                "pairs of answers or generation take is not in its formulas",
                "--ds_preset with a name: zero2 or zero3 for all weights, lora, qlora or qlora_zero3 for adapters",
            )
        )
    if method not in METHODS:
        problems.append(
            Problem(f"--ds_preset {args.ds_preset}: {method!r} is no method", "auto, auto+lora or auto+qlora")
        )
    if not model:
        problems.append(
            Problem("--ds_preset auto does not know the model: no --model_name_or_path in the command", "auto:MODEL")
        )
    if problems:
        return refused(*problems)
    try:
        plan = make_plan(job_of(args, launch, device, str(model), method, argv))
    except DsvllmError as error:
        return refused(Problem(f"--ds_preset auto cannot plan: {error}", "--ds_preset with the name of a preset"))
    if plan.chosen is None:
        found = suggestions(plan.job)
        return refused(Problem(f"--ds_preset auto: {sentences(plan)[0]}", "; or ".join(found) or "a smaller model"))
    return AutoChoice(plan=plan, fixes=tuple(applied(args, plan)), problems=())


def refused(*problems: Problem) -> AutoChoice:
    return AutoChoice(plan=None, fixes=(), problems=problems)


def job_of(
    args: Any,
    launch: Launch,
    device: str,
    model: str,
    method: str,
    argv: Sequence[str],
    lora_r: int | None = None,
    revision: str | None = None,
) -> Job:
    """The work these arguments describe on this machine; nodes are taken to be alike."""
    machine = detect()
    world, local = launch.world_size, launch.local_world_size
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    length = planned_length(args, argv)
    ram = machine.ram_bytes * (world // local) if machine.ram_bytes else None
    evaluation = (EVALUATION_SEQUENCES, length + args.gen_eval_max_new_tokens) if asks_for_answers(args) else None
    return Job(
        shape=load_shape(model, revision=revision or flag(argv, "--model_revision")),
        machine=machine if device == "cuda" else Machine(gpus=(), cpu_count=machine.cpu_count, ram_bytes=ram),
        rates=machine_rates(machine if device == "cuda" else None),
        length=length,
        global_batch=batch,
        method=method,  # type: ignore[arg-type]
        loss=loss_of(args),
        lora_r=lora_r or int(flag(argv, "--lora_r") or 16),
        optimizer=optimizer_of(args),
        host_bytes=ram,
        evaluation=evaluation,
        device="cuda" if device == "cuda" else "cpu",
        features=features_of(args, None),
        features_that_fit=features.left_to_plan(args.ds_speed) if trl_config(args) == "SFTConfig" else frozenset(),
        processes=world,
        local_processes=local,
        streams=may_sleep(args, device),
    )


def job_of_model(args: Any, model_args: Any, preset: Preset, device: str) -> Job:
    """The same of a model that TRL's `ModelConfig` names, with a chosen preset."""
    model, kind = str(model_args.model_name_or_path), preset.adapter or "full"
    revision = model_args.model_revision
    job = job_of(args, read_launch(), device, model, kind, (), lora_r=model_args.lora_r, revision=revision)
    return dataclasses.replace(job, features=features_of(args, model_args))


def loss_of(args: Any) -> Loss:
    """Whether all logits are there at once: TRL's SFT goes through them in pieces, but not with label smoothing."""
    return "trl" if hasattr(args, "max_length") and not getattr(args, "label_smoothing_factor", 0) else "plain"


def features_of(args: Any, model_args: Any) -> frozenset[str]:
    """The features that a plan counts with, without those that `speedups` leaves out here."""
    lacking = set()
    if getattr(args, "torch_compile", False):
        lacking |= {"fused_adapters", "whole_layers"}
    if getattr(model_args, "use_dora", False):
        lacking |= {"fused_adapters", "lean_adapters"}
    return features.planned(args.ds_speed) - lacking


def may_sleep(args: Any, device: str) -> bool:
    """Whether vLLM on a shared GPU will sleep between evaluations: where weights are streamed (`engine_start`)."""
    if args.gen_eval_weights != "auto" or device != "cuda" or not asks_for_answers(args):
        return bool(args.gen_eval_weights != "disk")
    return why_no_transfer(Path(args.vllm_python or sys.executable), "ipc") is None


def keep_activations(args: Any, model_args: Any, preset: Preset, device: str) -> list[Fix]:
    """Recompute off where a preset leaves room for all activations, unless the user said how it is to be.

    For TRL's SFT on GPUs, which recomputes by default and whose formulas the planner has.  `model_args` is TRL's
    `ModelConfig`; called before the model is loaded.  With the feature `split_batch` also by smaller micro-batches,
    where their gradients are added up in fp32 or it was asked for by name.
    """
    if not (trl_config(args) == "SFTConfig" and device == "cuda" and args.gradient_checkpointing):
        return []
    if not args.max_length or args.gradient_checkpointing_kwargs or args.activation_offloading:
        return []  # no bound to plan for, or a choice of the user's
    wanted = features.choose(args.ds_speed)
    if was_given(args, "gradient_checkpointing") or not wanted & {"keep_activations", "split_batch"}:
        return []
    if getattr(model_args, "use_dora", False):
        return []  # no formula has what it keeps: over twice what LoRA does
    micro = args.per_device_train_batch_size
    try:
        job = job_of_model(args, model_args, preset, device)
        world, place = next(iter(placements(job)))
        found = judge(job, preset, world, micro, False, place)
        if found.fits and "keep_activations" in wanted:
            why = f"the planner predicts {gib(found.gpu_bytes)} without it, which fits (--ds_speed no_keep_activations)"
            args.gradient_checkpointing = False
            return [Fix("gradient_checkpointing", True, False, why)]
        if found.fits or "split_batch" not in wanted or was_given(args, "gradient_accumulation_steps"):
            return []
        asked = "split_batch" in (args.ds_speed or ())
        rounded = "fp32_adapters" not in wanted if preset.adapter == "qlora" else "bf16_adapters" in wanted
        in_bf16 = preset.zero_stage in ADDED_IN_BF16 or (rounded and not preset.uses_deepspeed)
        if job.shape.experts or args.dataloader_drop_last or (in_bf16 and not asked):
            return []  # the balance loss of experts is one of each micro-batch; fewer rows would be dropped at the end
        smaller = [judge(job, preset, world, size, False, place) for size in range(1, micro) if micro % size == 0]
        recomputed = judge(job, preset, world, micro, True, place)
    except (DsvllmError, StopIteration):
        return []
    fitting = [candidate for candidate in smaller if candidate.fits]
    best = max(fitting, key=lambda candidate: candidate.step.tokens_per_second, default=None)
    if best is None or best.step.tokens_per_second < (1 + TIE) * recomputed.step.tokens_per_second:
        return []
    return split_batch(args, best, recomputed)


def sum_gradients(args: Any, model_args: Any, preset: Preset, device: str) -> list[Fix]:
    """The feature `gpu_gradients` for TRL's SFT with an optimizer on the CPU, where the planner has room for it.

    After `keep_activations`, which may have split the batch; `model_args` as there.
    """
    wanted = features.left_to_plan(args.ds_speed)
    if not (trl_config(args) == "SFTConfig" and device == "cuda" and args.max_length and wanted):
        return []
    if preset.offload_optimizer != "cpu" or args.gradient_accumulation_steps == 1:
        return []
    try:
        job = job_of_model(args, model_args, preset, device)
        world, place = next(iter(placements(job)))
        found = judge(job, preset, world, args.per_device_train_batch_size, args.gradient_checkpointing, place)
    except (DsvllmError, StopIteration):
        return []
    if not found.setup.sums_on_gpu:
        return []
    before, args.ds_speed = args.ds_speed, [*(args.ds_speed or ()), *wanted]
    why = f"the planner predicts {gib(found.gpu_bytes)} with it, which fits (--ds_speed no_gpu_gradients)"
    return [Fix("ds_speed", before, args.ds_speed, why)]


def split_batch(args: Any, best: Candidate, recomputed: Candidate) -> list[Fix]:
    """Write the smaller micro-batch and its accumulation into arguments, and into DeepSpeed's numbers made of them."""
    why = (
        f"the same batch without recompute: the planner predicts {gib(best.gpu_bytes)} and "
        f"{best.step.tokens_per_second:,.0f} tokens/s instead of {recomputed.step.tokens_per_second:,.0f} (split_batch)"
    )
    wanted = {
        "per_device_train_batch_size": best.setup.micro,
        "gradient_accumulation_steps": best.setup.accumulation,
        "gradient_checkpointing": False,
    }
    fixes = [Fix(name, getattr(args, name), value, why) for name, value in wanted.items()]
    for name, value in wanted.items():
        setattr(args, name, value)
    filled = getattr(args, "hf_deepspeed_config", None)
    if filled is not None:
        filled.config["train_micro_batch_size_per_gpu"] = best.setup.micro
        filled.config["gradient_accumulation_steps"] = best.setup.accumulation
    return fixes


def planned_length(args: Any, argv: Sequence[str]) -> int:
    """Tokens of a sequence: TRL's max_length, or the recipe's --block_size, or TRL's default."""
    return int(getattr(args, "max_length", None) or flag(argv, "--block_size") or DEFAULT_LENGTH)


def applied(args: Any, plan: Plan) -> list[Fix]:
    """Write the chosen candidate into the arguments."""
    assert plan.chosen is not None
    setup = plan.chosen.setup
    wanted = {
        "ds_preset": setup.preset.name,
        "per_device_train_batch_size": setup.micro,
        "gradient_accumulation_steps": setup.accumulation,
        "gradient_checkpointing": setup.recompute,
    }
    fixes = []
    for name, value in wanted.items():
        before = getattr(args, name)
        if before != value:
            setattr(args, name, value)
            fixes.append(
                Fix(name, before, value, "the planner's choice" if name != "ds_preset" else "the fastest that fits")
            )
    return fixes


def flag(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`; None where it is not given."""
    for index, word in enumerate(argv):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
    return None
