"""Configurations that go wrong late or silently, found before a model is loaded.

Each trap is a function from a `Request` to the problems it sees; `find_problems` runs them all and returns every
problem at once.  What can be corrected without changing the meaning is a `Fix` instead and is printed with its reason.
Sources: DeepSpeed 0.19.8, transformers 5.19 and accelerate 1.15, read and run; more in docs/troubleshooting.md.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hf_dsvllm.ds_config import get_key, leaves, set_key, zero_stage
from hf_dsvllm.ds_keys import (
    AIO_KEYS,
    DATA_TYPE_KEYS,
    FILLED_AUTO,
    FILLED_AUTO_STAGE3,
    OFFLOAD_KEYS,
    REMOVED_OPTIMIZERS,
    REMOVED_TOP_LEVEL,
    REMOVED_ZERO,
    TOP_LEVEL_KEYS,
    ZERO_KEYS,
)
from hf_dsvllm.errors import Problem

__all__ = ["Fix", "Request", "correct", "find_problems", "fsdp_problems", "quant_storage_problems", "resume_problems"]

# Optimizers that keep their kind when DeepSpeed moves the optimizer to the host: DeepSpeedCPUAdam in AdamW mode,
# DeepSpeedCPUAdagrad, DeepSpeedCPULion.  Any other becomes DeepSpeedCPUAdam in its L2 mode (accelerate 1.15,
# utils/deepspeed.py, map_pytorch_optim_to_deepspeed).
_KEPT_ON_THE_HOST = frozenset(
    {"adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adagrad", "lion_32bit", "paged_lion_32bit"}
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The part of a run's arguments the traps look at; `config` is the DeepSpeed dictionary in force, if any.

    `trainer_values` maps DeepSpeed keys to the value the Trainer will insist on and the name of the argument it is.
    """

    config: dict[str, Any] | None
    world_size: int
    device: str
    optim: str = "adamw_torch_fused"
    optim_is_default: bool = True
    trainer_values: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    auto_find_batch_size: bool = False
    torch_compile: bool = False
    model_already_loaded: bool = False
    resuming: bool = False
    device_map: object = None
    quant_storage: str | None = None
    training_dtype: str = "bfloat16"
    accelerate_environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    onebit_available: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Fix:
    """One value changed for the user, and why."""

    key: str
    before: Any
    after: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} → {self.after} ({self.why})"


def correct(config: dict[str, Any]) -> tuple[dict[str, Any], list[Fix]]:
    """A copy of the user's DeepSpeed dictionary with the omissions filled whose silent default nobody wants."""
    config = copy.deepcopy(config)
    fixes: list[Fix] = []
    for key in ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key not in config and not (key != "gradient_clipping" and "train_batch_size" in config):
            config[key] = "auto"
            why = "omitted, DeepSpeed takes its own default and ignores the Trainer's value"
            fixes.append(Fix(f"deepspeed.{key}", "(omitted)", "auto", why))
    if zero_stage(config) == 3 and "stage3_gather_16bit_weights_on_model_save" not in config["zero_optimization"]:
        set_key(config, "zero_optimization.stage3_gather_16bit_weights_on_model_save", True)
        why = "without it a ZeRO-3 save writes shards and no usable safetensors"
        name = "deepspeed.zero_optimization.stage3_gather_16bit_weights_on_model_save"
        fixes.append(Fix(name, "(omitted)", True, why))
    return config, fixes


def find_problems(request: Request) -> list[Problem]:
    """Every trap this request would fall into, in reading order."""
    return [problem for trap in _TRAPS for problem in trap(request)]


def fsdp_problems(fsdp: object, environment: Mapping[str, str]) -> list[Problem]:
    """FSDP's shards are no weights that a snapshot, an evaluation or an export can read; it shows after the last step.

    `fsdp` is the Trainer's argument, `environment` that which accelerate launches processes with.
    """
    instead = "--ds_preset zero3 shards weights, gradients and optimizer as FSDP does"
    if fsdp:
        return [Problem(f"--fsdp {fsdp}: its shards can be neither evaluated nor exported", f"drop --fsdp; {instead}")]
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        return [
            Problem(
                "accelerate launch asks for FSDP (--config_file or default_config.yaml), whose shards can be neither "
                "evaluated nor exported",
                f"torchrun, or an accelerate config whose distributed_type is MULTI_GPU; {instead}",
            )
        ]
    return []


def _unknown_keys(request: Request) -> Iterator[Problem]:
    """DeepSpeed ignores unknown top-level keys: a typo in `zero_optimization` trains at stage 0."""
    config = request.config or {}
    levels = (
        ("", TOP_LEVEL_KEYS | frozenset(REMOVED_TOP_LEVEL)),
        ("zero_optimization", ZERO_KEYS | frozenset(REMOVED_ZERO)),
        ("zero_optimization.offload_optimizer", OFFLOAD_KEYS),
        ("zero_optimization.offload_param", OFFLOAD_KEYS),
        ("aio", AIO_KEYS),
        ("data_types", DATA_TYPE_KEYS),
    )
    for level, known in levels:
        block = get_key(config, level) if level else config
        if block is None:
            continue
        if not isinstance(block, dict):
            yield Problem(f"{level}={block!r} is not an object", f'write "{level.split(".")[-1]}": {{…}}')
            continue
        for key in block:
            if key in known:
                continue
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            where = f"{level}.{key}" if level else key
            fix = f"write {near[0]!r}" if near else "remove it"
            yield Problem(f"DeepSpeed does not know the key {where!r} and would ignore it silently", fix)


def _removed_keys(request: Request) -> Iterator[Problem]:
    config = request.config or {}
    for key, reason in REMOVED_TOP_LEVEL.items():
        if key in config:
            yield Problem(f"DeepSpeed removed {key!r}: {reason}", f"delete {key!r} from the DeepSpeed configuration")
    for key, reason in REMOVED_ZERO.items():
        if get_key(config, f"zero_optimization.{key}") is not None:
            yield Problem(f"DeepSpeed removed 'zero_optimization.{key}': {reason}", "delete the key")


def _removed_optimizers(request: Request) -> Iterator[Problem]:
    """The configuration still parses; the failure comes after the model is loaded."""
    name = get_key(request.config or {}, "optimizer.type")
    if isinstance(name, str) and name.lower() in REMOVED_OPTIMIZERS and not request.onebit_available:
        yield Problem(
            f"optimizer.type={name!r} is not in the installed DeepSpeed (removed in 0.19.7)",
            'pip install "deepspeed<=0.19.6", or remove the optimizer block and use --optim',
        )


def _dead_auto(request: Request) -> Iterator[Problem]:
    """The Trainer fills a fixed list of "auto" values; any other silently becomes DeepSpeed's default."""
    filled = FILLED_AUTO | (FILLED_AUTO_STAGE3 if zero_stage(request.config) == 3 else frozenset())
    for dotted, value in leaves(request.config or {}):
        if value == "auto" and dotted not in filled:
            yield Problem(
                f'{dotted}="auto" is filled in by nobody and would become DeepSpeed\'s default silently',
                f"give {dotted} a value or remove it",
            )


def _mismatches(request: Request) -> Iterator[Problem]:
    """The Trainer raises these only in train(), after loading and tokenising."""
    for key, (value, source) in request.trainer_values.items():
        given = get_key(request.config or {}, key, "auto")
        if given != "auto" and given is not None and given != value:
            yield Problem(f"deepspeed {key}={given} but {source}={value}", f'set {key} to "auto"')


def _replaced_optimizer(request: Request) -> Iterator[Problem]:
    """Offload swaps the optimizer for DeepSpeed's own: 8-bit AdamW, Adafactor and SGD all become Adam, not AdamW."""
    device = get_key(request.config or {}, "zero_optimization.offload_optimizer.device", "none")
    if device not in ("cpu", "nvme") or get_key(request.config or {}, "optimizer.type") is not None:
        return
    if get_key(request.config or {}, "zero_force_ds_cpu_optimizer", True) is False:
        return
    if request.optim not in _KEPT_ON_THE_HOST:
        yield Problem(
            f"optim={request.optim} would silently become Adam with L2 regularisation, not AdamW: the optimizer is "
            f"offloaded to {device}",
            f"--optim adamw_torch, or a preset without optimizer offload to keep {request.optim}",
        )


def _optimizer_block(request: Request) -> Iterator[Problem]:
    """An `optimizer` block wins over --optim, and needs a CUDA compiler for FusedAdam."""
    name = get_key(request.config or {}, "optimizer.type")
    if not isinstance(name, str):
        return
    if not request.optim_is_default:
        yield Problem(
            f"optim={request.optim} would be ignored: the DeepSpeed configuration has optimizer.type={name!r}",
            "remove the optimizer block (the Trainer then builds the optimizer) or drop --optim",
        )
    offloaded = get_key(request.config or {}, "zero_optimization.offload_optimizer.device", "none") != "none"
    if name.lower() in ("adam", "adamw") and request.device == "cuda" and not offloaded and not shutil.which("nvcc"):
        yield Problem(
            f"optimizer.type={name!r} compiles DeepSpeed's FusedAdam, and no nvcc is on the PATH",
            "remove the optimizer block: --optim adamw_torch_fused needs no compiler",
        )


def _split_optimizer(request: Request) -> Iterator[Problem]:
    """Twin-Flow's share on the GPU has an AdamW of its own, made once (stage3.py, backup_optimizer).

    Its first group keeps the learning rate of that moment, and checkpoints hold none of its moments: docs/lab-notes.md.
    """
    config = request.config or {}
    offloaded = get_key(config, "zero_optimization.offload_optimizer.device", "none") != "none"
    ratio = get_key(config, "zero_optimization.offload_optimizer.ratio", 1.0)
    if zero_stage(config) == 3 and offloaded and isinstance(ratio, (int, float)) and ratio < 1:
        yield Problem(
            f"offload_optimizer.ratio={ratio}: DeepSpeed steps the share on the GPU with a learning rate that no "
            "schedule changes, and leaves its moments out of checkpoints",
            "remove ratio: the whole optimizer on the host, as --ds_preset zero3_offload_optimizer has it",
        )


def _nvme_path(request: Request) -> Iterator[Problem]:
    for block in ("offload_optimizer", "offload_param"):
        device = get_key(request.config or {}, f"zero_optimization.{block}.device")
        path = get_key(request.config or {}, f"zero_optimization.{block}.nvme_path")
        if device == "nvme" and str(path).lower() in ("none", ""):
            yield Problem(
                f"zero_optimization.{block} goes to NVMe and its nvme_path is {path!r}",
                f'"nvme_path": a folder on a local NVMe disk, in zero_optimization.{block}',
            )


def _resume(request: Request) -> Iterator[Problem]:
    if request.resuming:
        yield from resume_problems(request.config)


def resume_problems(config: Mapping[str, Any] | None) -> Iterator[Problem]:
    """An optimizer on NVMe: DeepSpeed 0.19.8 skips the ZeRO checkpoint, and Adam's step count with it, when it loads.

    Measured: the second resumed step had a loss of 7.27, that of the uninterrupted run 5.66 (docs/lab-notes.md).
    """
    if get_key(config or {}, "zero_optimization.offload_optimizer.device") == "nvme":
        yield Problem(
            "DeepSpeed does not restore an optimizer that lies on NVMe: the resumed run would be another one, silently",
            "start a new run from the checkpoint's weights (--model_name_or_path CHECKPOINT), or train with "
            "zero3_offload, which resumes exactly",
        )


def _two_sources(request: Request) -> Iterator[Problem]:
    """accelerate's YAML (also the default_config.yaml it picks up unasked) and a DeepSpeed configuration."""
    env = request.accelerate_environment
    if request.config is not None and env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        yield Problem(
            "accelerate launch brings a DeepSpeed configuration of its own (from --config_file or default_config.yaml)",
            "start with torchrun, or with an accelerate config whose distributed_type is MULTI_GPU",
        )


def _model_before_arguments(request: Request) -> Iterator[Problem]:
    """ZeRO-3 shards a model while it loads, and only if the arguments exist by then."""
    if zero_stage(request.config) == 3 and request.model_already_loaded:
        yield Problem(
            "a model was loaded before the training arguments: under ZeRO-3 each process then holds all of it",
            "create the training arguments first, call from_pretrained after",
        )
    if zero_stage(request.config) == 3 and request.device_map is not None:
        yield Problem(
            f"device_map={request.device_map!r} places whole weights, ZeRO-3 shards them: they exclude each other",
            "remove device_map",
        )


def _quant_storage(request: Request) -> Iterator[Problem]:
    if request.config is not None and request.quant_storage is not None:
        yield from quant_storage_problems(request.quant_storage, request.training_dtype, zero_stage(request.config))


def quant_storage_problems(storage: str, training_dtype: str, stage: int) -> Iterator[Problem]:
    """Storage of another type than DeepSpeed's engine has: 16 bit is corrupted silently, fp32 crashes."""
    if storage == "uint8" and stage == 3:
        yield Problem(
            "bnb_4bit_quant_storage=uint8 under ZeRO-3: integer tensors cannot be partitioned",
            f"bnb_4bit_quant_storage={training_dtype}",
        )
    elif storage not in ("uint8", training_dtype):
        yield Problem(
            f"bnb_4bit_quant_storage={storage} while training in {training_dtype}: "
            "DeepSpeed casts the packed 4-bit bytes and corrupts the weights silently",
            f"bnb_4bit_quant_storage={training_dtype}" + ("" if stage == 3 else " or uint8"),
        )


def _auto_batch(request: Request) -> Iterator[Problem]:
    if request.auto_find_batch_size and zero_stage(request.config) == 3:
        yield Problem(
            "auto_find_batch_size cannot restart a ZeRO-3 engine: the Trainer refuses it after loading",
            "set --per_device_train_batch_size, and gradient checkpointing if it does not fit",
        )


def _deepcompile(request: Request) -> Iterator[Problem]:
    if get_key(request.config or {}, "compile.deepcompile") and not request.torch_compile:
        yield Problem("compile.deepcompile only logs unless the engine is compiled", "--torch_compile")


_TRAPS: tuple[Callable[[Request], Iterator[Problem]], ...] = (
    _unknown_keys,
    _removed_keys,
    _removed_optimizers,
    _dead_auto,
    _mismatches,
    _replaced_optimizer,
    _optimizer_block,
    _split_optimizer,
    _nvme_path,
    _resume,
    _two_sources,
    _model_before_arguments,
    _quant_storage,
    _auto_batch,
    _deepcompile,
)
