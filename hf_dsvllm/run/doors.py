"""Every place where a run touches upstream: five classes, in this process only, when the script imports them.

* `TrainingArguments.__new__`: any instance gets our fields, with the command line's values as their defaults.
* `HfArgumentParser`, transformers' and TRL's copy: our flags in the script's parser, its `--help` and its YAML.
* `PreTrainedModel.from_pretrained` and `__init__`: 4-bit weights for QLoRA; vLLM starts while the model loads.
* `Trainer.__new__`, `__init__` and `train`, also of subclasses: adapters, evaluation, and the proof that both took.

`__new__` is the one place every subclass passes, whatever its `__init__` looks like: it returns an instance of a
subclass made on the way, whose `__init__` python then calls with the caller's arguments.
Remove each when transformers has an entry point for it (read in 5.19: there is none).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hf_dsvllm.given import note_given
from hf_dsvllm.run.for_arguments import ForArguments
from hf_dsvllm.run.for_models import ForModels
from hf_dsvllm.run.for_trainers import ForTrainers, bound
from hf_dsvllm.run.importing import when_imported
from hf_dsvllm.run.state import Run

__all__ = ["install"]


def install(run: Run) -> None:
    """Put the doors in; `for_arguments`, `for_models` and `for_trainers` decide what happens behind them."""
    arguments = ForArguments(run)
    parser = functools.partial(_parser, arguments)
    when_imported(
        {
            "transformers.training_args": functools.partial(_arguments, arguments),
            "transformers.hf_argparser": parser,
            "trl.scripts._hf_argparser": parser,
            "transformers.modeling_utils": functools.partial(_models, ForModels(run, arguments)),
            "transformers.trainer": functools.partial(_trainer, run, ForTrainers(run)),
        }
    )


def _arguments(door: ForArguments, module: ModuleType) -> None:
    original: Any = module.TrainingArguments

    def __new__(cls: type, *_args: Any, **kwargs: Any) -> Any:
        wanted = door.wanted_class(cls)
        made = super(original, wanted).__new__(wanted)
        note_given(made, kwargs)
        return made

    original.__new__ = __new__


def _parser(door: ForArguments, module: ModuleType) -> None:
    parser: Any = module.HfArgumentParser
    add = parser._add_dataclass_arguments

    @functools.wraps(add)
    def _add_dataclass_arguments(self: Any, dtype: Any) -> None:
        wanted = door.wanted_by_parser(dtype)
        if wanted is not dtype:
            self.dataclass_types = [wanted if kind is dtype else kind for kind in self.dataclass_types]
        add(self, wanted)

    parser._add_dataclass_arguments = _add_dataclass_arguments
    for name in ("parse_args_into_dataclasses", "parse_dict"):
        setattr(parser, name, _then(getattr(parser, name), door.parsed))


def _then(original: Callable[..., Any], look: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        look(result)
        return result

    return method


def _models(door: ForModels, module: ModuleType) -> None:
    model: Any = module.PreTrainedModel
    load, make = model.from_pretrained.__func__, model.__init__
    depth = 0  # a model may load its parts

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if depth == 0:
            name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            kwargs = door.before_load(cls, name, kwargs)
        depth += 1
        try:
            return load(cls, *args, **kwargs)
        finally:
            depth -= 1

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if depth == 0:
            door.made()
        make(self, *args, **kwargs)

    model.from_pretrained = classmethod(from_pretrained)
    model.__init__ = __init__
    door.shard_from_here_on()


def _trainer(run: Run, door: ForTrainers, module: ModuleType) -> None:
    trainer: Any = module.Trainer
    make = trainer.__init__

    @functools.cache
    def check_train(cls: Any) -> None:
        """Surround the `train` of this class, the Trainer's or one that may not go on to the Trainer's."""
        train = vars(cls).get("train")
        if not issubclass(cls, trainer) or not inspect.isfunction(train):
            return

        @functools.wraps(train)
        def checked_train(self: Any, *args: Any, **kwargs: Any) -> Any:
            with door.training(self):
                return train(self, *args, **kwargs)

        cls.train = checked_train

    @functools.cache
    def passage(cls: Any) -> Any:
        """A subclass of `cls` whose `__init__` surrounds that of `cls`; the instance is of `cls` before that runs."""
        for base in cls.__mro__:
            check_train(base)

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            self.__class__ = cls
            run.constructing += 1
            try:
                cls.__init__(self, *args, **door.before(cls, self, args, kwargs))
            finally:
                run.constructing -= 1
            door.after(self)

        return type(cls)(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})

    def __new__(cls: type, *_args: Any, **_kwargs: Any) -> Any:
        return super(trainer, passage(cls)).__new__(passage(cls))

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = bound(make, self, args, kwargs)
        if given:
            args, kwargs = (), door.inside(given)
        make(self, *args, **kwargs)

    trainer.__new__ = __new__
    trainer.__init__ = __init__
