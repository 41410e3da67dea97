"""liger-kernel's norms, rotation and gated activation in one model, on GPUs; the loss stays the trainer's own.

liger-kernel patches a model and, beside it, the names of the transformers module that made it: every model of that
kind in the process, wherever it lies.  Its kernels read GPU memory alone, and an export compares models on the CPU; so
what it patched beside the model is put back, and functions choose by where their tensors are.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from hf_dsvllm.features import FUSED_ACTIVATIONS, FUSED_TYPES

__all__ = ["INSTALL", "use_kernels", "why_no_kernels"]

INSTALL = "liger-kernel is not installed: pip install 'hf-dsvllm[fused]'"


def why_no_kernels(model: Any, on_gpu: bool) -> str | None:
    """What keeps these kernels from a model, None if nothing does."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in FUSED_TYPES:
        return f"it is for {', '.join(sorted(FUSED_TYPES))}, and this is {kind}"
    if config.hidden_act not in FUSED_ACTIVATIONS:
        return f"its activation is silu, and this model's is {config.hidden_act}"
    if not on_gpu:
        return "its kernels run on GPUs"
    return INSTALL if importlib.util.find_spec("liger_kernel") is None else None


def use_kernels(model: Any) -> None:
    """Patch `model`, a causal language model for which `why_no_kernels` has no reason, and nothing beside it."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    made_by = {kind.__module__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")}
    before = {name: dict(vars(sys.modules[name])) for name in made_by}
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    for module, names in before.items():
        for name, own in names.items():
            patched = getattr(sys.modules[module], name)
            if patched is not own:
                setattr(sys.modules[module], name, own if isinstance(own, type) else _by_place(own, patched))


def _by_place(own: Callable[..., Any], patched: Callable[..., Any]) -> Callable[..., Any]:
    """`patched` where the first argument lies on a GPU, else `own`."""

    @functools.wraps(own)
    def chosen(first: Any, *args: Any, **kwargs: Any) -> Any:
        return (patched if first.is_cuda else own)(first, *args, **kwargs)

    return chosen
