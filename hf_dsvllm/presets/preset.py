"""What a preset is: frozen values, each with the reason for it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

__all__ = ["Adapter", "Device", "Preset", "Setting"]

Device = Literal["none", "cpu", "nvme"]
Adapter = Literal["lora", "qlora"]


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One value a preset sets (a dotted DeepSpeed key or a TrainingArguments field) and why."""

    key: str
    value: Any
    why: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What `--ds_preset NAME` stands for.

    `zero_stage` is None where DeepSpeed is not used at all.  `deepspeed` holds settings below the top level of the
    DeepSpeed JSON, dotted; `arguments` holds defaults for TrainingArguments fields the user left alone.
    """

    name: str
    summary: str
    shards: str
    lives: str
    zero_stage: int | None = None
    offload_optimizer: Device = "none"
    offload_param: Device = "none"
    adapter: Adapter | None = None
    deepspeed: tuple[Setting, ...] = ()
    arguments: tuple[Setting, ...] = ()
    constraints: tuple[str, ...] = ()
    min_processes: int = 1
    sequence_parallel: bool = False
    experimental: bool = False
    needs_onebit: bool = False

    @property
    def uses_deepspeed(self) -> bool:
        return self.zero_stage is not None

    @property
    def needs_nvme(self) -> bool:
        return "nvme" in (self.offload_optimizer, self.offload_param)
