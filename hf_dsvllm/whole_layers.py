"""Under ZeRO-3, a decoder layer's weights as one unit: gathered before the layer, let go of after it.

DeepSpeed (0.19.8) has hooks around every module that holds weights, eleven in a layer of Llama's kind, forward and
backward.  Its leaf modules (`set_z3_leaf_modules`) have theirs around the whole: 36 tiny layers on a CPU took 0.37 s a
step instead of 0.62, 0.11 of it the model itself, with the same losses (docs/lab-notes.md).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from hf_dsvllm.outcome import plain_model, shards_weights, zero_settings

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
    if shares_weights(trainer.model, layers):
        return "layers share weights, whose gradients DeepSpeed would add up in one of them alone"
    return None


def gather_whole(trainer: Any) -> str:
    """Do so, and fetch the next layer while one computes; before the trainer's engine is made."""
    from deepspeed.utils import set_z3_leaf_module

    layers = layers_of(trainer)
    for layer in layers:
        set_z3_leaf_module(layer, True)
        layer.register_forward_pre_hook(with_gradient, with_kwargs=True)
    zero, largest = zero_settings(trainer), max(map(parameters_of, layers))
    if zero.get(PREFETCH) == "auto":
        zero[PREFETCH] = largest
    return f"{len(layers)} layers are gathered whole, {largest:,} parameters at a time"


def layers_of(trainer: Any) -> list[Any]:
    """The stacked layers of the model, of the classes that it names for device maps, but not those inside of others."""
    model = plain_model(trainer)
    names = set(getattr(model, "_no_split_modules", None) or ())  # embeddings and projectors, too
    stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    found = {id(layer): layer for stack in stacks for layer in stack if type(layer).__name__ in names}
    inside = {id(part) for layer in found.values() for part in layer.modules() if part is not layer}
    return [layer for key, layer in found.items() if key not in inside]


def shares_weights(model: Any, layers: list[Any]) -> bool:
    """Whether a weight is in several layers, or in one and outside of all: the reduction of a leaf knows one place."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    own = [id(parameter) for layer in layers for parameter in dict.fromkeys(layer.parameters())]
    within = Counter(
        id(parameter) for layer in layers for _, parameter in layer.named_parameters(remove_duplicate=False)
    )
    return len(set(own)) < len(own) or any(places[key] > within[key] for key in own)


def with_gradient(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's input with a gradient, where its weights have one: a leaf's reduction waits for its input's.

    Without it (adapters behind a frozen embedding, no recompute) torch calls that reduction before the layer's
    backward pass.
    """
    if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    given = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(given, torch.Tensor) or not given.is_floating_point() or given.requires_grad:
        return None
    wanted = given.detach().requires_grad_()
    return ((wanted, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": wanted})


def parameters_of(layer: Any) -> int:
    """Parameters of a layer, sharded or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in layer.parameters())
