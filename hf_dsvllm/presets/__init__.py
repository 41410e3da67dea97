"""Named presets for `--ds_preset`.

A preset says what is sharded over the data-parallel ranks, where it lives, and what of the Trainer's arguments it
changes.  It holds no model and no machine: `hf_dsvllm.ds_config.build` joins it with a `RunShape` to the DeepSpeed
JSON, so the same name gives the same behaviour on one GPU and on sixty-four.
"""

from hf_dsvllm.presets.preset import Adapter, Device, Preset, Setting
from hf_dsvllm.presets.select import available_presets, compose, every_preset, get_preset, preset_names

__all__ = [
    "Adapter",
    "Device",
    "Preset",
    "Setting",
    "available_presets",
    "compose",
    "every_preset",
    "get_preset",
    "preset_names",
]
