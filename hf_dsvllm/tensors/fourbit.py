"""The base model as a QLoRA trainer holds it: every quantised weight taken to 4 bit and back.

Merging an adapter into the original 16-bit base gives a model that nobody trained; measured, that error is as large as
the adapter's own effect.  So the base is quantised again, exactly as transformers does, and dequantised once.
"""

from __future__ import annotations

import contextlib
import contextvars
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm._compat import outside_zero3
from hf_dsvllm.errors import ExportError, MissingDependencyError
from hf_dsvllm.files import atomic_folder, write_json
from hf_dsvllm.precision import Precision, held_in_fp32
from hf_dsvllm.tensors.shards import write_shards
from hf_dsvllm.tensors.staging import CPU
from hf_dsvllm.tensors.weights import TensorFolder, TensorPlan, check_free_disk

__all__ = [
    "MERGE_BYTES_PER_ELEMENT",
    "beside_training",
    "dequantised_base",
    "merge_place",
    "quantised_weights",
    "round_trip",
]

# fp32 weight, product, merged value and norm of one element; measured on DoRA, the most expensive kind
MERGE_BYTES_PER_ELEMENT = 16
# Left free on a GPU that a trainer may still be using
GPU_MARGIN_BYTES = 2 << 30
_beside_training: contextvars.ContextVar[bool] = contextvars.ContextVar("beside_training", default=False)


@contextlib.contextmanager
def beside_training() -> Iterator[None]:
    """Merging in the block leaves the GPU alone: what is free on it now, the next training step may need."""
    token = _beside_training.set(True)
    try:
        yield
    finally:
        _beside_training.reset(token)


def quantised_weights(base: Path, quantization: Mapping[str, Any]) -> frozenset[str]:
    """Names of the weights that transformers' bitsandbytes quantiser turns to 4 bit for the model in `base`.

    The quantiser itself is run on a model without memory (meta device), so its own skip rules decide: output head,
    tied weights, the last module, `llm_int8_skip_modules`, modules kept in fp32.
    """
    return _quantised(_on_meta(base, quantization))


def _on_meta(base: Path, quantization: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    known = {key: value for key, value in quantization.items() if key.startswith(("bnb_4bit_", "llm_int8_"))}
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True, **known))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    quantizer.preprocess_model(model=model, device_map=None)
    return model


def _quantised(model: Any) -> frozenset[str]:
    linear4bit = _bitsandbytes().nn.Linear4bit
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, linear4bit))


def round_trip(weight: torch.Tensor, quantization: Mapping[str, Any]) -> torch.Tensor:
    """`weight` (2-D, in the dtype the trainer loaded it in) through 4 bit and back where it lies; same shape, dtype.

    Blocks of 64 (transformers offers no other), fp4 or nf4, statistics quantised again if `bnb_4bit_use_double_quant`.
    """
    functional = _bitsandbytes().functional
    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        blocksize=64,
        compress_statistics=bool(quantization.get("bnb_4bit_use_double_quant", False)),
        quant_type=quantization.get("bnb_4bit_quant_type", "fp4"),
    )
    return functional.dequantize_4bit(packed, state)


def merge_place(largest_bytes: int) -> tuple[torch.device, int | None]:
    """Where tensors are merged of which one takes up to `largest_bytes`, and the bytes that all may take there.

    The GPU, and what is free on it but for a margin; the CPU (whose memory is bounded by who writes) where there is
    none, no room for even one, or a trainer at work (`beside_training`).
    """
    usable = torch.cuda.is_available() and not _beside_training.get()
    free = torch.cuda.mem_get_info()[0] - GPU_MARGIN_BYTES if usable else 0
    return (torch.device("cuda", torch.cuda.current_device()), free) if free > largest_bytes else (CPU, None)


@outside_zero3()
def dequantised_base(
    base: Path, quantization: Mapping[str, Any], out: Path, *, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the model in `base` with 4-bit round-tripped weights to the new folder `out`, for serving adapters on it.

    `dtype` is the one the trainer loads the base in.  Everything else in the folder (configuration, tokenizer) is
    copied.  Raises ExportError if `out` exists, the disk is full, or a quantised weight is not in the base's files.
    """
    if out.exists():
        raise ExportError(f"{out} exists already; name another folder or remove it.")
    with TensorFolder(base) as tensors:
        model = _on_meta(base, quantization)
        quantised, precision = _quantised(model), Precision(dtype=dtype, held=held_in_fp32(model))
        unknown = sorted(quantised - set(tensors.names))
        if unknown:
            raise ExportError(f"{len(unknown)} quantised weights are not in {base} under that name: {unknown[:3]}.")
        plan = [
            TensorPlan(name=name, shape=tensors.shape(name), dtype=precision.of(name, tensors.dtype(name)))
            for name in tensors.names
        ]
        check_free_disk(out, sum(planned.size_bytes for planned in plan))

        # On the GPU where there is room: it takes seconds instead of minutes.
        device, room = merge_place(max((planned.elements for planned in plan), default=0) * MERGE_BYTES_PER_ELEMENT)

        def produce(name: str) -> torch.Tensor:
            weight = precision.cast(name, tensors.get(name, device))
            return round_trip(weight, quantization) if name in quantised else weight

        with atomic_folder(out) as folder:
            write_shards(
                folder,
                plan,
                produce,
                working_bytes=lambda planned: planned.elements * MERGE_BYTES_PER_ELEMENT,
                memory_bytes=room,
            )
            _copy_rest(base, folder, dtype)
    return out


def _copy_rest(base: Path, folder: Path, dtype: torch.dtype) -> None:
    import json

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    for file in base.iterdir():
        weights = file.suffix in {".safetensors", ".bin", ".gguf", ".pth"} or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != "config.json" and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingDependencyError("A QLoRA run needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes
