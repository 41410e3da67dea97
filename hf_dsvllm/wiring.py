"""Whether the live Trainer is what was asked for: engine, ZeRO stage, world size, adapters, read off the objects.

And whether all ranks were asked for the same: `auto` and recompute are planned on each machine, by its own records.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hf_dsvllm import ranks
from hf_dsvllm.ds_config import get_key, zero_stage
from hf_dsvllm.errors import ConfigError, Problem, WiringError
from hf_dsvllm.presets import Preset
from hf_dsvllm.traps import resume_problems

__all__ = ["Wiring", "check_ranks_agree", "check_wiring", "read_wiring"]

# What Trainer.model_wrapped is when several processes train one model without a DeepSpeed configuration of ours; its
# engine is there by accelerate's own file.
AVERAGES_GRADIENTS = ("DistributedDataParallel", "DeepSpeedEngine")
FSDP = ("FullyShardedDataParallel", "FSDP")  # FSDP 2 renames the model's class: FSDPLlamaForCausalLM


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What a started Trainer really runs.  `zero_stage` is None without a DeepSpeed engine."""

    engine: str
    zero_stage: int | None
    world_size: int
    adapter_modules: int
    four_bit_modules: int
    trainable_parameters: int

    def line(self) -> str:
        """One line for the console."""
        stage = "" if self.zero_stage is None else f", ZeRO stage {self.zero_stage}"
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        adapters = f", adapters in {self.adapter_modules} layers" if self.adapter_modules else ""
        bits = f", {self.four_bit_modules} layers in 4 bit" if self.four_bit_modules else ""
        return f"{self.engine}{stage}, {processes}, {self.trainable_parameters:,} trainable parameters{adapters}{bits}"


def read_wiring(trainer: Any) -> Wiring:
    """Read the engine, stage, world size and adapters of `trainer` once training has begun."""
    wrapped = trainer.model_wrapped
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # accelerate compiles last, around everything
    stage_of = getattr(wrapped, "zero_optimization_stage", None)
    modules = list(trainer.model.modules())
    return Wiring(
        engine=type(wrapped).__name__,
        zero_stage=int(stage_of()) if callable(stage_of) else None,
        # accelerate's number is the one batches are divided by; a process group may exist that it does not use.
        world_size=trainer.accelerator.num_processes,
        adapter_modules=sum(1 for module in modules if hasattr(module, "lora_A")),
        four_bit_modules=sum(1 for module in modules if is_four_bit(module)),
        trainable_parameters=sum(
            getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad
        ),
    )


def is_four_bit(module: Any) -> bool:
    """Whether this is bitsandbytes' own layer; PEFT's wrapper around it has the same class name."""
    kind = type(module)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


def check_wiring(
    wiring: Wiring, preset: Preset | None, config: dict[str, Any] | None, *, resumed: bool = False
) -> None:
    """Raise WiringError when a run fell back to something plainer than asked for, or resumed what cannot be resumed."""
    wrong = [f"{problem.what}; {problem.fix}" for problem in resume_problems(config)] if resumed else []
    if config is not None:
        asked = int((config.get("zero_optimization") or {}).get("stage", 0))
        if wiring.zero_stage is None:
            wrong.append(f"DeepSpeed ZeRO stage {asked} was asked for, the engine is {wiring.engine}")
        elif wiring.zero_stage != asked:
            wrong.append(f"ZeRO stage {asked} was asked for, the engine runs stage {wiring.zero_stage}")
    elif wiring.engine.startswith(FSDP):
        wrong.append(f"FSDP shards the model ({wiring.engine}), and its shards can be neither evaluated nor exported")
    elif wiring.world_size > 1 and not wiring.engine.startswith(AVERAGES_GRADIENTS):
        wrong.append(f"{wiring.world_size} processes train, each its own copy: the engine is {wiring.engine}")
    if preset is not None and wiring.engine == "DataParallel":
        wrong.append("one process trains on several GPUs by nn.DataParallel, which multiplies the batch (use torchrun)")
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if wiring.world_size != expected:
        wrong.append(f"{expected} processes were started, {wiring.world_size} train together")
    if preset is not None and preset.adapter and not wiring.adapter_modules:
        wrong.append(f"preset {preset.name} trains adapters, the model has none (pass peft_config to the trainer)")
    if preset is not None and preset.adapter == "qlora" and not wiring.four_bit_modules:
        wrong.append(f"preset {preset.name} trains on a 4-bit model, no layer is in 4 bit (pass quantization_config)")
    if wrong:
        raise WiringError("the run is not what was asked for: " + "; ".join(wrong) + ". Nothing was trained.")


def check_ranks_agree(args: Any) -> None:
    """Raise one ConfigError on every rank if they differ in preset, ZeRO, batch or recompute; collective.

    Without a process group nothing is compared.  Ranks that differ would wait for each other, or train another batch.
    """
    if ranks.is_distributed() and (problems := differences(ranks.from_all(settings_of(args)))):
        raise ConfigError(problems)


def settings_of(args: Any) -> dict[str, Any]:
    """What every rank must have alike, by the name it is asked for by."""
    config = args.deepspeed if isinstance(args.deepspeed, dict) else {}
    return {
        "ds_preset": args.ds_preset,
        "ZeRO stage": zero_stage(config),
        "offload of the optimizer": get_key(config, "zero_optimization.offload_optimizer.device", "none"),
        "offload of the weights": get_key(config, "zero_optimization.offload_param.device", "none"),
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
    }


def differences(settings: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """One problem that names each setting in which ranks differ, with the ranks of each value; [] if none do."""
    parts = []
    for name in settings[0]:
        by_value: dict[Any, list[int]] = {}
        for rank, one in enumerate(settings):
            by_value.setdefault(one[name], []).append(rank)
        if len(by_value) > 1:
            said = " and ".join(f"{value} on {spans(found)}" for value, found in by_value.items())
            parts.append(f"{name} is {said}")
    if not parts:
        return []
    return [
        Problem(
            f"the ranks are not set up alike: {'; '.join(parts)}",
            "the same command on every machine, with --ds_preset NAME instead of auto and --ds_speed "
            "no_keep_activations; or the same calibration and records on every machine (hf-dsvllm doctor --calibrate)",
        )
    ]


def spans(found: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-7, 9`."""
    parts: list[list[int]] = []
    for rank in found:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank {text}" if len(found) == 1 else f"ranks {text}"
