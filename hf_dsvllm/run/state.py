"""What one rank's run knows: the preset, the script's arguments and model, the session; and how it fails."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dsvllm.auto import is_auto
from hf_dsvllm.console import say
from hf_dsvllm.errors import ConfigError, DsvllmError, Problem
from hf_dsvllm.fields import added_fields, asks_for_answers
from hf_dsvllm.presets import Preset, get_preset
from hf_dsvllm.run.command import Command
from hf_dsvllm.run.lines import script_line
from hf_dsvllm.traps import Fix

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ModelConfig

    from hf_dsvllm.session import Session

__all__ = ["Run", "innermost", "model_name", "task_type"]

# LoRA's task types by the end of the model's class name; PEFT trains the new head of these (read in peft 0.21).
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
TEXT = "CAUSAL_LM"  # TRL's default
# The arguments a session is made from; export_to and gen_eval_on_start are read when their moment comes.
SETTLED = (
    *("output_dir", "use_cpu", "seed", "save_strategy", "chat_template_path"),
    *(name for name in added_fields() if name not in ("export_to", "gen_eval_on_start")),
)


class Run:
    """The state of a rank.  `lines` says which door took and where in the script; `trainers` counts finished ones.

    `constructing` and `busy` count how deep we are in a trainer's constructor, and in work of a trainer or of our own:
    models loaded there are no business of ours.  `waiting`: the arguments have no trainer yet.  `loaded` is how each
    model was loaded, by its name; `described`: the model's settings are ours, as the script has no `ModelConfig`.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        name = command.value("ds_preset")
        # The planner's choice is known once the arguments are made.
        self.preset: Preset | None = get_preset(name) if name and not is_auto(name) else None
        self.lines: dict[str, str] = {}
        self.constructing = 0
        self.busy = 0
        self.trainers = 0
        self.trained = False
        self.failed: DsvllmError | None = None
        self.args: Any = None
        self.waiting = False
        self.model_args: Any = None
        self.described = True
        self.loaded: dict[str, dict[str, Any]] = {}
        self.session: Session | None = None
        self._made_for: tuple[Any, ...] = ()
        self._given_out: set[Path] = set()  # folders of trainers
        self._said: set[str] = set()

    @property
    def adapter(self) -> str | None:
        """The preset's kind of adapter."""
        return None if self.preset is None else self.preset.adapter

    @property
    def shards_weights(self) -> bool:
        """Whether this is ZeRO-3."""
        return self.preset is not None and self.preset.zero_stage == 3

    @property
    def device(self) -> str:
        """ "cuda" or "cpu": as the arguments say, before there are any as the machine has it."""
        import torch

        from hf_dsvllm.arguments import training_device

        if self.args is not None:
            return training_device(self.args)
        return "cuda" if torch.cuda.is_available() else "cpu"

    def fail(self, *problems: Problem) -> ConfigError:
        """The error of `problems`, kept, so that a script which catches everything still ends with it."""
        self.failed = ConfigError(problems)
        return self.failed

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Models loaded inside are not the script's own."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    def use(self, args: TrainingArguments) -> None:
        """`args` are those of the next trainer, as far as is known."""
        from hf_dsvllm.arguments import resolve_preset

        self.args, self.preset, self.waiting = args, resolve_preset(args), True

    def describe(self, name: str, task: str) -> ModelConfig:
        """A model the script loads by itself, in TRL's words, with the preset's adapter.

        The dtype counts for 4-bit weights alone: otherwise the script's own choice stays.
        """
        from trl import ModelConfig

        from hf_dsvllm import adapters

        device = self.device
        training = "bfloat16" if self.args is None else adapters.training_dtype(self.args)
        full = adapters.full_dtype(self.preset, device, training) if self.preset is not None else "float32"
        model_args = ModelConfig(
            model_name_or_path=name,
            dtype=full,
            lora_task_type=task,
        )
        for option, value in self.command.adapter.chosen().items():
            setattr(model_args, option, value)  # as it is: TRL's constructor makes a text of a list of one
        self._note_how_loaded(model_args)
        if self.preset is not None:
            for fix in adapters.apply_to_model_config(model_args, self.preset, device=device, full_dtype=full):
                if str(fix) not in self._said:
                    say(str(fix))
                    self._said.add(str(fix))
        return model_args

    def settle_model(self, model: Any, trainer: type) -> None:
        """`model`, or the name of one, is what `trainer` trains: not always the first one that was loaded."""
        if isinstance(model, str):
            name, task = model, _task_of_trainer(trainer)
        else:
            inner = innermost(model)
            name, task = model_name(inner), task_type(type(inner), getattr(inner, "config", None))
        known = self.model_args
        if self.described:
            if known is None or (str(known.model_name_or_path), known.lora_task_type) != (name, task):
                self.model_args = self.describe(name, task)
            return
        if name and str(known.model_name_or_path) != name:
            self.model_args = dataclasses.replace(known, model_name_or_path=name)
            self._note_how_loaded(self.model_args)
        if self.adapter and task != TEXT == self.model_args.lora_task_type:
            self.model_args.lora_task_type = task
            say(str(Fix("lora_task_type", TEXT, task, "the model that is trained is of that kind")))

    def _note_how_loaded(self, model_args: ModelConfig) -> None:
        in_trainer = getattr(self.args, "model_init_kwargs", None)  # TRL's, for a model given by name
        how = self.loaded.get(str(model_args.model_name_or_path)) or in_trainer or {}
        model_args.model_revision = how.get("revision") or "main"
        if how.get("trust_remote_code"):
            model_args.trust_remote_code = True  # no field of TRL's, which has it among a trainer's arguments

    def prepare(self, *, constructed: bool = False) -> None:
        """Check the run and start vLLM, which loads while the trainer's model does; once for each trainer.

        Memory and disk wait for `check_trained`: this model may be a teacher, and adapters may come from the script.
        Done anew where arguments or model turn out not to be those it was done for.  `constructed`: by the trainer.
        """
        if not self.waiting:
            return
        from hf_dsvllm.session import Session, prepare

        if self.session is not None:
            if self.session.model_args is self.model_args and self._made_for == _settled(self.args):
                self._hand_arguments_to(self.session)
                return
            self._give_up(self.session)
        if self.trainers and asks_for_answers(self.args) and self.args.gen_eval_on_start:
            self.args.gen_eval_on_start = False
            say("gen_eval_on_start=False: the model of a second trainer may no longer be the one in its folder")
        with self.at_work():
            try:
                if self.model_args.model_name_or_path:
                    self.session = prepare(self.args, self.model_args, trained=False, constructed=constructed)
                else:
                    self.session = Session(self.args, self.model_args, self.preset, self.device)
            except DsvllmError as error:
                self.failed = error
                raise
        self._made_for = _settled(self.args)

    def check_trained(self, *, adapted: bool, four_bit: bool = False, dtype: str | None = None) -> None:
        """Raise ConfigError if what the trainer trains fits neither in memory nor on the disk.

        `adapted`: adapters are there that may be the script's own, of any kind and size: the least is counted for them.
        """
        from hf_dsvllm.checks import trained_problems

        settings = copy.copy(self.model_args)
        if dtype is not None:
            settings.dtype = dtype
        if adapted:
            settings.use_peft, settings.lora_r, settings.dtype = True, 1, dtype or "bfloat16"
            settings.load_in_4bit = settings.load_in_4bit or four_bit
        if problems := trained_problems(self.args, settings, self.preset, self.device):
            raise self.fail(*problems)

    def _hand_arguments_to(self, session: Session) -> None:
        """A copy of the arguments, such as a trainer makes, may differ in what only the forecast reads."""
        from hf_dsvllm.forecast import forecast

        if session.args is not self.args:
            session.args = self.args
            session.forecast = forecast(self.args, session.model_args, session.preset, session.device)

    def _give_up(self, session: Session) -> None:
        from hf_dsvllm.run_folder import leave

        say(f"what was prepared for {session.run_dir} is dropped: {script_line()} has other arguments or another model")
        session.stop_engine()
        if session.run_dir.absolute() not in self._given_out:
            leave(session.run_dir)
        self.session = None

    def give_out(self) -> Session:
        """The session, for the trainer that was made; what comes later is the next one's."""
        session, self.session, self.waiting = self.session, None, False
        if session is None:
            raise AssertionError("prepare makes a session once the arguments exist")
        self.trainers += 1
        self._given_out.add(session.run_dir.absolute())
        if self.described:
            self.model_args = None
        return session

    def refuse_evaluation(self, what: str) -> None:
        """Raise ConfigError if answers are asked of `what`, which writes no text."""
        asked = next((name for name in ("gen_eval_file", "gen_eval_lm_eval") if self.command.value(name)), None)
        if asked:
            raise self.fail(Problem(f"--{asked} asks for answers in text, {what} gives none", f"drop --{asked}"))


def innermost(model: Any) -> Any:
    """The script's own model, without what torch.compile and PEFT put around it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_name(model: Any) -> str:
    """The folder or hub name a model was loaded from; "" for one made from a configuration."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def task_type(cls: type, config: Any) -> str:
    """PEFT's task type for a model class; `config` tells encoder-decoders apart."""
    by_name = next((task for end, task in TASK_TYPES.items() if cls.__name__.endswith(end)), None)
    return by_name or ("SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else TEXT)


def _task_of_trainer(trainer: type) -> str:
    """The task type of a model that TRL's trainer loads by name."""
    return "SEQ_CLS" if any(base.__name__ == "RewardTrainer" for base in trainer.__mro__) else TEXT


def _settled(args: TrainingArguments) -> tuple[Any, ...]:
    return tuple(copy.copy(getattr(args, name, None)) for name in SETTLED)
