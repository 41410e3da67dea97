"""A frozen linear layer with its LoRA adapter as one operation: fewer passes over large tensors than layer by layer.

PEFT's layer computes `result + lora_B(lora_A(x)) * scaling` with a tensor of the output's size after each step, and
autograd adds the two gradients of `x`.  In reads and writes of a tensor of the layer's output or input that is 7
forward and 10 backward; here the last product of either direction is added to what is there: 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["FusedAdapter", "why_not_fused"]


class FusedAdapter:
    """The forward pass of one of PEFT's LoRA layers, in place of its own, which is called where this one cannot.

    x [..., in] -> [..., out], with adapters in the dtype of the computation, or of any under autocast.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.original: Callable[..., torch.Tensor] = layer.forward
        self.weight = _weight_of(layer.base_layer)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.layer
        [name] = layer.active_adapters if len(layer.active_adapters) == 1 else [None]
        down = layer.lora_A[name].weight if name in layer.lora_A else None
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        usual = layer.disable_adapters or layer.merged or args or kwargs or down is None
        if usual or (down.dtype != dtype and not torch.is_autocast_enabled(x.device.type)):
            return self.original(x, *args, **kwargs)
        up, dropout, x = layer.lora_B[name].weight, layer.lora_dropout[name], x.to(dtype)
        dropped = dropout(x) if dropout.training and getattr(dropout, "p", 0.0) > 0 else None
        made: torch.Tensor = _LowRankLinear.apply(
            x, dropped, layer.base_layer, self.weight, down.to(dtype), up.to(dtype), layer.scaling[name]
        )
        return made


class _LowRankLinear(torch.autograd.Function):
    """`y = base(x) + s (d A') B'`; gradients of x, A [rank, in] and B [out, rank], none of the base.

    `d` is x, or what dropout has made of it; then autograd adds up the gradients of both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        base: Callable[[torch.Tensor], torch.Tensor],
        weight: Callable[[torch.dtype], torch.Tensor],
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        made = base(flat)
        read = flat if dropped is None else dropped.reshape(flat.shape)
        low = read @ down.t()
        made.addmm_(low, up.t(), alpha=scaling)
        ctx.save_for_backward(read, low, down, up)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        return made.view(*x.shape[:-1], made.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        read, low, down, up = ctx.saved_tensors
        needs_x, needs_dropped, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        of_low = (gradient @ up).mul_(ctx.scaling)
        of_x = of_dropped = None
        if needs_x:
            of_x = gradient @ ctx.weight(gradient.dtype)
            of_x = (of_x if needs_dropped else of_x.addmm_(of_low, down)).view(ctx.shape)
        if needs_dropped:
            of_dropped = (of_low @ down).view(ctx.shape)
        of_down = of_low.t() @ read if needs_down else None
        of_up = (gradient.t() @ low).mul_(ctx.scaling) if needs_up else None
        return of_x, of_dropped, None, None, of_down, of_up, None


def _weight_of(base: Any) -> Callable[[torch.dtype], torch.Tensor]:
    """The weight of a frozen layer [out, in] in the dtype asked for; of a 4-bit one as its own backward pass has it."""
    if not hasattr(base.weight, "quant_state"):
        return lambda dtype: base.weight.to(dtype)

    def dequantised(dtype: torch.dtype) -> torch.Tensor:
        import bitsandbytes as bnb

        found: torch.Tensor = bnb.functional.dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state)
        return found.to(dtype)

    return dequantised


def why_not_fused(layer: Any) -> str | None:
    """What keeps one of PEFT's layers from a `FusedAdapter`, or None."""
    from peft.tuners.lora import Linear

    kinds: tuple[type, ...] = (Linear,)
    try:
        from peft.tuners.lora.bnb import Linear4bit

        kinds += (Linear4bit,)
    except ImportError:
        pass
    if type(layer) not in kinds or type(layer.base_layer).__name__ not in ("Linear", "Linear4bit"):
        return f"an adapter on {type(layer.base_layer).__name__}"
    if any(name in layer.lora_variant for name in layer.active_adapters):
        return "a variant of LoRA such as DoRA"
    if any(layer.lora_bias.get(name) or layer.lora_B[name].bias is not None for name in layer.active_adapters):
        return "an adapter with a bias"
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        return "a layer that is trained itself"
    return None
