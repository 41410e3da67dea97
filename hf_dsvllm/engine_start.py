"""The vLLM of a run: what it serves, on what, with how much memory."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.console import say
from hf_dsvllm.engine.bodies import TransferBackend
from hf_dsvllm.engine.capabilities import why_no_transfer
from hf_dsvllm.engine.folder import writing_for_engine
from hf_dsvllm.engine.remote import RemoteServer
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.engine.spec import EngineSpec, find_vllm
from hf_dsvllm.engine_size import EngineSize, copies, gpus_needed, load_config, room_bytes, size_engine
from hf_dsvllm.errors import DsvllmError
from hf_dsvllm.export.adapter_format import why_merge_live
from hf_dsvllm.export.source import local_base
from hf_dsvllm.fields import trusts_remote_code
from hf_dsvllm.files import write_text
from hf_dsvllm.hardware import smallest_card
from hf_dsvllm.model_shape import load_shape
from hf_dsvllm.placement import Place, for_adapters
from hf_dsvllm.tasks import EvalTask
from hf_dsvllm.tensors.fourbit import dequantised_base

__all__ = ["follow_adapters", "start_engine"]


def start_engine(
    place: Place,
    args: Any,
    model_args: Any,
    tasks: Sequence[EvalTask],
    tokenizer: Any,
    quantization: Any,
    trainer_bytes: int | None = None,
) -> tuple[EngineServer | RemoteServer, Path | None]:
    """Start vLLM and return at once, while it loads; also the folder adapters are merged into, None to hot-load them.

    `quantization`: the trainer's BitsAndBytesConfig or None; `trainer_bytes`: what the trainer is predicted to
    hold of its GPU while vLLM answers, None where that is not known.
    """
    run_dir = Path(args.output_dir)
    place, backend = with_transfer(for_adapters(place, args) if model_args.use_peft else place, args)
    gpus, room = cache_room(place, args, model_args, trainer_bytes)
    size = size_engine(place, args, model_args, tasks, tokenizer, gpus=gpus, room=room)
    say(f"vLLM evaluates on {place.reason}; {size.reason}")
    model: Path | str = model_args.model_name_or_path
    if place.url is not None:
        merge_base = local_base(str(model), model_args.model_revision) if size.merge_adapters else None
        return RemoteServer(place.url), merge_base
    if quantization is not None:
        with writing_for_engine(run_dir):
            model = as_the_trainer_holds_it(model_args, quantization, run_dir)
    merge_base = local_base(str(model), model_args.model_revision) if size.merge_adapters else None
    spec = dataclasses.replace(engine_spec(model, place, size, args, model_args), weight_transfer=backend)
    template = tokenizer.chat_template if args.gen_eval_expose is not None else None
    if isinstance(template, str):  # training's own, for those who chat with the model; our prompts are token ids
        file = run_dir.absolute() / "engine" / "chat_template.jinja"
        with writing_for_engine(run_dir):
            write_text(file, template)
        spec = dataclasses.replace(spec, extra_args=("--chat-template", str(file), *spec.extra_args))
    return EngineServer.start(spec, run_dir), merge_base


def follow_adapters(model: Any, spec: EngineSpec, merge_base: Path | None) -> Path | None:
    """The folder adapters are merged into, now that they are there: a script's own may be others than were expected."""
    why = why_merge_live(model, spec.max_lora_rank)
    if why is None or merge_base is not None:
        return merge_base
    say(f"adapters are merged into a copy for vLLM: {why}")
    return local_base(str(spec.model), spec.revision)


def engine_spec(model: Path | str, place: Place, size: EngineSize, args: Any, model_args: Any) -> EngineSpec:
    """What `start_engine` starts."""
    of_one = tensor_parallel_size(place, args, model_args)
    together = copies(place, args.gen_eval_data_parallel, of_one)
    gpus = place.gpus[: of_one * together]  # none on CPUs
    if together > 1:
        say(f"{together} copies of vLLM share the prompts" + (f", on GPUs {', '.join(gpus)}" if gpus else ""))
    python = find_vllm(Path(args.vllm_python) if args.vllm_python else None)
    return EngineSpec(
        model=model,
        revision=None if Path(model).is_dir() else model_args.model_revision,
        python=python,
        device=place.device,
        dtype="float32" if place.device == "cpu" else "float16" if args.fp16 else "bfloat16",
        max_model_len=size.max_model_len,
        max_lora_rank=model_args.lora_r if model_args.use_peft and not size.merge_adapters else None,
        kv_cache_bytes=size.kv_cache_bytes,
        least_kv_cache_bytes=size.usual_cache_bytes,
        tensor_parallel_size=of_one,
        data_parallel_size=together,
        sleep_mode=place.stream and place.kind == "shared",
        enforce_eager=not size.compiled,
        trust_remote_code=trusts_remote_code(args, model_args),
        seed=args.seed,
        extra_args=tuple(shlex.split(args.vllm_args or "")),
        visible_devices=",".join(gpus) or None,
        cpu_threads=None if place.cpu_threads is None else max(1, place.cpu_threads // (of_one * together)),
    )


def with_transfer(place: Place, args: Any) -> tuple[Place, TransferBackend | None]:
    """`place` as this vLLM can have its weights, and how they go from GPU to GPU, None by disk.

    Where it cannot and was not asked to, all is as for weights by disk: adapters hot-loaded, nothing put to sleep.
    """
    if not place.stream:
        return place, None
    backend = transfer_backend(place, find_vllm(Path(args.vllm_python) if args.vllm_python else None))
    asked = args.gen_eval_weights == "stream"
    return place if backend or asked else dataclasses.replace(place, stream=False), backend


def transfer_backend(place: Place, python: Path) -> TransferBackend | None:
    """How weights go from GPU to GPU; None, and said why, where a vLLM prepared for it would not even start."""
    backend: TransferBackend = "ipc" if place.kind == "shared" else "nccl"
    why = why_no_transfer(python, backend)
    if why is None:
        return backend
    say(f"weights go to vLLM by disk: {why}")
    return None


def cache_room(place: Place, args: Any, model_args: Any, trainer_bytes: int | None) -> tuple[int, int | None]:
    """GPUs of one engine and the bytes each has for its cache; (1, None) where it makes do with little.

    On its own all that the weights leave; where it sleeps beside a trainer half of what both leave.
    """
    sleeps = place.kind == "shared" and place.stream
    if not (place.kind == "spare" or (sleeps and trainer_bytes is not None)):
        return 1, None
    weights = weights_bytes(model_args)
    if weights is None:
        return 1, None
    gpus = tensor_parallel_size(place, args, model_args)
    card = smallest_card(place.gpus)
    if card is None:
        return gpus, None
    total, free = card
    own = place.kind == "spare" or trainer_bytes is None
    held = total - free + (0 if own else trainer_bytes or 0)  # by others now, by the trainer later
    return gpus, room_bytes(total, weights // gpus, held, share=1.0 if own else 0.5)


def tensor_parallel_size(place: Place, args: Any, model_args: Any) -> int:
    """GPUs of one engine, from the size of the model and of the GPU; on CPUs its processes, one unless asked."""
    if place.device == "cpu":
        return args.gen_eval_tensor_parallel or 1
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    config = load_config(args, model_args)
    return gpus_needed(place, args.gen_eval_tensor_parallel, weights_bytes(model_args), gpu_bytes, config)


def weights_bytes(model_args: Any) -> int | None:
    """Of the model in 16 bit; None for an architecture that is not known."""
    try:
        return 2 * load_shape(model_args.model_name_or_path, revision=model_args.model_revision).parameters
    except DsvllmError:
        return None


def as_the_trainer_holds_it(model_args: Any, quantization: Any, run_dir: Path) -> Path:
    """The base as a QLoRA trainer holds it, in 16 bit, for the engine to put adapters on."""
    out = run_dir / "engine" / "base"
    shutil.rmtree(out, ignore_errors=True)
    dtype = getattr(torch, model_args.dtype)
    base = local_base(model_args.model_name_or_path, model_args.model_revision)
    return dequantised_base(base, quantization.to_dict(), out, dtype=dtype)
