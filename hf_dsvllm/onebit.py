"""DeepSpeed's 1-bit optimizers without CuPy, and with a lower bound of what they divide by.

DeepSpeed's NCCL backend for them packs signs with CuPy, which nobody has installed.  Its other backend is torch alone
but for packing bits, which it has compiled for XPUs only: `supply_packer` gives it that.

After their warm-up these optimizers average the signs of the momentum with one scale for all elements, and divide by
the root of a variance that is frozen (1-bit Adam, arXiv:2102.02888; 1-bit LAMB, arXiv:2104.06069; 0/1 Adam,
arXiv:2202.06009).  A weight whose gradient was nearly always zero until then (a token that was never seen) moves by
scale / (sqrt(0) + eps) a step, thousands of its own size.  DeepSpeed leaves that to a mask in the user's script.
`bound_variance` sets v = max(v, FLOOR * mean(v)) once, before the first step with signs: no weight moves more than
1 / sqrt(FLOOR) = 10 times as far as one of mean variance.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

__all__ = ["FLOOR", "attach", "bound_variance", "pack_signs", "supply_packer", "unpack_signs"]

# Largest weight of a tiny model 30 steps after the warm-up, two processes: without a bound 2,816 (1-bit Adam), 12.9
# (LAMB), 3,952 (0/1 Adam); zeros raised to the mean 55.8, 1.1, 7.6; this bound 1.4, 1.1, 1.4, and losses no higher.
FLOOR = 0.01
FROZEN = ("adam_freeze_key", "lamb_freeze_key", "freeze_key")  # DeepSpeed's names, one an optimizer
VARIANCES = ("exp_avg_sq", "exp_avg_sq_fresh")


def attach(trainer: Any) -> None:
    """Both, for a Trainer whose DeepSpeed configuration names one of these optimizers."""
    supply_packer()
    trainer.add_callback(_BoundVariance(trainer))


class _BoundVariance(TrainerCallback):
    """DeepSpeed makes the optimizer when training begins."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bound_variance(self.trainer.deepspeed.basic_optimizer)


def pack_signs(values: torch.Tensor) -> torch.Tensor:
    """Float tensor [8 n] → uint8 [n]: a bit each, first element highest, 1 for zero and above."""
    bits = (values >= 0).view(-1, 8)
    packed = bits[:, 0].to(torch.uint8)
    for place in range(1, 8):
        packed = (packed << 1) | bits[:, place]
    return packed


def unpack_signs(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n] → float32 [8 n] of 1 and -1."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten().float().mul_(2).sub_(1)


class _Packer:
    """What DeepSpeed's compiled operation offers; the counts and ranks it is given say nothing new."""

    @staticmethod
    def packbits(values: torch.Tensor, count: int, rank: int) -> torch.Tensor:
        return pack_signs(values)

    @staticmethod
    def unpackbits(packed: torch.Tensor, count: int, rank: int) -> torch.Tensor:
        return unpack_signs(packed)


class PackbitsBuilder:
    """In the place of DeepSpeed's builder: nothing to build."""

    def load(self) -> type[_Packer]:
        return _Packer


def supply_packer() -> None:
    """Let `comm_backend_name: compressed` work on CUDA; an operation that DeepSpeed has for this device stays."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import op_builder

    theirs = get_accelerator().get_op_builder("PackbitsBuilder")
    if theirs is None or theirs.__name__ == "NotImplementedBuilder":
        op_builder.PackbitsBuilder = PackbitsBuilder


def bound_variance(optimizer: Any) -> None:
    """Have `optimizer`, a 1-bit optimizer of DeepSpeed's, raise small variances before its first step with signs.

    Warm-up steps are exact and alike on all ranks, so every rank computes the same bound.  A checkpoint taken after
    it holds raised variances, which a resumed run raises once more to no effect.
    """

    def before_step(of: Any, *_: Any) -> None:
        if not _sends_signs(of):
            return
        handle.remove()
        for state in of.state.values():
            floor = state["exp_avg_sq"].mean() * FLOOR
            for name in VARIANCES:
                if name in state:
                    state[name].clamp_(min=floor)

    handle = optimizer.register_step_pre_hook(before_step)


def _sends_signs(optimizer: Any) -> bool:
    """Frozen, or (0/1 Adam) between two updates of a variance that is updated ever more rarely."""
    if any(getattr(optimizer, name, False) for name in FROZEN):
        return True
    return any(state.get("var_interval", 1) > 1 for state in optimizer.state.values())
