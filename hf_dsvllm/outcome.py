"""What became of a speed feature, and what features ask of a trainer."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

__all__ = [
    "Outcome",
    "compiles",
    "deepspeed_settings",
    "has_known_steps",
    "plain_model",
    "shards_weights",
    "zero_settings",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of `features`: `said` is what was done, or with `reason` why nothing was."""

    features: tuple[str, ...]
    said: str = ""
    reason: str | None = None

    def __str__(self) -> str:
        names = ", ".join(self.features)
        return f"speed: {names} left out, because {self.reason}" if self.reason else f"speed: {self.said} ({names})"


def plain_model(trainer: Any) -> Any:
    """The trainer's model without PEFT around it."""
    return trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model


def compiles(trainer: Any) -> bool:
    """Whether the model will be compiled, by arguments or by accelerate's environment."""
    state = getattr(getattr(trainer, "accelerator", None), "state", None)
    backend = getattr(getattr(state, "dynamo_plugin", None), "backend", None)
    return bool(trainer.args.torch_compile) or getattr(backend, "value", "NO") != "NO"


def has_known_steps(trainer: Any) -> bool:
    """Whether the loss and a step are transformers' or TRL's, which call the trained model once a backward pass."""
    steps = (getattr(type(trainer), name, None) for name in ("compute_loss", "training_step"))
    return all(inspect.unwrap(step).__module__.split(".")[0] in ("transformers", "trl") for step in steps if step)


def shards_weights(trainer: Any) -> bool:
    """Whether ZeRO-3 has its weights, or will have them once its engine is made."""
    plugin = getattr(getattr(trainer, "accelerator", None), "state", None)
    stage = getattr(getattr(plugin, "deepspeed_plugin", None), "zero_stage", None)
    return stage == 3 or any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())


def deepspeed_settings(trainer: Any) -> dict[str, Any]:
    """The live DeepSpeed configuration; empty without DeepSpeed."""
    state = getattr(getattr(trainer, "accelerator", None), "state", None)
    plugin = getattr(state, "deepspeed_plugin", None)
    found: dict[str, Any] = {} if plugin is None else plugin.deepspeed_config
    return found


def zero_settings(trainer: Any) -> dict[str, Any]:
    """`zero_optimization` of the live DeepSpeed configuration; empty without DeepSpeed."""
    found: dict[str, Any] = deepspeed_settings(trainer).get("zero_optimization", {})
    return found
