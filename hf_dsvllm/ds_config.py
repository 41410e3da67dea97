"""`Preset` + `RunShape` → the DeepSpeed JSON.

The dictionary leaves to the Trainer what the Trainer knows (`"auto"` for batch sizes, clipping, precision, bucket sizes
that follow the hidden size) and fixes everything else, so that the JSON can be saved and used without this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from hf_dsvllm.presets import Preset

__all__ = [
    "NVME_BUFFERS",
    "RunShape",
    "build",
    "explain",
    "get_key",
    "leaves",
    "set_key",
    "swap_buffer_elements",
    "zero_stage",
]

# Elements of the largest parameter when the model is not known: a 152k x 8192 embedding has 1.25e9.
_NVME_BUFFER_ELEMENTS_UNKNOWN_MODEL = 1_300_000_000
NVME_BUFFERS = 5

# Why `build` sets what no preset names; those of presets stand in the catalogue.
_WHY = {
    "bf16.enabled": "as --bf16 says",
    "fp16.enabled": "as --fp16 says",
    "train_micro_batch_size_per_gpu": "as --per_device_train_batch_size says",
    "gradient_accumulation_steps": "as --gradient_accumulation_steps says",
    "train_batch_size": "the product of both and the number of processes",
    "gradient_clipping": "as --max_grad_norm says; omitted, DeepSpeed clips at 1.0 whatever that is",
    "offload_optimizer.device": "where the optimizer's states and its step are, instead of on the GPU",
    "offload_param.device": "where weights are between their uses, instead of on the GPU",
    "nvme_path": "as --nvme_path says",
    "buffer_size": "elements: one rank's part of the largest parameter must fit in, or DeepSpeed stops in an assertion",
    "buffer_count": "parts in host memory at a time, DeepSpeed's default",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunShape:
    """What a DeepSpeed configuration depends on besides its preset.

    `largest_parameter` is in elements (for NVMe swap buffers), None when the model is not known yet.
    """

    world_size: int = 1
    gpus_per_node: int = 1
    device: Literal["cuda", "cpu"] = "cuda"
    nvme_path: Path | None = None
    largest_parameter: int | None = None

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.gpus_per_node < 1:
            raise ValueError(f"world_size={self.world_size} and gpus_per_node={self.gpus_per_node} must be at least 1")


def build(preset: Preset, shape: RunShape) -> dict[str, Any] | None:
    """The DeepSpeed configuration of `preset` on `shape`, or None where the preset does without DeepSpeed."""
    if preset.zero_stage is None:
        return None
    config: dict[str, Any] = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        # Omitted, DeepSpeed clips at 1.0 whatever max_grad_norm says.
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": preset.zero_stage},
    }
    for setting in preset.deepspeed:
        value = shape.gpus_per_node if setting.value == "gpus_per_node" else setting.value
        set_key(config, setting.key, value)
    _add_offload(config, preset, shape)
    if shape.device == "cpu":
        _adapt_to_cpu(config)
    return config


def explain(preset: Preset, config: dict[str, Any] | None) -> list[tuple[str, Any, str]]:
    """(dotted key, value, why) for every value of the configuration that `build` made of `preset`, in its order."""
    by_preset = {setting.key: setting.why for setting in preset.deepspeed}
    return [(key, value, _why(key, value, preset, by_preset)) for key, value in leaves(config or {})]


def _why(key: str, value: Any, preset: Preset, by_preset: Mapping[str, str]) -> str:
    block, _, last = key.rpartition(".")
    if key == "zero_optimization.stage":
        return f"shards {preset.shards}"
    if last == "overlap_comm" and not value:
        return "gloo has no streams to overlap with"
    if last == "pin_memory":
        return "copies at the full rate of the host link" if value else "needs a CUDA driver, which is not here"
    return by_preset.get(key) or _WHY.get(key) or _WHY.get(f"{block.rpartition('.')[2]}.{last}") or _WHY[last]


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a DeepSpeed dictionary that is no dictionary itself."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _add_offload(config: dict[str, Any], preset: Preset, shape: RunShape) -> None:
    # Pinned host memory needs a CUDA driver; on a CPU-only machine it would only cost memory.
    pin = shape.device == "cuda"
    for name, device in (("offload_optimizer", preset.offload_optimizer), ("offload_param", preset.offload_param)):
        if device == "none":
            continue
        offload: dict[str, Any] = {"device": device, "pin_memory": pin}
        if device == "nvme":
            offload["nvme_path"] = str(shape.nvme_path)
            if name == "offload_param":
                elements = shape.largest_parameter or _NVME_BUFFER_ELEMENTS_UNKNOWN_MODEL
                offload["buffer_size"] = swap_buffer_elements(elements, shape.world_size)
                offload["buffer_count"] = NVME_BUFFERS
        config["zero_optimization"][name] = offload


def swap_buffer_elements(largest_parameter: int, world_size: int) -> int:
    """`offload_param.buffer_size`: room for one rank's part of the largest parameter, in elements.

    A part larger than the buffer is an assertion deep inside DeepSpeed's swapper; each rank allocates `NVME_BUFFERS`.
    """
    return max(100_000_000, -(-largest_parameter // world_size) + 1024)


def _adapt_to_cpu(config: dict[str, Any]) -> None:
    """gloo has no streams to overlap with."""
    if "overlap_comm" in config["zero_optimization"]:
        config["zero_optimization"]["overlap_comm"] = False


def set_key(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, making the missing ones."""
    *parents, last = dotted.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def get_key(config: dict[str, Any], dotted: str, default: Any = None) -> Any:
    """The value at `a.b.c`, or `default` where a level is missing."""
    value: Any = config
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def zero_stage(config: dict[str, Any] | None) -> int:
    """The ZeRO stage of a DeepSpeed dictionary; 0 where none is named."""
    stage = get_key(config or {}, "zero_optimization.stage", 0)
    return stage if isinstance(stage, int) else 0
