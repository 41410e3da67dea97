"""What happens to a script's `TrainingArguments`, whether it parses them or writes them out."""

from __future__ import annotations

import copy
import copyreg
import dataclasses
from collections.abc import Iterable
from typing import Any

from hf_dsvllm.auto import is_auto
from hf_dsvllm.console import say
from hf_dsvllm.errors import ConfigError, Problem
from hf_dsvllm.fields import PresetFields, added_fields
from hf_dsvllm.run.lines import script_line
from hf_dsvllm.run.state import Run
from hf_dsvllm.traps import Fix

__all__ = ["ForArguments"]


class ForArguments:
    """Gives every class of arguments our fields, with the command line's values as their defaults."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._classes: dict[type, type] = {}
        self.whole_model: str | None = None
        self.sharded_early: str | None = None

    def wanted_class(self, cls: Any) -> Any:
        """The class that an instance of `cls` will be of."""
        from hf_dsvllm.arguments import with_presets

        if cls in self._classes.values():
            return cls
        if issubclass(cls, PresetFields):
            raise self._run.fail(
                Problem(
                    f"{cls.__name__} is an argument class of hf_dsvllm: the script does by itself what `run` adds",
                    "start it with torchrun or accelerate launch",
                )
            )
        if cls not in self._classes:
            self._classes[cls] = self._subclass(cls, with_presets(cls))
        return self._classes[cls]

    def wanted_by_parser(self, dtype: Any) -> Any:
        """What a parser reads instead of `dtype`, so that our flags are among the script's."""
        from transformers import TrainingArguments

        if not (isinstance(dtype, type) and issubclass(dtype, TrainingArguments)):
            return dtype
        self._run.lines.setdefault("parser", f"our flags in the parser at {script_line()}")
        return self.wanted_class(dtype)

    def parsed(self, outputs: Iterable[Any]) -> None:
        """Settle TRL's `ModelConfig` where the script has one: `--use_peft --load_in_4bit …` as the preset says."""
        from trl import ModelConfig, RewardConfig

        run, things = self._run, list(outputs)
        model_args = next((thing for thing in things if isinstance(thing, ModelConfig)), None)
        if model_args is None or not any(thing is run.args for thing in things):
            return
        if isinstance(run.args, RewardConfig):
            self._settle_reward_model(model_args)
        for name, value in run.command.adapter.chosen().items():
            setattr(model_args, name, value)
        run.model_args, run.described = model_args, False
        run.prepare()
        if run.adapter:
            run.lines["adapter"] = f"{run.adapter} by TRL's own ModelConfig"

    def _settle_reward_model(self, model_args: Any) -> None:
        """A reward model has a head that adapters leave trainable, and gives no text to evaluate."""
        run = self._run
        run.refuse_evaluation("a reward model")
        if not run.adapter:
            return
        if model_args.lora_task_type == "CAUSAL_LM":
            model_args.lora_task_type = "SEQ_CLS"
            say(str(Fix("lora_task_type", "CAUSAL_LM", "SEQ_CLS", "the head is trained too")))
        if run.adapter == "qlora" and model_args.dtype == "float32":
            # TRL casts whatever is trained beside a 4-bit model to bf16 (read in 1.16, reward_trainer.py).
            model_args.dtype = "bfloat16"
            say(str(Fix("dtype", "float32", "bfloat16", "TRL casts the head of a 4-bit reward model to bf16")))

    def _subclass(self, cls: Any, base: Any) -> type:
        from hf_dsvllm.arguments import has_generated_init
        from hf_dsvllm.wiring import check_ranks_agree

        run = self._run

        def __post_init__(args: Any) -> None:
            for name in added_fields():  # a constructor written by hand has not set them
                if name not in args.__dict__:
                    setattr(args, name, run.command.value(name))
            self._refuse_contradictions(args)
            planned = is_auto(args.ds_preset)
            try:
                base.__post_init__(args)
                if planned:  # the next that all ranks do together may be to load shards
                    check_ranks_agree(args)
            except ConfigError as error:
                raise run.fail(*error.problems, *self._lines_to_swap(error)) from None
            run.use(args)
            run.lines.setdefault("arguments", f"{cls.__name__} at {script_line()}")

        def __reduce_ex__(args: Any, protocol: Any) -> tuple[Any, ...]:
            del protocol
            # As the script's own class: training_args.bin loads where this package is not installed.
            return copyreg._reconstructor, (cls, object, None), args.__dict__  # type: ignore[attr-defined]

        def __deepcopy__(args: Any, memo: dict[int, Any]) -> Any:
            twin = memo[id(args)] = object.__new__(made)
            twin.__dict__.update(copy.deepcopy(args.__dict__, memo))
            return twin

        def __copy__(args: Any) -> Any:
            twin = object.__new__(made)
            twin.__dict__.update(args.__dict__)
            return twin

        fields = [
            (field.name, field.type, _with_default(field, given.value))
            for field in dataclasses.fields(base)
            if (given := run.command.given.get(field.name)) is not None
        ]
        members = {method.__name__: method for method in (__post_init__, __reduce_ex__, __deepcopy__, __copy__)}
        made: Any = dataclasses.make_dataclass(
            cls.__name__, fields, bases=(base,), namespace=members, init=has_generated_init(cls)
        )
        made.__doc__ = cls.__doc__
        made.__module__, made.__qualname__ = cls.__module__, cls.__qualname__
        return made

    def _refuse_contradictions(self, args: Any) -> None:
        """Stop where the script, its YAML or its .args file say otherwise than what the run was started by."""
        command, problems = self._run.command, []
        for name in sorted({"ds_preset", *command.given}):
            seen, found = command.value(name), getattr(args, name)
            if isinstance(seen, list) and isinstance(found, str):  # a list of one, as TRL's parser leaves it in YAML
                found = [found]
                setattr(args, name, found)
            if found != seen and not (name == "ds_preset" and is_auto(seen)):
                place = command.given[name].place if name in command.given else "the command line"
                problems.append(
                    Problem(
                        f"{name}: {place} says {seen!r}, the script's arguments ({script_line()}) say {found!r}",
                        f"give --{name} in one place, the command line, spelt out",
                    )
                )
        if self.sharded_early and args.fp16:
            problems.append(
                Problem(
                    f"a model was loaded at {self.sharded_early}, before the arguments with fp16 at {script_line()}: "
                    "under ZeRO-3 it is in bf16 already",
                    "swap these two lines, or train in bf16",
                )
            )
        if problems:
            raise self._run.fail(*problems)

    def _lines_to_swap(self, error: ConfigError) -> list[Problem]:
        """Where a whole model came before the arguments of a ZeRO-3 run."""
        if self.whole_model is None or not any("before the training arguments" in p.what for p in error.problems):
            return []
        named = "use from_pretrained" if self._run.shards_weights else "name a preset, --ds_preset zero3"
        return [
            Problem(
                f"the model is made at {self.whole_model}, the training arguments at {script_line()}",
                f"swap these two lines, or {named}: `hf-dsvllm run` then shards what is loaded wherever it stands",
            )
        ]


def _with_default(field: dataclasses.Field[Any], value: Any) -> Any:
    """The same dataclass field with another default."""
    if isinstance(value, list):
        return dataclasses.field(default_factory=lambda: list(value), metadata=field.metadata)
    return dataclasses.field(default=value, metadata=field.metadata)
