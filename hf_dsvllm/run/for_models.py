"""What happens to the models a script loads: 4-bit weights for QLoRA, shards for ZeRO-3 wherever the line stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_dsvllm.console import say
from hf_dsvllm.ds_config import RunShape, build
from hf_dsvllm.launch import become_single_process, read_launch
from hf_dsvllm.presets import Preset
from hf_dsvllm.run.for_arguments import ForArguments
from hf_dsvllm.run.lines import script_line
from hf_dsvllm.run.state import Run

__all__ = ["ForModels", "early_config"]


class ForModels:
    """Looks at every `from_pretrained` of the script's own; those in a trainer's constructor are the trainer's."""

    def __init__(self, run: Run, arguments: ForArguments) -> None:
        self._run = run
        self._arguments = arguments
        self._early: Any = None

    def shard_from_here_on(self) -> None:
        """Under ZeRO-3, shard models also before the arguments are made.

        transformers' own way for DeepSpeed without a Trainer: a configuration kept alive.  The arguments replace it.
        """
        if not self._run.shards_weights or self._run.preset is None:
            return
        import torch
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        become_single_process()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._early = HfDeepSpeedConfig(early_config(self._run.preset, device, self._run.command.value("nvme_path")))

    def made(self) -> None:
        """A model is made from its configuration: remember where, while there are no arguments."""
        if self._run.args is None and self._arguments.whole_model is None:
            self._arguments.whole_model = script_line()

    def before_load(self, cls: type, name: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments to load with.

        Only models with a head are looked at: the Trainer refuses others, so they are helpers.
        """
        run = self._run
        if run.constructing or run.busy or name is None or "For" not in cls.__name__:
            return kwargs
        if run.args is None and run.shards_weights:
            self._arguments.sharded_early = script_line()
        if run.model_args is None:
            more = {key: kwargs.get(key) for key in ("revision", "trust_remote_code")}
            run.describe_model(str(name), cls, kwargs.get("config"), **more)
        run.prepare()
        return self._in_four_bits(cls, kwargs)

    def _in_four_bits(self, cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
        run = self._run
        own = kwargs.get("quantization_config") or getattr(kwargs.get("config"), "quantization_config", None)
        if run.adapter != "qlora" or own is not None:
            return kwargs
        import torch
        from trl import get_quantization_config

        kwargs = {**kwargs, "quantization_config": get_quantization_config(run.model_args)}
        if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
            kwargs.pop("torch_dtype", None)
            kwargs["dtype"] = getattr(torch, run.model_args.dtype)
        if run.args is None and torch.cuda.is_available():
            # The arguments choose the GPU of this rank; they are not there yet.
            kwargs.setdefault("device_map", {"": read_launch().local_rank})
        run.lines["4 bit"] = f"{cls.__name__} loaded in 4 bit at {script_line()}"
        say(run.lines["4 bit"])
        return kwargs


def early_config(preset: Preset, device: str, nvme_path: str | None) -> dict[str, Any]:
    """`preset`'s DeepSpeed dictionary with a number for every "auto" that sharding a model reads."""
    launch = read_launch()
    shape = RunShape(
        world_size=launch.world_size,
        gpus_per_node=launch.local_world_size,
        device="cuda" if device == "cuda" else "cpu",
        nvme_path=Path(nvme_path or ".").absolute(),
    )
    config = build(preset, shape) or {}
    del config["train_batch_size"], config["gradient_clipping"]
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"bf16": {"enabled": device == "cuda"}, "fp16": {"enabled": False}}
    zero = config["zero_optimization"]
    return config | {"zero_optimization": {key: value for key, value in zero.items() if value != "auto"}}
