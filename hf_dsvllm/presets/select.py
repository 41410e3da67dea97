"""Choosing a preset by name: the registry, nearest names, composition, and what the installed DeepSpeed can run."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_dsvllm.errors import PresetError
from hf_dsvllm.presets import catalogue
from hf_dsvllm.presets.preset import Preset

ONEBIT_MODULE = "runtime/fp16/onebit"

_FACTORIES: dict[str, Callable[[], Preset]] = {
    "none": catalogue.none,
    "ddp": catalogue.ddp,
    "zero1": catalogue.zero1,
    "zero2": catalogue.zero2,
    "zero2_offload": catalogue.zero2_offload,
    "zero3": catalogue.zero3,
    "zero3_offload_optimizer": catalogue.zero3_offload_optimizer,
    "zero3_offload": catalogue.zero3_offload,
    "zero3_nvme": catalogue.zero3_nvme,
    "lora": catalogue.lora,
    "qlora": catalogue.qlora,
    "lora_zero2": lambda: compose(catalogue.zero2(), catalogue.lora(), name="lora_zero2"),
    "qlora_zero2": lambda: compose(catalogue.zero2(), catalogue.qlora(), name="qlora_zero2"),
    "qlora_zero3": lambda: compose(catalogue.zero3(), catalogue.qlora(), name="qlora_zero3"),
    "zero2_lowmem": catalogue.zero2_lowmem,
    "long_context": catalogue.long_context,
    "zero3_hpz": catalogue.zero3_hpz,
    "onebit_adam": lambda: catalogue.onebit("onebit_adam", "OneBitAdam", "freeze_step", 20, 10),
    "onebit_lamb": lambda: catalogue.onebit("onebit_lamb", "OneBitLamb", "freeze_step", 24, 16),
    "zero_one_adam": lambda: catalogue.onebit("zero_one_adam", "ZeroOneAdam", "var_freeze_step", 24, 14),
}


def preset_names() -> tuple[str, ...]:
    """All names, in the order they are listed."""
    return tuple(_FACTORIES)


def every_preset() -> tuple[Preset, ...]:
    """Every preset in listing order, also those the installed DeepSpeed no longer has the optimizer for."""
    return tuple(factory() for factory in _FACTORIES.values())


def available_presets() -> tuple[Preset, ...]:
    """Every preset the installed DeepSpeed can run, in listing order."""
    return tuple(preset for preset in every_preset() if not preset.needs_onebit or deepspeed_has_onebit())


def get_preset(name: str) -> Preset:
    """The preset called `name`, or a composition of one with `lora` or `qlora` (`zero3+lora`).

    Raises PresetError for an unknown name (with the nearest ones), for a composition that makes no sense, and for
    an optimizer the installed DeepSpeed no longer has.
    """
    parts = [part.strip() for part in name.lower().replace("-", "_").split("+")]
    if parts[0].split(":")[0].strip() == "auto":
        raise PresetError(
            "preset 'auto' is chosen when a script of this package makes its arguments. Here, name the preset that "
            "`hf-dsvllm plan MODEL` chooses."
        )
    for part in parts:
        if part not in _FACTORIES:
            raise PresetError(_unknown(part))
    if len(parts) > 2:
        raise PresetError(f"preset {name!r} joins {len(parts)} presets; join one with lora or qlora, as in zero3+lora")
    presets = [_FACTORIES[part]() for part in parts]
    preset = presets[0] if len(presets) == 1 else compose(*_ordered(name, presets))
    if preset.needs_onebit and not deepspeed_has_onebit():
        raise PresetError(
            f"preset {preset.name!r} needs an optimizer that DeepSpeed removed: {installed_deepspeed()} is installed, "
            f"{catalogue.LAST_DEEPSPEED_WITH_ONEBIT} is the last release that has it (DeepSpeed #8489, #8490). "
            f'Fix: pip install "deepspeed<={catalogue.LAST_DEEPSPEED_WITH_ONEBIT}", or use zero2.'
        )
    return preset


def compose(base: Preset, adapter: Preset, *, name: str | None = None) -> Preset:
    """`base` (how the run is distributed) with `adapter` (lora or qlora) on top.

    Under ZeRO the frozen weights are neither sharded nor offloaded below stage 3; a 4-bit model is not sharded while
    loading at any stage, so every GPU must hold it whole once.
    """
    name = name or f"{base.name}+{adapter.name}"
    quantised = adapter.adapter == "qlora"
    if quantised and base.offload_param != "none":
        raise PresetError(
            f"preset {name!r}: 4-bit weights cannot be offloaded to {base.offload_param} by ZeRO-3. "
            "Fix: zero3_offload_optimizer+qlora, or zero3_offload+lora."
        )
    if base.needs_onebit or base.name == "zero2_lowmem":
        raise PresetError(f"preset {name!r}: {base.name} is for full fine-tuning. Fix: zero2+{adapter.name}.")
    if base.adapter or not adapter.adapter:
        raise PresetError(f"preset {name!r}: join a full preset with lora or qlora, as in zero3+lora.")
    weights = "4-bit" if quantised else "16-bit"
    return dataclasses.replace(
        base,
        name=name,
        summary=f"{adapter.name} adapters on a frozen {weights} model; {base.summary}",
        shards=base.shards.replace("optimizer states", "adapter optimizer states")
        if base.uses_deepspeed
        else "nothing",
        lives=f"{base.lives}, P = adapter parameters; frozen weights: {_frozen_bytes(base, quantised)}",
        adapter=adapter.adapter,
        arguments=(*base.arguments, *(s for s in adapter.arguments if not base.uses_deepspeed)),
        constraints=tuple(c for c in (*base.constraints, *adapter.constraints) if c != catalogue.UNSHARDED),
    )


def deepspeed_has_onebit() -> bool:
    """Whether the installed DeepSpeed still ships the 1-bit optimizers; looks at its files, imports nothing."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        return False
    return (Path(next(iter(spec.submodule_search_locations))) / ONEBIT_MODULE).is_dir()


def installed_deepspeed() -> str:
    """`DeepSpeed 0.19.8`, or that none is installed."""
    try:
        return f"DeepSpeed {importlib.metadata.version('deepspeed')}"
    except importlib.metadata.PackageNotFoundError:
        return "no DeepSpeed"


def _ordered(name: str, presets: Iterable[Preset]) -> tuple[Preset, Preset]:
    """Put the adapter last, so that `lora+zero3` means `zero3+lora`."""
    plain = [preset for preset in presets if not preset.adapter]
    adapters = [preset for preset in presets if preset.adapter]
    if len(plain) != 1 or len(adapters) != 1 or adapters[0].name not in ("lora", "qlora"):
        raise PresetError(f"preset {name!r}: join one full preset with lora or qlora, as in zero3+lora.")
    return plain[0], adapters[0]


def _frozen_bytes(base: Preset, quantised: bool) -> str:
    per_parameter = "0.52 bytes a parameter" if quantised else "2 bytes a parameter"
    if base.zero_stage != 3:
        return f"{per_parameter} on every GPU"
    return f"{per_parameter} / N after start" + (" (whole on each GPU while loading)" if quantised else "")


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, preset_names(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"presets: {', '.join(preset_names())}."
    return f"unknown preset {name!r}; {hint} List them with: hf-dsvllm presets"
