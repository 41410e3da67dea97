"""AdamW on bf16 master weights that learns: what bf16 cannot hold is rounded at random, not away.

bf16 has 8 bits of precision: a weight of 0.02 moves in steps of 1.2e-4, and an update of 1e-5 is rounded away, every
time.  A variance that shrinks by a thousandth a step never shrinks.  SmolLM2-135M after 200 steps: loss 2.34 where fp32
master weights reach 0.62.  Rounded up with the probability of what is rounded off, the mean is right:

    round(x) = truncate(bits(x) + u),  u uniform in [0, 2^16)        E[round(x)] = x

(Zamirai et al., Revisiting BFloat16 Training, arXiv:2010.06192.)  AdamW itself is torch's, in fp32, piece by piece.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.optim import adamw
from transformers import TrainerCallback

from hf_dsvllm.outcome import deepspeed_settings

__all__ = ["attach", "round_stochastically", "step"]

logger = logging.getLogger(__name__)

PIECE = 1 << 23  # elements stepped at a time: 0.2 GB of fp32 copies
STATES = ("exp_avg", "exp_avg_sq")


def attach(trainer: Any) -> bool:
    """Where the trainer's DeepSpeed configuration has bf16 master weights; returns whether it has."""
    if not (deepspeed_settings(trainer).get("bf16") or {}).get("bf16_master_weights_and_grads"):
        return False
    trainer.add_callback(_Rounding(trainer))
    return True


class _Rounding(TrainerCallback):
    """DeepSpeed makes its flat weights when training begins."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.deepspeed.basic_optimizer
        if type(optimizer) is not torch.optim.AdamW:
            logger.warning("%s on bf16 master weights: small updates are rounded away", type(optimizer).__name__)
        elif not isinstance(optimizer.step, _Step):
            optimizer.step = _Step(optimizer, args.seed, args.process_index)


class _Step:
    """In place of `optimizer.step`."""

    def __init__(self, optimizer: torch.optim.AdamW, seed: int, rank: int) -> None:
        self._optimizer, self._seed, self._rank = optimizer, seed, rank
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, closure: None = None) -> None:
        for place, group in enumerate(self._optimizer.param_groups):
            for weights in group["params"]:
                if weights.grad is not None:
                    state = self._optimizer.state[weights]
                    step(weights, state, group, self._generator(weights.device, int(state.get("step", 0)), place))

    def _generator(self, device: torch.device, done: int, place: int) -> torch.Generator:
        """Its own numbers for each step, process and group: a resumed run draws those of the uninterrupted one."""
        generator = self._generators.setdefault(device, torch.Generator(device))
        generator.manual_seed(hash((self._seed, done, self._rank, place)) & 0x7FFF_FFFF_FFFF_FFFF)
        return generator


@torch.no_grad()
def step(
    weights: torch.Tensor, state: dict[str, Any], group: dict[str, Any], generator: torch.Generator | None = None
) -> None:
    """AdamW of torch on flat bf16 `weights` and moments, each element in fp32 and rounded at random; in place."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
        state |= {name: torch.zeros_like(weights) for name in STATES}
    assert weights.grad is not None
    kept = [weights.view(-1), *(state[name].view(-1) for name in STATES)]
    for start in range(0, weights.numel(), PIECE):
        parts = [each[start : start + PIECE] for each in kept]
        wide = [part.float() for part in parts]
        adamw.adamw(
            *([each] for each in (wide[0], weights.grad.view(-1)[start : start + PIECE].float(), *wide[1:])),
            max_exp_avg_sqs=[],
            state_steps=[state["step"].clone()],
            fused=weights.device.type == "cuda",
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for part, exact in zip(parts, wide, strict=True):
            round_stochastically(exact, part, generator)
    state["step"] += 1


def round_stochastically(
    exact: torch.Tensor, rounded: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """fp32 `exact` into bf16 `rounded` of the same shape, up or down at random with `exact` as the mean; returns it."""
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    bits = noise.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16))
    return rounded.copy_(torch.where(exact.isfinite(), bits.view(torch.float32), exact))
