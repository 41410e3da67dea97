"""The dtype of each tensor of a model that is written in 16 bit: not all of them may be rounded."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

__all__ = ["Precision", "held_in_fp32"]

HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """`dtype` for all floating-point tensors but those in fp32: the ones that `held` (see `held_in_fp32`) matches.

    A router's bias decides between experts by differences far below what bf16 can tell apart (measured on a random
    DeepSeek-V3: rounding it changed a fifth of the greedy tokens).
    """

    dtype: torch.dtype
    held: tuple[str, ...] = ()

    def of(self, name: str, stored: torch.dtype) -> torch.dtype:
        """The dtype of tensor `name`, which is `stored` now; whole numbers stay what they are."""
        if not stored.is_floating_point:
            return stored
        holds = self.dtype in HALVES and any(re.search(pattern, name) for pattern in self.held)
        return torch.float32 if holds else self.dtype

    def cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in its dtype, rounded once; the same tensor if it is in it already."""
        return tensor.to(self.of(name, tensor.dtype))


def held_in_fp32(model: Any) -> tuple[str, ...]:
    """What transformers keeps in fp32 when it loads this model in 16 bit, as regular expressions for names.

    Its own list, `_keep_in_fp32_modules_strict`, with `*` for anything (read in 5.19, modeling_utils.py and
    core_model_loading.py).
    """
    names = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return tuple(sorted(name.replace("*", ".*") for name in names))
