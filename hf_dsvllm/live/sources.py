"""Which live parameters make which tensor of a checkpoint: plain, 4-bit, adapted, saved whole beside the original."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Source", "conversions", "plain_source", "sources", "why_no_stream"]

CHANGES_MORE = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config")  # of LoraConfig
# The outermost number of a name is its decoder layer's (vLLM groups by the same rule).
LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One tensor to be: `make` computes it once all `parameters` are whole; `group` is its decoder layer, if any."""

    name: str
    parameters: tuple[torch.nn.Parameter, ...]
    make: Callable[[], torch.Tensor]

    @property
    def group(self) -> str | None:
        found = LAYER.match(self.name)
        return None if found is None else found[1]

    @property
    def size_bytes(self) -> int:
        """Of the whole parameters, 4-bit ones as what they are dequantised to."""
        return sum(whole_bytes(parameter) for parameter in self.parameters)


def whole_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter once it is gathered and dequantised."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel() * state.dtype.itemsize)
    return int(getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size())


def plain_source(name: str, parameter: torch.nn.Parameter) -> Source:
    """A parameter as it is."""
    return Source(name=name, parameters=(parameter,), make=lambda: parameter.detach())


def sources(model: Any, *, merge_adapters: bool) -> list[Source]:
    """Every tensor a checkpoint of the (merged) model has, in the order of its modules; tied ones once."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = list(_of_module(base, "", merge_adapters))
    tied = getattr(base, "all_tied_weights_keys", None) or {}
    own = {id(part.parameters[0]) for part in found if part.parameters and part.name not in tied}
    seen: set[int] = set()
    kept = []
    for part in found:
        if part.parameters:
            first = id(part.parameters[0])
            if first in seen or (part.name in tied and first in own):
                continue
            seen.add(first)
        kept.append(part)
    return kept


def _of_module(module: Any, prefix: str, merge: bool) -> Iterator[Source]:
    kind = _adapter_kind(module)
    if kind == "lora":
        base = module.get_base_layer()
        everything = tuple(module.parameters())
        for name, parameter in base.named_parameters(recurse=False):
            whole = everything if name == "weight" and merge else (parameter,)
            # The parameter itself comes first: it is what tied names share.
            whole = (parameter, *(p for p in whole if p is not parameter))
            make = _merged(module, parameter) if name == "weight" and merge else _plain(parameter)
            yield Source(name=f"{prefix}{name}", parameters=whole, make=make)
        return
    if kind == "saved":
        chosen = module.modules_to_save[_active(module)[0]] if merge else module.original_module
        yield from _of_module(chosen, prefix, merge)
        return
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield Source(name=f"{prefix}{name}", parameters=(parameter,), make=_plain(parameter))
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield Source(name=f"{prefix}{name}", parameters=(), make=buffer.detach)
    for name, child in module.named_children():
        yield from _of_module(child, f"{prefix}{name}.", merge)


def _plain(parameter: torch.nn.Parameter) -> Callable[[], torch.Tensor]:
    return lambda: dequantised(parameter)


def _merged(layer: Any, weight: torch.nn.Parameter) -> Callable[[], torch.Tensor]:
    """weight + scaling * B @ A for each active adapter, by PEFT's own formula, added in fp32."""

    def make() -> torch.Tensor:
        whole = dequantised(weight)
        adapters = [name for name in _active(layer) if name in layer.scaling]
        if not adapters:
            return whole
        total = whole.float()
        for name in adapters:
            total = total + layer.get_delta_weight(name).to(device=total.device, dtype=total.dtype)
        return total.to(whole.dtype)

    return make


def dequantised(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A 4-bit weight in the dtype it was quantised from; anything else as it is."""
    if type(parameter).__name__ != "Params4bit" or getattr(parameter, "quant_state", None) is None:
        return parameter.detach()
    import bitsandbytes

    whole: torch.Tensor = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return whole


def _active(layer: Any) -> list[str]:
    names = layer.active_adapters if hasattr(layer, "active_adapters") else layer.active_adapter
    return [names] if isinstance(names, str) else list(names)


def _adapter_kind(module: Any) -> str | None:
    """ "lora", "saved" (modules_to_save), "other" (PEFT's, but not for us), None for a module without adapters."""
    if not any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):  # also what extends PEFT's own
        return None
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return "saved"
    if isinstance(module, LoraLayer):
        return "lora"
    return "other" if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) else None


def why_no_stream(model: Any, *, merge_adapters: bool) -> str | None:
    """Why this model's tensors cannot be named and made one by one, so that it needs a snapshot; None: they can."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _quantisation(base) or _experts(base) or _adapters(model, base, merge_adapters)


def _quantisation(base: Any) -> str | None:
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method))
    if method is None or (name == "bitsandbytes" and getattr(config, "load_in_4bit", False)):
        return None
    return f"its weights are quantised by {name}, and only 4 bit by bitsandbytes is known here"


def _experts(base: Any) -> str | None:
    """Fused experts need transformers' own way back to the checkpoint's names."""
    fused = next((name for name, p in base.named_parameters() if ".experts." in name and dimensions(p) == 3), None)
    if fused is None or conversions(base):
        return None
    return f"{type(base).__name__} fuses its experts ({fused}) and transformers knows no way back"


def dimensions(parameter: torch.nn.Parameter) -> int:
    """Of the whole parameter, of which a shard may be here."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def conversions(base: Any) -> list[Any]:
    """transformers' steps between the model's tensors and the checkpoint's; [] where they are the same."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = getattr(base, "_weight_conversions", None)
    return list(known if known is not None else get_model_conversion_mapping(base, add_legacy=False))


def _adapters(model: Any, base: Any, merge: bool) -> str | None:
    for name, config in (getattr(model, "peft_config", None) or {}).items() if merge else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            return f"adapter {name} is {kind}, and only LoRA can be merged here"
        for setting in CHANGES_MORE:
            if getattr(config, setting, None):
                return f"adapter {name} has {setting}, which changes more than weight + scaling * B @ A"
    odd = [name for name, module in base.named_modules() if _unmergeable(module)]
    if odd:
        return f"{odd[0]} is adapted in a way that is not known here (trainable tokens, parameters, attention)"
    return _tied_apart(base) if merge else None


def _unmergeable(module: Any) -> bool:
    kind = _adapter_kind(module)
    if kind != "lora":
        return kind == "other"
    known = hasattr(module, "get_delta_weight") and hasattr(module.get_base_layer(), "weight")
    return not known or type(module).__name__ in ("ParamWrapper", "MultiheadAttention")


def _tied_apart(base: Any) -> str | None:
    """Adapters on tied weights make two of one; the engine's configuration knows only one."""
    touched = [name for name, module in base.named_modules() if _adapter_kind(module) is not None]
    for pair in (getattr(base, "all_tied_weights_keys", None) or {}).items():
        for name in pair:
            if any(name.startswith(f"{module}.") for module in touched):
                return f"{name.removesuffix('.weight')} is adapted, but tied to another layer that is not"
    return None
