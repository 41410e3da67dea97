"""Under ZeRO-3, a decoder layer's weights as one unit: gathered before the layer, let go of after it.

DeepSpeed (0.19.8) has hooks around every module that holds weights, eleven in a layer of Llama's kind, forward and
backward.  Its leaf modules (`set_z3_leaf_modules`) have theirs around the whole: 36 tiny layers on a CPU took 0.37 s a
step instead of 0.62, 0.11 of it the model itself, with the same losses (docs/lab-notes.md).
"""

from __future__ import annotations

from typing import Any

from hf_dsvllm.outcome import plain_model, shards_weights

__all__ = ["gather_whole", "why_not"]

# DeepSpeed's default `stage3_max_live_parameters`: what may be gathered at once
MOST_PARAMETERS = 1_000_000_000
PREFETCH = "stage3_prefetch_bucket_size"


def why_not(trainer: Any) -> str | None:
    """Why layers are not taken whole; None where they can be."""
    if not shards_weights(trainer):
        return "no weights are sharded: it is for ZeRO-3"
    zero = zero_settings(trainer)
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "weights on NVMe pass through a few buffers, too few for a layer's"
    if zero.get("leaf_module") or zero.get("stage3_module_granularity_threshold"):
        return "the DeepSpeed configuration says which modules are gathered whole"
    layers = layers_of(trainer)
    if not layers:
        return "the model does not name the class of its layers"
    largest = max(map(parameters_of, layers))
    if largest > MOST_PARAMETERS:
        return f"a layer has {largest:,} parameters, more than DeepSpeed gathers at once"
    return None


def gather_whole(trainer: Any) -> str:
    """Do so, and fetch the next layer while one computes; before the trainer's engine is made."""
    from deepspeed.utils import set_z3_leaf_module

    layers = layers_of(trainer)
    for layer in layers:
        set_z3_leaf_module(layer, True)
    zero, largest = zero_settings(trainer), max(map(parameters_of, layers))
    if zero.get(PREFETCH) == "auto":
        zero[PREFETCH] = largest
    return f"{len(layers)} layers are gathered whole, {largest:,} parameters at a time"


def zero_settings(trainer: Any) -> dict[str, Any]:
    """`zero_optimization` of the live DeepSpeed configuration."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    found: dict[str, Any] = {} if plugin is None else plugin.hf_ds_config.config.get("zero_optimization", {})
    return found


def layers_of(trainer: Any) -> list[Any]:
    """The repeated layers of the model, by the names that it gives for device maps, but not those inside of others."""
    model = plain_model(trainer)
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    inside = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inside]


def parameters_of(layer: Any) -> int:
    """Parameters of a layer, sharded or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in layer.parameters())
