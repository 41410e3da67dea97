"""The exact DeepSpeed JSON of every preset as files: `python -m tests.golden.regenerate`, then review the diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_dsvllm.ds_config import RunShape, build
from hf_dsvllm.presets import Preset, every_preset, get_preset

FOLDER = Path(__file__).resolve().parent / "ds"
WORLD_SIZES = (1, 4)
NVME_PATH = Path("/nvme")


def golden_presets() -> tuple[Preset, ...]:
    """Every preset that brings a DeepSpeed configuration, and one joined with +."""
    return (*(preset for preset in every_preset() if preset.uses_deepspeed), get_preset("zero3+lora"))


def golden_configs() -> dict[str, dict[str, Any]]:
    """File name -> configuration on one GPU and on four of one host."""
    configs = {}
    for preset in golden_presets():
        for world_size in WORLD_SIZES:
            if world_size < preset.min_processes:
                continue
            nvme = NVME_PATH if preset.needs_nvme else None
            shape = RunShape(world_size=world_size, gpus_per_node=world_size, device="cuda", nvme_path=nvme)
            config = build(preset, shape)
            assert config is not None
            configs[f"{preset.name}-{world_size}.json"] = config
    return configs


def main() -> None:
    """Write every file anew and remove those of presets that are gone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    configs = golden_configs()
    for stale in {path.name for path in FOLDER.glob("*.json")} - set(configs):
        (FOLDER / stale).unlink()
    for name, config in configs.items():
        (FOLDER / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{len(configs)} files in {FOLDER}")


if __name__ == "__main__":
    main()
