"""What the Trainer's optimizers (`--optim`) keep in memory for each parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["ADAM", "ROUNDED", "STATE_BYTES", "optimizer_of", "state_bytes"]

ADAM = "adamw_torch_fused"  # the Trainer's own default
ROUNDED = frozenset((ADAM, "adamw_torch"))  # that learn on bf16 master weights (hf_dsvllm.rounding)
# Bytes of state for each parameter that is stepped in fp32: moments of 4 bytes, or of 1 in 8 bit; Adafactor's rows and
# columns, and bitsandbytes' scale of each 256 elements, are next to nothing.  Names: transformers' OptimizerNames.
STATE_BYTES: Mapping[str, float] = {
    **dict.fromkeys(("adamw_torch", ADAM, "stable_adamw", "paged_adamw_32bit"), 8.0),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), 8.0),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 12.0),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop"), 4.0),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_32bit", "schedule_free_sgd"), 4.0),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3.0),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit", "adamw_torch_4bit"), 1.0),
    **dict.fromkeys(("sgd", "adafactor"), 0.0),
}
MOMENTUM = re.compile(r"momentum\s*=\s*0*\.?0*[1-9]")


def optimizer_of(args: Any) -> str:
    """The name of `args.optim`, of an enumeration or a string; SGD with momentum is "sgd momentum"."""
    optim = getattr(args, "optim", ADAM)  # a dry run knows what the command line says alone
    name = str(getattr(optim, "value", optim))
    return "sgd momentum" if name == "sgd" and MOMENTUM.search(str(args.optim_args or "")) else name


def state_bytes(name: str, zero_stage: int | None = None) -> float:
    """Of an optimizer by its name; one that is not known is taken for Adam.

    Adafactor has rows and columns of matrices alone; ZeRO steps flat pieces, for which it keeps a moment of 4 bytes.
    """
    if name == "sgd momentum" or (name == "adafactor" and zero_stage):
        return 4.0
    return STATE_BYTES.get(name, STATE_BYTES[ADAM])
