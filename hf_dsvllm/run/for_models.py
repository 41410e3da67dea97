"""What happens to the models a script loads: 4-bit weights for QLoRA, shards for ZeRO-3 wherever the line stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dsvllm.console import say
from hf_dsvllm.ds_config import RunShape, build
from hf_dsvllm.launch import become_single_process, read_launch
from hf_dsvllm.presets import Preset
from hf_dsvllm.run.for_arguments import ForArguments
from hf_dsvllm.run.lines import script_line
from hf_dsvllm.run.state import Run, task_type

if TYPE_CHECKING:
    from trl import ModelConfig

__all__ = ["ForModels", "early_config", "has_head"]

HEAD = re.compile("For[A-Z]|LMHead|DoubleHeads")  # RoFormerModel has none


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
        """A whole model is made or loaded: remember where, while there are no arguments."""
        if self._run.args is None and self._arguments.whole_model is None:
            self._arguments.whole_model = script_line()

    def before_load(self, cls: Any, name: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments to load with.

        Only models with a head are looked at: the Trainer refuses others, so they are helpers.  vLLM starts for the
        first one that writes text; which one is trained is known when the trainer is made.
        """
        run = self._run
        if run.constructing or run.busy or name is None:
            return kwargs
        if run.args is None and not run.shards_weights:
            self.made()
        if not has_head(cls):
            return kwargs
        if run.args is None and run.shards_weights:
            self._arguments.sharded_early = script_line()
        run.loaded[str(name)] = {key: kwargs.get(key) for key in ("revision", "trust_remote_code")}
        if self._only_helps(cls):
            return kwargs
        settings = run.model_args or run.describe(str(name), task_type(cls, kwargs.get("config")))
        if cls.can_generate():
            run.model_args = settings
            if run.session is None:
                run.prepare()
        return self._in_four_bits(cls, name, settings, kwargs)

    def _only_helps(self, cls: Any) -> bool:
        """Whether TRL's arguments tell that this is not the model trained: a reward model beside a policy, say."""
        kind = next((base for base in type(self._run.args).__mro__ if base.__module__.startswith("trl.")), None)
        return kind is not None and cls.can_generate() == (kind.__name__ == "RewardConfig")

    def _in_four_bits(self, cls: type, name: Any, settings: ModelConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
        run = self._run
        own = kwargs.get("quantization_config") or getattr(kwargs.get("config"), "quantization_config", None)
        if run.adapter != "qlora" or own is not None:
            return kwargs
        import torch
        from trl import get_quantization_config

        kwargs = {**kwargs, "quantization_config": get_quantization_config(settings)}
        if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
            kwargs.pop("torch_dtype", None)
            kwargs["dtype"] = getattr(torch, settings.dtype)
        if run.args is None and torch.cuda.is_available():
            # The arguments choose the GPU of this rank; they are not there yet.  A rank may see its own alone.
            kwargs.setdefault("device_map", {"": read_launch().local_rank % torch.cuda.device_count()})
        line = f"{cls.__name__} loaded in 4 bit at {script_line()}"
        run.lines["4 bit"] = "; ".join(filter(None, (run.lines.get("4 bit"), line)))
        say(f"{line}: {name}")
        return kwargs


def has_head(cls: Any) -> bool:
    """Whether models of this class compute a loss or write text."""
    return bool(HEAD.search(cls.__name__)) or bool(cls.can_generate())


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
