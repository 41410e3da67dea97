"""A short name for the weights of a model folder, so that a run can say which base it was trained on.

Every tensor's name, shape and dtype and its first and last numbers: milliseconds for any model, the same however the
model is cut into shards, and another for another training of the same architecture.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.source import local_base
from hf_dsvllm.tensors.weights import TensorFolder

__all__ = ["fingerprint", "fingerprint_of"]

SAMPLE = 256  # numbers read at either end of a tensor


def fingerprint(folder: Path) -> str:
    """SHA-256 over names, shapes, dtypes and samples of the tensors in `folder`; ExportError if it has none."""
    digest = hashlib.sha256()
    with TensorFolder(folder) as tensors:
        for name in sorted(tensors.names):
            shape = tensors.shape(name)
            digest.update(f"{name} {shape} {tensors.dtype(name)}\n".encode())
            count = math.prod(shape)
            for begin in (0, max(count - SAMPLE, 0)):
                numbers = tensors.flat(name, begin, min(begin + SAMPLE, count))
                digest.update(memoryview(numbers.view(torch.uint8).numpy()))
    return digest.hexdigest()


def fingerprint_of(name: str, revision: str | None = None) -> str | None:
    """The fingerprint of a model named by path or hub id; None if it has no safetensors on this machine."""
    try:
        return fingerprint(local_base(name, revision))
    except ExportError:
        return None
