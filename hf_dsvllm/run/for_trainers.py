"""What happens to the trainers a script makes: adapters before, evaluation after, and the proof that both took."""

from __future__ import annotations

import inspect
from typing import Any

from hf_dsvllm.console import say
from hf_dsvllm.errors import Problem, WiringError
from hf_dsvllm.fields import asks_for_answers
from hf_dsvllm.run.lines import script_line
from hf_dsvllm.run.state import Run, model_name

__all__ = ["ForTrainers", "bound", "is_adapted"]


class ForTrainers:
    """Stands around the constructor of every trainer class, whatever its signature."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._wrapped: dict[int, Any] = {}  # by the id of the model inside, which lives as long

    def before(self, cls: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments for a trainer's constructor: TRL's take adapters and quantisation themselves."""
        run = self._run
        if run.constructing > 1:
            return kwargs
        given = bound(cls.__init__, trainer, args, kwargs)
        model = given.get("model")
        if isinstance(model, str) and run.model_args is None:
            run.describe_model(model, None, None)
        run.forget_another_model(model)
        if run.model_args is not None:
            run.prepare()
        takes = inspect.signature(cls.__init__).parameters
        if run.model_args is None or run.adapter is None or "peft_config" not in takes:
            return kwargs
        return kwargs if given.get("peft_config") or is_adapted(model) else {**kwargs, **self._for_trl(given, takes)}

    def _for_trl(self, given: dict[str, Any], takes: Any) -> dict[str, Any]:
        from trl import get_peft_config, get_quantization_config

        model_args, args = self._run.model_args, given.get("args")
        self._run.lines["adapter"] = f"peft_config given to the trainer at {script_line()}"
        more = {"peft_config": get_peft_config(model_args)}
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
            return {**given, "model": self._wrapped.get(id(model), model)}
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
        from trl import get_peft_config

        from hf_dsvllm import adapters

        run = self._run
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args  # the Trainer's own default
        if run.model_args is None:
            run.describe_model(model_name(model), type(model), getattr(model, "config", None))
        set_seed(args.seed)  # adapters start at random; the Trainer seeds anew right after
        wrapped = adapters.wrap(model, get_peft_config(run.model_args), args)
        _let_save_adapters(model, wrapped)
        self._wrapped[id(model)] = wrapped
        run.lines["adapter"] = f"{type(model).__name__} given adapters at {script_line()}"
        return {"model": wrapped, "args": args}

    def after(self, trainer: Any) -> None:
        """Add evaluation, steering, export and the wiring check to a finished trainer."""
        run = self._run
        if run.constructing:
            return
        run.args = trainer.args
        self._refuse_foreign_models(trainer.model)
        run.forget_another_model(trainer.model)
        if run.model_args is None:
            run.describe_model(model_name(trainer.model), type(trainer.model), trainer.model.config)
        run.lines["trainer"] = f"{type(trainer).__name__} at {script_line()}"
        self._check_model(trainer)
        run.prepare()
        session, run.session = run.session, None
        if session is None:
            raise AssertionError("prepare makes a session once the arguments exist")
        run.trainers += 1
        session.args = trainer.args
        dtype = getattr(trainer.model, "dtype", None)
        if dtype is not None and not session.model_args.load_in_4bit:
            session.model_args.dtype = str(dtype).removeprefix("torch.")
        if session.evaluates and trainer.processing_class is None:
            from hf_dsvllm.checks import load_tokenizer

            trainer.processing_class = load_tokenizer(session.args, session.model_args)
            say("the trainer was given no processing_class: evaluation takes the model's own tokenizer")
        session.attach(trainer)
        trainer.add_callback(_report(run, session, trainer))

    def _refuse_foreign_models(self, model: Any) -> None:
        """Snapshots and adapters need transformers' way of saving."""
        if not hasattr(model, "save_pretrained"):
            raise self._run.fail(
                Problem(
                    f"the trainer at {script_line()} trains a {type(model).__name__}, which is no transformers model",
                    "make it a PreTrainedModel, or start the script with torchrun",
                )
            )

    def _check_model(self, trainer: Any) -> None:
        """Evaluation and export are for models that write text and come from somewhere."""
        run, model = self._run, trainer.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        name, found = type(inner).__name__, str(run.model_args.model_name_or_path)
        writes = bool(getattr(inner, "can_generate", bool)())
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

    def before_training(self, trainer: Any) -> None:
        """Raise WiringError for a trainer that does not carry our callback."""
        from hf_dsvllm.callback import SessionCallback

        if not any(isinstance(callback, SessionCallback) for callback in trainer.callback_handler.callbacks):
            self._run.failed = WiringError(
                f"{type(trainer).__name__} starts to train without the callback of this run: the script has removed "
                "it. Nothing was trained."
            )
            raise self._run.failed
        self._run.trained = True


def _report(run: Run, session: Any, trainer: Any) -> Any:
    """The callback that says, from the live objects, what was wired where."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            parts = list(run.lines.values())
            for name, config in getattr(trainer.model, "peft_config", {}).items():
                layers = sorted({target.rpartition(".")[2] for target in config.target_modules or ()})
                parts.append(f"adapter {name!r} on {', '.join(layers)}")
            tasks = ", ".join(task.name for task in session.tasks)
            parts.append(f"vLLM answers {tasks}" if tasks else "no evaluation by generation")
            say(f"wired: {'; '.join(parts)}")

    return Report()


def bound(function: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, without `self`; {} for a call that does not fit, which python will refuse."""
    try:
        call = inspect.signature(function).bind_partial(instance, *args, **kwargs)
    except TypeError:
        return {}
    found = dict(list(call.arguments.items())[1:])
    for parameter in call.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(parameter.name, {}))
    return found


def is_adapted(model: Any) -> bool:
    """Whether there are LoRA layers in a model."""
    return hasattr(model, "modules") and any(hasattr(module, "lora_A") for module in model.modules())


def _let_save_adapters(model: Any, wrapped: Any) -> None:
    """The script's own variable is the model inside `wrapped`: while it holds adapters, it saves these."""

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        if is_adapted(model):
            return wrapped.save_pretrained(*args, **kwargs)
        return type(model).save_pretrained(model, *args, **kwargs)

    model.save_pretrained = save_pretrained
