"""Under ZeRO-3, a decoder layer's weights as one unit: gathered before the layer, let go of after it.

DeepSpeed (0.19.8) has hooks around every module that holds weights, eleven in a layer of Llama's kind, forward and
backward, and lets Python be no more than two gathers and two reductions ahead of the GPU (`max_ongoing_fetch_events`,
`max_param_reduce_events`).  One matrix at a time, the GPU waits for Python.  Its leaf modules (`set_z3_leaf_modules`)
have their hooks around the whole: 4B on two H200s took 0.686 s a step instead of 1.037, with a larger bucket of
gradients 0.598 (benchmarks/results/2026-11-28-training-speed-scaling-2xH200.md).

What stays gathered.  DeepSpeed decides by `stage3_max_reuse_distance` whether a weight is let go, and counts elements
of the modules on the way to its next use; between ordinary modules leaves count nothing, so the embedding stayed whole
all the time, and with it and the output head (TRL's loss holds on to it) there were more elements than
`stage3_max_live_parameters`, and nothing was fetched ahead (8B on two H200s: 2.4e9 elements gathered).  A distance of
one element keeps what the next module needs, which is a recomputed layer's backward pass, and nothing else; the limit
is what stays and `LAYERS_AT_ONCE` layers.  Frozen weights of a recomputed layer it keeps for the module around that is
in its backward pass, with transformers' models the stack of all layers: with adapters every weight of the model was
whole on every rank at the end (partitioned_param_coordinator.py, update_recompute_parameters).
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import torch

from hf_dsvllm.errors import WiringError
from hf_dsvllm.features import LARGEST_LAYER, LAYERS_AT_ONCE, REDUCED_AT_ONCE, asks_for
from hf_dsvllm.outcome import compiles, has_known_steps, plain_model, shards_weights, zero_settings

__all__ = ["gather_whole", "why_not"]

LIVE, REUSE = "stage3_max_live_parameters", "stage3_max_reuse_distance"


def why_not(trainer: Any) -> str | None:
    """Why layers are not taken whole; None where they can be."""
    if not shards_weights(trainer):
        return "no weights are sharded: it is for ZeRO-3"
    zero = zero_settings(trainer)
    place = (zero.get("offload_param") or {}).get("device", "none")
    if place == "nvme":
        return "weights on NVMe pass through a few buffers, too few for a layer's"
    if place != "none" and not asks_for(getattr(trainer.args, "ds_speed", None), "whole_layers"):
        return "weights lie in host memory, where it was not measured: --ds_speed whole_layers takes them whole"
    if compiles(trainer):
        return "compiled layers were not tried"
    if not has_known_steps(trainer):
        return f"{type(trainer).__name__} has steps of its own: two forward passes before a backward pass would fail"
    if zero.get("leaf_module") or zero.get("stage3_module_granularity_threshold"):
        return "the DeepSpeed configuration says which modules are gathered whole"
    layers = layers_of(trainer)
    if not layers:
        return "the model does not name the class of its layers"
    largest = max(map(parameters_of, layers))
    if largest > LARGEST_LAYER:
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
        layer.register_forward_hook(for_itself)
    largest = max(map(parameters_of, layers))
    settle(zero_settings(trainer), largest, largest_outside(trainer.model, layers), elements_trained(trainer.model))
    return f"{len(layers)} layers are gathered whole, {largest:,} parameters at a time"


def settle(zero: dict[str, Any], layer: int, outside: int, trained: int) -> None:
    """DeepSpeed's settings for layers of `layer` elements beside a matrix of `outside`; a user's own are left alone."""
    filled_in = {"stage3_prefetch_bucket_size": layer, "reduce_bucket_size": min(REDUCED_AT_ONCE, max(1, trained))}
    for key, value in filled_in.items():
        if zero.get(key) == "auto":
            zero[key] = value
    for key, value in {REUSE: 1, LIVE: outside + LAYERS_AT_ONCE * layer}.items():
        if not {key, key.removeprefix("stage3_")} & zero.keys():
            zero[key] = value


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
    """A positional input with a gradient, where a layer's weights have one: a leaf's reduction waits for its input's.

    Without it (adapters behind a frozen embedding, no recompute; layers called by keyword alone) torch calls that
    reduction before the layer's backward pass: it looks at positional inputs.
    """
    if not learns(layer) or any(isinstance(each, torch.Tensor) and each.requires_grad for each in args):
        return None
    index = next((index for index, each in enumerate(args) if continuous(each)), None)
    if index is not None:
        return (*args[:index], args[index].detach().requires_grad_(), *args[index + 1 :]), kwargs
    first = next(iter(inspect.signature(layer.forward).parameters), "")
    name = first if first in kwargs else next((name for name, each in kwargs.items() if continuous(each)), "")
    if args or not continuous(kwargs.get(name)):
        raise refusal(layer, "takes no input that a gradient could pass")
    given = kwargs[name]  # under an older name of the first argument, which transformers takes as well
    given = given if given.requires_grad else given.detach().requires_grad_()
    return (given,), {key: value for key, value in kwargs.items() if key != name}


def for_itself(layer: Any, args: Any, output: Any) -> None:
    """A recomputed layer's frozen weights are kept for its own backward pass, not for that of a module around it."""
    del args
    if learns(layer) and not isinstance(output, (torch.Tensor, tuple)):  # torch would only warn, and no hook be called
        raise refusal(layer, f"returns a {type(output).__name__}, neither a tensor nor a tuple")
    if torch._C._current_graph_task_id() == -1:  # no backward pass is going on; DeepSpeed asks the same
        return
    for parameter in layer.parameters():
        if not parameter.requires_grad and hasattr(parameter, "ds_active_sub_modules"):
            parameter.ds_active_sub_modules.intersection_update({layer.ds_id})


def learns(layer: Any) -> bool:
    """Whether this call of a layer is for a backward pass that trains something of it."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters())


def continuous(given: Any) -> bool:
    """Whether an input may have a gradient."""
    return isinstance(given, torch.Tensor) and given.is_floating_point()


def refusal(layer: Any, why: str) -> WiringError:
    """What stops a layer that cannot be taken whole, before it would learn something wrong."""
    return WiringError(
        f"{type(layer).__name__} {why}: gathered whole, its gradients would be lost. Fix: --ds_speed no_whole_layers"
    )


def parameters_of(layer: Any) -> int:
    """Parameters of a layer, sharded or not."""
    return sum(map(elements, layer.parameters()))


def largest_outside(model: Any, layers: list[Any]) -> int:
    """Elements of the largest parameter that is in no layer: the embedding, or the output head."""
    within = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return max((elements(each) for each in model.parameters() if id(each) not in within), default=0)


def elements_trained(model: Any) -> int:
    """Elements that have gradients."""
    return sum(elements(parameter) for parameter in model.parameters() if parameter.requires_grad)


def elements(parameter: Any) -> int:
    """Of a parameter, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
