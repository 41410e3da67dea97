"""What one rank's run knows: the preset, the script's arguments and model, the session; and how it fails."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_dsvllm.auto import is_auto
from hf_dsvllm.console import say
from hf_dsvllm.errors import ConfigError, DsvllmError, Problem
from hf_dsvllm.fields import asks_for_answers
from hf_dsvllm.presets import Preset, get_preset
from hf_dsvllm.run.command import Command

if TYPE_CHECKING:
    from hf_dsvllm.session import Session

__all__ = ["Run", "model_name", "task_type"]

# LoRA's task types by the end of the model's class name; PEFT trains the new head of these (read in peft 0.21).
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class Run:
    """The state of a rank.  `lines` says which door took and where in the script; `trainers` counts finished ones.

    `constructing` and `busy` count how deep we are in a trainer's constructor, and in work of a trainer or of our own:
    models loaded there are no business of ours.
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
        self.model_args: Any = None
        self.session: Session | None = None

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

    def describe_model(self, name: str, cls: type | None, config: Any, **more: Any) -> None:
        """Put a model the script loads by itself in TRL's words, with the preset's adapter.

        The dtype counts for 4-bit weights alone: otherwise the script's own choice stays.
        """
        from trl import ModelConfig

        from hf_dsvllm import adapters

        device = self.device
        full = adapters.full_dtype(self.preset, device) if self.preset is not None else "float32"
        self.model_args = ModelConfig(
            model_name_or_path=name,
            dtype=full,
            lora_task_type=task_type(cls, config),
            model_revision=more.get("revision") or "main",
            **self.command.adapter.chosen(),
        )
        if more.get("trust_remote_code"):
            self.model_args.trust_remote_code = True
        if self.preset is not None:
            for fix in adapters.apply_to_model_config(self.model_args, self.preset, device=device, full_dtype=full):
                say(str(fix))

    def forget_another_model(self, model: Any) -> None:
        """Not the first model loaded is trained, but `model`: a teacher came first, or this is a second trainer."""
        name = model if isinstance(model, str) else model_name(model)
        if not name or self.model_args is None or str(self.model_args.model_name_or_path) == name:
            return
        if self.session is not None:
            self.session.stop_engine()
            self.session = None
        self.model_args = dataclasses.replace(self.model_args, model_name_or_path=name)

    def prepare(self) -> None:
        """Check the run and start vLLM, which loads while the trainer's model does; once for each trainer."""
        if self.session is not None or self.args is None:
            return
        from hf_dsvllm.session import Session, prepare

        if self.trainers and asks_for_answers(self.args) and self.args.gen_eval_on_start:
            self.args.gen_eval_on_start = False
            say("gen_eval_on_start=False: the model of a second trainer may no longer be the one in its folder")
        with self.at_work():
            try:
                if self.model_args.model_name_or_path:
                    self.session = prepare(self.args, self.model_args)
                else:
                    self.session = Session(self.args, self.model_args, self.preset, self.device)
            except DsvllmError as error:
                self.failed = error
                raise

    def refuse_evaluation(self, what: str) -> None:
        """Raise ConfigError if answers are asked of `what`, which writes no text."""
        asked = next((name for name in ("gen_eval_file", "gen_eval_lm_eval") if self.command.value(name)), None)
        if asked:
            raise self.fail(Problem(f"--{asked} asks for answers in text, {what} gives none", f"drop --{asked}"))


def model_name(model: Any) -> str:
    """The folder or hub name a model was loaded from; "" for one made from a configuration."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def task_type(cls: type | None, config: Any) -> str:
    """PEFT's task type for a model class; `config` tells encoder-decoders apart."""
    if cls is None:
        return "CAUSAL_LM"
    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in TASK_TYPES.items() if cls.__name__.endswith(end)), "CAUSAL_LM")
