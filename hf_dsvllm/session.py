"""One run from the script's side: `prepare` before the model is loaded, `attach` once the trainer exists.

session = prepare(args, model_args)          # checks everything, starts vLLM while the model loads
trainer = SFTTrainer(model=model_args.model_name_or_path, args=args, …,
                     peft_config=session.peft_config, quantization_config=session.quantization_config)
session.attach(trainer)
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from hf_dsvllm import adapters, onebit, speedups
from hf_dsvllm._compat import keep_4bit_weights_packed, keep_out_of_uploads
from hf_dsvllm.arguments import full_dtype, on_one_gpu, resolve_preset, training_device
from hf_dsvllm.auto import keep_activations, sum_gradients
from hf_dsvllm.callback import SessionCallback
from hf_dsvllm.checks import check_before_loading, expert_problems, load_tokenizer, predict_memory
from hf_dsvllm.console import is_main_process, say
from hf_dsvllm.ds_config import swap_buffer_elements, zero_stage
from hf_dsvllm.ending import EXPORTS, remove_engine_copies, weights_lost, write_end
from hf_dsvllm.engine.remote import RemoteServer
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.engine_size import largest_parameter
from hf_dsvllm.engine_start import follow_adapters, start_engine
from hf_dsvllm.errors import ConfigError, DsvllmError, ExportError, GpuMemoryError, WiringError
from hf_dsvllm.evaluation.canary import Canary, canary_of
from hf_dsvllm.evaluation.evaluator import EVALS, Evaluator
from hf_dsvllm.evaluation.result import Sampling, harness_tasks, lower_is_better
from hf_dsvllm.evaluation.steering import Steering
from hf_dsvllm.export.adapter_format import serving_problems
from hf_dsvllm.export.fingerprint import fingerprint_of
from hf_dsvllm.export.source import base_commit
from hf_dsvllm.export.trained import trained_record
from hf_dsvllm.features import choose
from hf_dsvllm.fields import asks_for_answers, trusts_remote_code
from hf_dsvllm.files import write_json
from hf_dsvllm.forecast import as_trained, forecast, held_beside, out_of_memory_advice
from hf_dsvllm.launch import read_launch
from hf_dsvllm.live.snapshot import SNAPSHOTS, Snapshot
from hf_dsvllm.measure import RunMeasure
from hf_dsvllm.model_shape import load_shape
from hf_dsvllm.placement import Place, choose_place, visible_gpus
from hf_dsvllm.ranks import Ranks
from hf_dsvllm.run_folder import leave, occupy, set_aside_earlier_run
from hf_dsvllm.tasks import load_tasks
from hf_dsvllm.traps import Fix, fsdp_problems
from hf_dsvllm.wiring import Wiring, check_ranks_agree

__all__ = ["Session", "prepare"]

# Ranks that wait for rank 0 notice its death at once; this only bounds a first start, an evaluation or an export.
PATIENCE_S = 24 * 3600.0
PACKAGES = ("hf-dsvllm", "torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "trl")


def prepare(args: Any, model_args: Any, *, trained: bool = True, constructed: bool = False) -> Session:
    """Check a run before its model is loaded, settle adapters and dtype, start vLLM; collective, call on every rank.

    `args` come from `with_presets(…)`; `model_args` is TRL's `ModelConfig` (or a subclass), changed in place where the
    preset asks for it, each change printed.  Raises ConfigError with every problem found.  `trained` False: another
    model may be the one trained, and memory and disk are left to `checks.trained_problems`.  `constructed`: the trainer
    is there already and has taken its batch and recompute from the arguments.
    """
    preset = resolve_preset(args)
    device = training_device(args)
    if preset is not None:
        dtype = full_dtype(preset, device, adapters.training_dtype(args))
        fixes = adapters.apply_to_model_config(model_args, preset, device=device, full_dtype=dtype)
        for settle in () if constructed else (keep_activations, sum_gradients):
            fixes = [*fixes, *settle(args, model_args, preset, device)]
        for fix in fixes:
            say(str(fix))
    session = Session(args, model_args, preset, device)
    stage = None if session.ds_config is None else zero_stage(session.ds_config)
    problems = adapters.adapter_problems(model_args, preset, stage=stage, training=adapters.training_dtype(args))
    problems += check_before_loading(args, model_args, preset, device, session.tasks, trained=trained)
    problems += fsdp_problems(args.fsdp, os.environ)
    if trained:  # not where a script loads a model, which it may do on one rank alone
        check_ranks_agree(args)
    if problems:
        raise ConfigError(problems)
    if preset is not None and preset.offload_param == "nvme":
        _fit_swap_buffers(args, model_args)
    if is_main_process():
        for path in occupy(session.run_dir):
            say(f"removed {path}, half written by a run that was killed")
    if session.evaluates:
        session.start_engine()
    return session


class Session:
    """The live parts of one run; made by `prepare`."""

    def __init__(self, args: Any, model_args: Any, preset: Any, device: str) -> None:
        self.args = args
        self.model_args = model_args
        self.preset = preset
        self.device = device
        self.run_dir = Path(args.output_dir)
        self.tasks = load_tasks(args)
        self.server: EngineServer | RemoteServer | None = None
        self.forecast = forecast(args, model_args, preset, device)
        self.ranks = Ranks(PATIENCE_S)
        self.place = self._choose_place() if self.evaluates else None
        self.canary: Canary | None = None
        self._evaluator: Evaluator | None = None
        self._merge_base: Path | None = None

    @property
    def evaluates(self) -> bool:
        """Whether this run evaluates by generation."""
        return asks_for_answers(self.args)

    @property
    def features(self) -> frozenset[str]:
        """The speed features in force; without a preset nothing is changed."""
        return choose(self.args.ds_speed) if self.preset is not None else frozenset()

    @property
    def late(self) -> bool:
        """Whether training goes on while vLLM answers."""
        return self.place is not None and self.place.late

    @property
    def streams(self) -> bool:
        """Whether weights go to vLLM from GPU to GPU; what rank 0 says holds, since it has started the engine."""
        wanted = self.place is not None and self.place.stream
        return wanted and (self.server is None or self.server.spec.weight_transfer is not None)

    @property
    def ds_config(self) -> dict[str, Any] | None:
        """The DeepSpeed dictionary in force."""
        return self.args.deepspeed if isinstance(self.args.deepspeed, dict) else None

    @property
    def peft_config(self) -> Any:
        """TRL's adapter configuration of this run, None for a full fine-tune."""
        return adapters.peft_config_of(self.model_args)

    @property
    def quantization_config(self) -> Any:
        """TRL's 4-bit configuration of this run, None for 16-bit weights."""
        from trl import get_quantization_config

        return get_quantization_config(self.model_args)

    @property
    def snapshot_dtype(self) -> torch.dtype:
        """bf16, or fp16 where training is, as it will ship; float32 on CPUs, as the engine: greedy answers agree."""
        if self.device == "cpu":
            return torch.float32
        return torch.float16 if self.args.fp16 else torch.bfloat16

    @property
    def evaluator(self) -> Evaluator:
        """Rank 0's evaluator."""
        if self._evaluator is None:
            raise WiringError("no evaluator: call session.attach(trainer) after making the trainer")
        return self._evaluator

    def model_init_kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`: dtype, attention, revision, and no splitting over GPUs by accident."""
        return {
            "dtype": self.model_args.dtype,
            "revision": self.model_args.model_revision,
            "attn_implementation": self.model_args.attn_implementation,
            **on_one_gpu(self.args),
        }

    def load_model(self) -> Any:
        """The model with 4-bit weights and adapters as the preset says, for a plain Trainer (TRL loads its own)."""
        from transformers import AutoModelForCausalLM, set_seed

        set_seed(self.args.seed)  # adapters start at random, before the Trainer seeds anything
        quantization = self.quantization_config
        model = AutoModelForCausalLM.from_pretrained(
            self.model_args.model_name_or_path,
            quantization_config=quantization,
            trust_remote_code=trusts_remote_code(self.args, self.model_args),
            **self.model_init_kwargs(),
        )
        return adapters.wrap(model, self.peft_config, self.args) if self.peft_config is not None else model

    def start_engine(self) -> None:
        """Start vLLM on rank 0 and return at once: it loads while the trainer's model does."""
        if not is_main_process():
            return
        assert self.place is not None
        self.server, self._merge_base = start_engine(
            self.place,
            self.args,
            self.model_args,
            self.tasks,
            self._tokenizer(),
            self.quantization_config,
            None if self.forecast is None else held_beside(self.forecast),
        )

    def _choose_place(self) -> Place:
        visible = visible_gpus() if self.device == "cuda" else []
        return choose_place(self.args, self.device, read_launch(), visible)

    def attach(self, trainer: Any) -> None:
        """Add the callback to `trainer`; it checks the wiring when training begins and evaluates on the way."""
        check_ranks_agree(self.args)
        touched = keep_4bit_weights_packed(trainer.model)
        if touched:
            say(f"{touched} 4-bit layers: repacking in evaluation disabled (it corrupts training on AVX512-BF16 CPUs)")
        asked = self.args.ds_speed or ()
        for line in speedups.worth_saying(speedups.apply(trainer, self.features), asked):
            say(line)
        if self.preset is not None and self.preset.needs_onebit:
            onebit.attach(trainer)
        problems = expert_problems(trainer.model, self.ds_config, read_launch().world_size)
        problems += serving_problems(trainer.model) if self.evaluates else []
        if problems:
            raise ConfigError(problems)
        if self.evaluates:
            exact = self.place is not None and self.device == self.place.device == "cpu"
            self.canary = canary_of(trainer, self.tasks, exact=exact)
        self.ready_engine(trainer)
        keep_out_of_uploads(trainer)
        scores = SessionCallback(self, trainer)
        trainer.add_callback(scores)
        # Early stopping and best-model selection read the scores this callback adds, so it comes first.
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        trainer.add_callback(Steering(scores, trainer))
        trainer.train = self._explaining_memory(speedups.only_while_training(trainer))

    def ready_engine(self, trainer: Any) -> None:
        """The evaluator of rank 0, its engine started again where an earlier training ended with it."""
        if not (self.evaluates and is_main_process()) or self._evaluator is not None:
            return
        if self.server is None:
            self.start_engine()
        assert self.server is not None
        if isinstance(self.server, EngineServer):
            self._merge_base = follow_adapters(trainer.model, self.server.spec, self._merge_base)
        self._evaluator = Evaluator(
            server=self.server,
            tasks=self.tasks,
            tokenizer=trainer.processing_class,
            sampling=self._sampling(trainer),
            run_dir=self.run_dir,
            merge_base=self._merge_base,
            canary=self.canary,
            harness=harness_tasks(self.args, self.model_args),
            expose_port=self.args.gen_eval_expose,
            lower_is_better=lower_is_better(self.args),
        )

    def _explaining_memory(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """`train`, with an answer where the GPU runs out of memory: callbacks never see that error."""

        @functools.wraps(train)
        def explained(*args: Any, **kwargs: Any) -> Any:
            try:
                with speedups.attention_order(self.features):
                    return train(*args, **kwargs)
            except BaseException as error:
                # The interpreter waits for threads that wait for answers; a later train() starts another engine.
                self.stop_engine()
                if isinstance(error, torch.OutOfMemoryError):
                    raise GpuMemoryError(out_of_memory_advice(self.forecast, str(error))) from error
                raise

        return explained

    def start_record(self, trainer: Any, wiring: Wiring) -> None:
        """Write run.json, ds_config.json and the tokenizer as trained; rank 0."""
        if not is_main_process():
            return
        self.forecast = as_trained(self.forecast, trainer, wiring)
        if trainer.state.global_step == 0:
            # An explicit folder is the user's to keep or to overwrite, and a second trainer of a script has one.
            exports = () if self.args.export_to else EXPORTS
            set_aside_earlier_run(self.run_dir, evals=EVALS, snapshots=SNAPSHOTS, exports=exports)
        name = str(self.model_args.model_name_or_path)
        commit = base_commit(name, self.model_args.model_revision)
        record = {
            "base_model": name,
            "base_revision": commit,
            "base_fingerprint": fingerprint_of(name, commit),
            "preset": self.args.ds_preset,
            "adapter": _adapter_name(self.model_args),
            "quantization": adapters.quantization_record(trainer.model),
            "dtype": adapters.dtype_in_training(trainer.model, self.model_args),
            "device": self.device,
            "world_size": wiring.world_size,
            "zero_stage": wiring.zero_stage,
            "trainable_parameters": wiring.trainable_parameters,
            "predicted_gib": self._predicted_gib(),
            "versions": _versions(),
            **trained_record(trainer),
        }
        write_json(self.run_dir / "run.json", record)
        if self.forecast is not None:
            write_json(self.run_dir / "plan.json", {"predicted": self.forecast.as_record()})
        if self.ds_config is not None:
            # As the Trainer filled it in, with a number for every "auto".
            write_json(self.run_dir / "ds_config.json", self.args.hf_deepspeed_config.config)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(self.run_dir / "tokenizer")

    def _predicted_gib(self) -> float | None:
        """Least memory of the main process by the formulas, GiB; None for architectures they do not know."""
        try:
            shape = load_shape(self.model_args.model_name_or_path, revision=self.model_args.model_revision)
        except DsvllmError:
            return None
        memory = predict_memory(self.args, self.model_args, self.preset, self.device, shape)
        return None if memory is None else round(memory.peak_bytes / 2**30, 2)

    def stop_engine(self) -> None:
        """Stop vLLM for good and free its memory; safe to call twice.  A later training starts another."""
        evaluator, server = self._evaluator, self.server
        self._evaluator = self.server = None
        if evaluator is not None:
            evaluator.close()
        elif server is not None:
            server.close()
        if evaluator is not None or server is not None:
            remove_engine_copies(self.run_dir)

    def finish(self, measure: RunMeasure, snapshot: Snapshot) -> None:
        """Write measured.json, export the last snapshot; what fails of it is an error on every rank."""
        failed: list[str] = []
        if is_main_process():
            failed = write_end(self.run_dir, self.forecast, measure.as_record(), self.args.export_to, snapshot)
            leave(self.run_dir)
        failed = self.ranks.broadcast(failed)
        if failed:
            say(f"training is complete and its weights are in {snapshot.path}")
            raise ExportError("; ".join(failed))

    def end_without_weights(self, why: str) -> NoReturn:
        """Raise ExportError for last weights that could not be written, with what there is instead; on every rank."""
        leave(self.run_dir)
        raise weights_lost(self.run_dir, why)

    def _sampling(self, trainer: Any) -> Sampling:
        return Sampling(
            max_new_tokens=self.args.gen_eval_max_new_tokens,
            temperature=self.args.gen_eval_temperature,
            samples=self.args.gen_eval_samples,
            seed=self.args.seed,
            timeout_s=self.args.gen_eval_timeout,
            stop_token_ids=stop_tokens(trainer.model, trainer.processing_class),
        )

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.args, self.model_args)


def stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: the generation config's end tokens and the tokenizer's."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    tokens = listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(t for t in [*tokens, tokenizer.eos_token_id] if t is not None))


def _fit_swap_buffers(args: Any, model_args: Any) -> None:
    """Shrink DeepSpeed's NVMe buffers to the model: made before it was known, they hold the largest there is."""
    largest = largest_parameter(args, model_args)
    if largest is None:
        return
    offload = args.hf_deepspeed_config.config["zero_optimization"]["offload_param"]
    before, fitting = offload["buffer_size"], swap_buffer_elements(largest, read_launch().world_size)
    if fitting != before:
        offload["buffer_size"] = fitting
        why = f"holds a rank's part of this model's largest parameter ({largest:,} elements)"
        say(str(Fix("offload_param.buffer_size", before, fitting, why)))


def _adapter_name(model_args: Any) -> str | None:
    if not model_args.use_peft:
        return None
    return "qlora" if model_args.load_in_4bit else "lora"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
