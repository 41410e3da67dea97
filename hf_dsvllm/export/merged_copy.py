"""A merged copy of a base and an adapter for the engine, where vLLM refuses the adapter or serves it slowly.

Not an export: nothing is verified or kept, the next evaluation replaces it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from hf_dsvllm._compat import outside_zero3
from hf_dsvllm.export.layout import merged_layout
from hf_dsvllm.export.merge import read_adapter
from hf_dsvllm.files import atomic_folder, write_json
from hf_dsvllm.tensors.shards import write_shards
from hf_dsvllm.tensors.weights import TensorFolder, check_free_disk

__all__ = ["merged_copy", "same_shape"]

# What a running engine cannot change by reading new weights: it would leave an untied output head out without a word.
SHAPE_KEYS = ("tie_word_embeddings", "vocab_size")


@outside_zero3()
def merged_copy(base: Path, adapter: Path, out: Path, *, dtype: torch.dtype) -> Path:
    """Write `base` with the PEFT adapter folder `adapter` merged in, in `dtype`, to `out`, replacing what was there.

    Tensor by tensor: two shards of memory at most.  Raises ExportError if the adapter does not fit the base or the disk
    is full.
    """
    shutil.rmtree(out, ignore_errors=True)
    with TensorFolder(base) as tensors:
        layout = merged_layout(base, tensors, read_adapter(adapter), base_dtype=None, dtype=dtype, quantization=None)
        check_free_disk(out, layout.weights_bytes)
        with atomic_folder(out) as folder:
            write_shards(
                folder,
                layout.plan,
                layout.produce,
                working_bytes=layout.working_bytes,
                memory_bytes=layout.memory_bytes,
            )
            config = json.loads((base / "config.json").read_text(encoding="utf-8"))
            config.pop("torch_dtype", None)
            changes = layout.config_changes | {"dtype": str(dtype).removeprefix("torch.")}
            write_json(folder / "config.json", config | changes)
    return out


def same_shape(folder: Path, served: Path | str) -> bool:
    """Whether an engine started from `served` can read the weights in `folder` in place of its own."""
    configs = [json.loads((Path(each) / "config.json").read_text(encoding="utf-8")) for each in (folder, served)]
    return all(configs[0].get(key) == configs[1].get(key) for key in SHAPE_KEYS)
