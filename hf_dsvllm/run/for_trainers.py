"""What happens to the trainers a script makes: adapters before, evaluation after, and the proof that both took."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.console import say
from hf_dsvllm.errors import Problem, WiringError
from hf_dsvllm.fields import PresetFields, asks_for_answers
from hf_dsvllm.run.lines import script_line
from hf_dsvllm.run.state import Run, innermost

__all__ = ["ForTrainers", "SavesAdapters", "accepted", "bound", "given_to", "is_adapted"]


class ForTrainers:
    """Stands around the constructor of every trainer class, whatever its signature."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._exports: dict[Path, weakref.ref[Any]] = {}  # by whom
        self._training: set[int] = set()  # ids of trainers whose train() is under way, and of those it has begun in
        self._begun: set[int] = set()

    def before(self, cls: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments for a trainer's constructor: TRL's take adapters and quantisation themselves."""
        run = self._run
        if run.constructing > 1:
            return kwargs
        given = given_to(cls, trainer, args, kwargs)
        model = given.get("model")
        own = next((value for value in given.values() if isinstance(value, PresetFields)), None)
        if own is not None:
            run.use(own)  # type: ignore[arg-type]
        if model is not None:
            run.settle_model(model, cls)
        if run.model_args is not None and (isinstance(model, str) or _writes_text(model)):
            run.prepare()
        if isinstance(model, str) and cls.__module__.startswith("trl."):  # others may put adapters on it themselves
            self._check_named(given)
            _load_on_one_gpu(own)
        takes = accepted(cls)
        if run.model_args is None or run.adapter is None or "peft_config" not in takes:
            return kwargs
        return kwargs if given.get("peft_config") or is_adapted(model) else {**kwargs, **self._for_trl(given, takes)}

    def _check_named(self, given: dict[str, Any]) -> None:
        """Memory and disk for a model that TRL's trainer loads by its name, before it does."""
        how = getattr(given.get("args"), "model_init_kwargs", None) or {}
        dtype = how.get("dtype", how.get("torch_dtype"))
        four_bit = bool(given.get("quantization_config") or how.get("quantization_config"))
        named = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
        self._run.check_trained(adapted=bool(given.get("peft_config")), four_bit=four_bit, dtype=named)

    def _for_trl(self, given: dict[str, Any], takes: set[str]) -> dict[str, Any]:
        from trl import get_quantization_config

        from hf_dsvllm.adapters import peft_config_of

        model_args, args = self._run.model_args, given.get("args")
        self._run.lines["adapter"] = f"peft_config given to the trainer at {script_line()}"
        more = {"peft_config": peft_config_of(model_args)}
        if isinstance(given.get("model"), str):
            if "quantization_config" in takes and not given.get("quantization_config"):
                more["quantization_config"] = get_quantization_config(model_args)
            if hasattr(args, "model_init_kwargs"):
                args.model_init_kwargs = {"dtype": model_args.dtype, **(args.model_init_kwargs or {})}
        return more

    def inside(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments for `Trainer.__init__` itself: the model with adapters, where nobody has put them in."""
        run, model = self._run, given.get("model")
        if run.preset is None or run.adapter is None or run.constructing > 1:
            return given
        if is_adapted(model):
            # The script's variable is the model inside: a second trainer gets the whole again.
            saves = vars(model).get("save_pretrained")
            return {**given, "model": saves.wrapped if isinstance(saves, SavesAdapters) else model}
        name, line = run.preset.name, script_line()
        if model is None:
            raise run.fail(
                Problem(
                    f"preset {name} puts adapters on a model, the trainer at {line} gets none (model_init makes it "
                    "later)",
                    "pass model=, or take a preset without adapters",
                )
            )
        if (given.get("optimizers") or (None,))[0] is not None:
            raise run.fail(
                Problem(
                    f"the trainer at {line} gets an optimizer made before the adapters of preset {name} exist: it "
                    "would train none of them",
                    "leave optimizers= out, or take a preset without adapters",
                )
            )
        if run.adapter == "qlora" and not getattr(model, "is_loaded_in_4bit", False):
            raise run.fail(
                Problem(
                    f"preset {name} trains on a 4-bit model, the one given to the trainer at {line} is in "
                    f"{getattr(model, 'dtype', 'another dtype')}: it was not loaded with from_pretrained, or has a "
                    "quantisation of its own",
                    "load it with from_pretrained, or take the lora preset",
                )
            )
        return {**given, **self._adapt(model, given.get("args"))}

    def _adapt(self, model: Any, args: Any) -> dict[str, Any]:
        from transformers import TrainingArguments, set_seed

        from hf_dsvllm import adapters

        run = self._run
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args  # the Trainer's own default
        run.settle_model(model, object)
        set_seed(args.seed)  # adapters start at random; the Trainer seeds anew right after
        wrapped = adapters.wrap(model, adapters.peft_config_of(run.model_args), args)
        model.save_pretrained = SavesAdapters(model, wrapped)
        run.lines["adapter"] = f"{type(model).__name__} given adapters at {script_line()}"
        return {"model": wrapped, "args": args}

    def after(self, trainer: Any) -> None:
        """Add evaluation, steering, export and the wiring check to a finished trainer."""
        run = self._run
        if run.constructing:
            return
        run.use(trainer.args)
        self._refuse_foreign_models(trainer.model)
        run.settle_model(trainer.model, type(trainer))
        run.lines["trainer"] = f"{type(trainer).__name__} at {script_line()}"
        self._check_model(trainer)
        self._check_loaded(trainer.model)
        run.prepare(constructed=True)
        session = run.give_out()
        dtype = getattr(trainer.model, "dtype", None)
        if dtype is not None and not session.model_args.load_in_4bit:
            session.model_args.dtype = str(dtype).removeprefix("torch.")
        if session.evaluates and trainer.processing_class is None:
            from hf_dsvllm.checks import load_tokenizer

            trainer.processing_class = load_tokenizer(session.args, session.model_args)
            say("the trainer was given no processing_class: evaluation takes the model's own tokenizer")
        session.attach(trainer)
        trainer.add_callback(_report(tuple(run.lines.values()), session, trainer, self._has_begun))
        run.lines.pop("4 bit", None)

    def _refuse_foreign_models(self, model: Any) -> None:
        """Snapshots need transformers' way of saving, and adapters that are on layers."""
        for config in getattr(model, "peft_config", {}).values():
            if config.is_prompt_learning:
                raise self._run.fail(
                    Problem(
                        f"the trainer at {script_line()} trains prompts ({config.peft_type.value}): a run ends with a "
                        "snapshot, which holds whole models and adapters on layers",
                        "take LoRA, or start the script with torchrun: `hf-dsvllm presets show NAME` prints a "
                        "preset's JSON, to pass as --deepspeed",
                    )
                )
        if not hasattr(model, "save_pretrained"):
            raise self._run.fail(
                Problem(
                    f"the trainer at {script_line()} trains a {type(model).__name__}, which is no transformers model",
                    "make it a PreTrainedModel, or start the script with torchrun",
                )
            )

    def _check_loaded(self, model: Any) -> None:
        """Memory and disk for the live model; one that is frozen in part by the script is none the formulas know."""
        run, adapted = self._run, bool(getattr(model, "peft_config", None))
        if not run.model_args.model_name_or_path:
            return  # made in the script
        if adapted or all(parameter.requires_grad for parameter in model.parameters()):
            dtype = getattr(model, "dtype", None)
            run.check_trained(
                adapted=adapted,
                four_bit=bool(getattr(getattr(model, "config", None), "quantization_config", None)),
                dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            )

    def _check_model(self, trainer: Any) -> None:
        """Evaluation and export are for models that write text and come from somewhere."""
        run, model = self._run, trainer.model
        inner = innermost(model)
        name, found = type(inner).__name__, str(run.model_args.model_name_or_path)
        writes = _writes_text(inner)
        if not writes:
            run.refuse_evaluation(name)
        if not found and asks_for_answers(trainer.args):
            raise run.fail(
                Problem(
                    f"evaluation needs a model from a folder or the hub, this {name} was made in the script",
                    "save it with save_pretrained and load that, or drop --gen_eval_file and --gen_eval_lm_eval",
                )
            )
        if (not writes or not found) and trainer.args.export_to != "none":
            trainer.args.export_to = "none"
            why = "does not write text" if not writes else "was made in the script"
            say(f"export_to=none: {name} {why}; the script's own save_model keeps it")

    def _has_begun(self, trainer: Any) -> None:
        self._run.trained = True
        self._begun.add(id(trainer))

    @contextlib.contextmanager
    def training(self, trainer: Any) -> Iterator[None]:
        """Around `train`; raises WiringError afterwards if it was a loop of its own, without callbacks and engine."""
        if id(trainer) in self._training:  # a subclass's train that goes on to the Trainer's
            yield
            return
        self.before_training(trainer)
        self._training.add(id(trainer))
        self._begun.discard(id(trainer))
        try:
            with self._run.at_work():
                yield
        finally:
            self._training.discard(id(trainer))
        if id(trainer) not in self._begun:
            self._run.failed = WiringError(
                f"{type(trainer).__name__}.train came back without on_train_begin, the moment at which a Trainer has "
                "its engine and evaluation begins: whatever it trained in a loop of its own, it was not by this "
                "preset. Let it call super().train(), or start the script with torchrun"
            )
            raise self._run.failed
        self.after_training(trainer)

    def before_training(self, trainer: Any) -> None:
        """Raise WiringError for a trainer that does not carry our callback; let its export overwrite no other's."""
        session = _session_of(trainer)
        if session is None:
            self._run.failed = WiringError(
                f"{type(trainer).__name__} starts to train without the callback of this run: the script has removed "
                "it. Nothing was trained."
            )
            raise self._run.failed
        asked = _export_folder(trainer.args, session)
        free = next((folder for folder in _numbered(asked) if self._may_export(trainer, folder)), None)
        if free != asked:
            say(f"export_to={free}: {asked} is the export of an earlier trainer of this script")
            session.args = copy.copy(trainer.args)
            session.args.export_to = str(free)

    def _may_export(self, trainer: Any, folder: Path) -> bool:
        by = self._exports.get(folder.absolute())
        return by is None or by() is trainer

    def after_training(self, trainer: Any) -> None:
        """Remember whose export is where."""
        session = _session_of(trainer)
        folder = None if session is None else _export_folder(session.args, session)
        if folder is not None:
            self._exports[folder.absolute()] = weakref.ref(trainer)


class SavesAdapters:
    """`save_pretrained` of the model inside `wrapped`, the script's own variable: adapters while it holds any."""

    def __init__(self, model: Any, wrapped: Any) -> None:
        self.model = model
        self.wrapped = wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_adapted(self.model):
            return self.wrapped.save_pretrained(*args, **kwargs)
        return type(self.model).save_pretrained(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavesAdapters:
        return SavesAdapters(copy.deepcopy(self.model, memo), copy.deepcopy(self.wrapped, memo))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        # As the method that is called now: a pickled model loads where this package is not installed.
        return getattr, (self.wrapped if is_adapted(self.model) else self.model, "save_pretrained")


def _load_on_one_gpu(args: Any) -> None:
    """Keep TRL from splitting a model given by name over GPUs that this process does not train on."""
    from hf_dsvllm.arguments import on_one_gpu

    if args is not None and hasattr(args, "model_init_kwargs") and (where := on_one_gpu(args)):
        args.model_init_kwargs = {**where, **(args.model_init_kwargs or {})}


def _writes_text(model: Any) -> bool:
    return bool(getattr(innermost(model), "can_generate", bool)())


def _session_of(trainer: Any) -> Any:
    """The session whose callback a trainer carries, None without one."""
    from hf_dsvllm.callback import SessionCallback

    callbacks = trainer.callback_handler.callbacks
    return next((callback.session for callback in callbacks if isinstance(callback, SessionCallback)), None)


def _export_folder(args: Any, session: Any) -> Path | None:
    """Where a run exports to; None for nowhere."""
    if args.export_to == "none":
        return None
    return Path(args.export_to) if args.export_to else session.run_dir / "export"


def _numbered(folder: Path | None) -> Iterator[Path]:
    """`folder`, then the same with a number from 2 on; nothing for None."""
    if folder is not None:
        yield folder
        yield from (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))


def _report(lines: Sequence[str], session: Any, trainer: Any, has_begun: Callable[[Any], None]) -> Any:
    """The callback that says, from the live objects, what was wired where."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            has_begun(trainer)
            configs = getattr(trainer.model, "peft_config", {})
            parts = [*lines, *(f"adapter {name!r} {_where(config)}" for name, config in configs.items())]
            tasks = ", ".join(task.name for task in session.tasks)
            parts.append(f"vLLM answers {tasks}" if tasks else "no evaluation by generation")
            say(f"wired: {'; '.join(parts)}")

    return Report()


def _where(config: Any) -> str:
    """What an adapter of PEFT is put on; some kinds are put on no layers that they name."""
    targets = getattr(config, "target_modules", None)
    if not targets:
        return f"of type {getattr(config.peft_type, 'value', config.peft_type)}"
    layers = [targets] if isinstance(targets, str) else sorted({target.rpartition(".")[2] for target in targets})
    return f"on {', '.join(layers)}"


def given_to(cls: type, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name; one that only hands `*args, **kwargs` on is passed over."""
    names = (init for init in _constructors(cls) if not _hands_all_on(init))
    return bound(next(names, cls.__init__), trainer, args, kwargs)


def accepted(cls: type) -> set[str]:
    """The names a constructor takes, with those that its `**kwargs` take to the classes above."""
    names: set[str] = set()
    for init in _constructors(cls):
        parameters = inspect.signature(init).parameters
        names |= set(parameters)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _constructors(cls: type) -> Iterator[Callable[..., None]]:
    return (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base))


def _hands_all_on(init: Callable[..., None]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(init).parameters.values()]
    return set(kinds[1:]) == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def bound(function: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, without `self`; {} for a call that does not fit, which python will refuse."""
    try:
        call = inspect.signature(function).bind_partial(instance, *args, **kwargs)
    except TypeError:
        return {}
    found = dict(list(call.arguments.items())[1:])
    for parameter in call.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            found.pop(parameter.name, None)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(parameter.name, {}))
    return found


def is_adapted(model: Any) -> bool:
    """Whether there are LoRA layers in a model."""
    return hasattr(model, "modules") and any(hasattr(module, "lora_A") for module in model.modules())
