"""A frozen linear layer with its LoRA adapter as one operation: fewer passes over large tensors than layer by layer.

PEFT's layer computes `result + lora_B(lora_A(x)) * scaling` with a tensor of the output's size after each step, and
autograd adds the two gradients of `x`.  In reads and writes of a tensor of the layer's output or input that is 7
forward and 10 backward; here the last product of either direction is added to what is there: 3 and 6.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable

__all__ = ["FusedLinear", "fuse", "why_not_fused"]


class _Fused:
    """The forward pass in place of PEFT's own, which is called where this one cannot do it.

    x [..., in] -> [..., out], with an adapter in the dtype of the computation, or of any under autocast.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's."""
        names, autocast = self.active_adapters, torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        usual = args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or _changed(self, names[0])
        if usual or not _in_dtype(self, names[0], x, dtype, autocast):
            made: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return made
        down, up = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        dropout, x = self.lora_dropout[names[0]], x.to(dtype)
        dropped = dropout(x).reshape(-1, x.shape[-1]) if dropout.training and getattr(dropout, "p", 0.0) > 0 else None
        flat, trains = x.reshape(-1, x.shape[-1]), torch.is_grad_enabled()
        made = _LowRankLinear.apply(
            flat, dropped, self.base_layer, down.to(dtype), up.to(dtype), self.scaling[names[0]], trains
        )
        return made.view(*x.shape[:-1], made.shape[-1])


class FusedLinear(_Fused, Linear):  # type: ignore[misc]
    """PEFT's LoRA on a linear layer in 16 or 32 bit."""


KINDS: dict[type, type] = {Linear: FusedLinear}
BASES: tuple[type, ...] = (torch.nn.Linear,)
try:
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit
except ImportError:
    pass
else:

    class FusedLinear4bit(_Fused, Linear4bit):  # type: ignore[misc]
        """PEFT's LoRA on a linear layer in 4 bit."""

    KINDS[Linear4bit] = FusedLinear4bit
    BASES += (bnb.nn.Linear4bit,)


class _LowRankLinear(torch.autograd.Function):
    """`y = base(x) + s (d A') B'`; gradients of x, A [rank, in] and B [out, rank], none of the base.

    x [tokens, in]; `d` is x, or what dropout has made of it; then autograd adds up the gradients of both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        base: torch.nn.Module,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        trains: bool,
    ) -> torch.Tensor:
        made = _of_base(base, x, trains)
        read = x if dropped is None else dropped
        low = read @ down.t()
        made.addmm_(low, up.t(), alpha=scaling)
        ctx.save_for_backward(read, low, down, up)
        ctx.base, ctx.scaling = base, scaling
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [gradient] = gradients
        read, low, down, up = ctx.saved_tensors
        needs_x, needs_dropped, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        of_low = (gradient @ up).mul_(ctx.scaling)
        of_x = of_dropped = None
        if needs_x:
            of_x = gradient @ _weight(ctx.base, gradient.dtype)
            of_x = of_x if needs_dropped else of_x.addmm_(of_low, down)
        if needs_dropped:
            of_dropped = of_low @ down
        of_down = of_low.t() @ read if needs_down else None
        of_up = (gradient.t() @ low).mul_(ctx.scaling) if needs_up else None
        return of_x, of_dropped, None, of_down, of_up, None, None


def _of_base(base: Any, x: torch.Tensor, trains: bool) -> torch.Tensor:
    """What the frozen layer makes of `x`; without gradients bitsandbytes (0.50) would take its kernel for inference."""
    if not (trains and hasattr(base.weight, "quant_state")):
        made: torch.Tensor = base(x)
        return made
    with torch.enable_grad():
        trained: torch.Tensor = base(x.detach().requires_grad_())
    return trained.detach()


def _weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a frozen layer [out, in]; of a 4-bit one as its own backward pass has it."""
    if hasattr(base.weight, "quant_state"):
        found: torch.Tensor = bnb.functional.dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state)
        return found.to(dtype)
    plain: torch.Tensor = base.weight
    return plain.to(dtype)


def _changed(layer: Any, name: str) -> bool:
    """Whether what `why_not_fused` asks for is no longer so: adapters can be added and chosen at any time."""
    base = layer.base_layer
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    missing = name not in layer.lora_A
    return bool(
        missing or hooks or name in layer.lora_variant or layer.lora_B[name].bias is not None
        or any(parameter.requires_grad for parameter in base._parameters.values() if parameter is not None)
    )  # fmt: skip


def _in_dtype(layer: Any, name: str, x: torch.Tensor, dtype: torch.dtype, autocast: bool) -> bool:
    """Whether PEFT would compute in `dtype` and return it: a 4-bit layer always returns its input's dtype."""
    if hasattr(layer.base_layer.weight, "quant_state") and x.dtype != dtype:
        return False
    return autocast or layer.lora_A[name].weight.dtype == dtype


def fuse(layer: Any) -> None:
    """Make one of PEFT's layers one operation; `why_not_fused` must have no reason."""
    layer.__class__ = KINDS[type(layer)]


def why_not_fused(layer: Any) -> str | None:
    """What keeps one of PEFT's layers from being one operation, or None."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if type(layer) not in KINDS or type(layer.base_layer) not in BASES:
        return f"an adapter on {type(layer.base_layer).__name__}"
    if any(name in layer.lora_variant for name in names):
        return "a variant of LoRA such as DoRA"
    if any(layer.lora_B[name].bias is not None for name in names):
        return "an adapter with a bias"
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        return "a layer that is trained itself"
    return None
