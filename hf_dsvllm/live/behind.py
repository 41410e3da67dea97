"""A full snapshot that is written while training goes on: from a copy of the weights, where there is room for one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.files import atomic_folder
from hf_dsvllm.live.full_model import (
    ModelState,
    changes_names_alone,
    let_go,
    stream_to_files,
    write_beside_weights,
    written_names,
)
from hf_dsvllm.live.snapshot import SNAPSHOTS, Snapshot
from hf_dsvllm.live.sources import plain_source

__all__ = ["Behind"]

_WORKERS = 4  # training needs its cores, and waits for nothing


class Behind:
    """A snapshot on its way to the disk by a thread of its own; rank 0 alone.

    The copy lies where the parameters do.  Of 8B on an H200 it takes some 10 ms, by the rate of the card's memory;
    writing takes 2.5 s there, and a disk of 2 GB/s has all of it after 8.
    """

    def __init__(self, write: Callable[[], None], snapshot: Snapshot, size_bytes: int) -> None:
        """Use `begin`; the copy takes `size_bytes`."""
        self.snapshot = snapshot
        self.size_bytes = size_bytes
        self._error: Exception | None = None
        self._write: Callable[[], None] | None = write
        # No daemon: a process that ends with an error finishes its best weights, or leaves nothing of them.
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=False)
        self._thread.start()

    @classmethod
    def begin(
        cls,
        model: Any,
        run_dir: Path,
        *,
        step: int,
        dtype: torch.dtype,
        tokenizer: Any,
        peak_bytes: int = 0,
        then: Callable[[Snapshot], None] = lambda _: None,
    ) -> Behind | None:
        """Copy the weights and begin to write them as `publish` does; None where `publish` has to.

        That is for adapters, for shards, for models that transformers wants whole, and where a GPU has no room for the
        copy beside the `peak_bytes` that PyTorch has reserved in training, or that is not known.  `then` is called by
        the thread as soon as the folder is there.  Raises what `publish` would.
        """
        parameters = dict(model.named_parameters())
        if hasattr(model, "peft_config") or any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
            return None
        state = ModelState.of(model, dtype)
        device = next(iter(parameters.values())).device
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
        if not changes_names_alone(model, state) or size > _room_beside(device, peak_bytes):
            return None
        try:
            copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        except torch.OutOfMemoryError:  # in pieces that are too small for a tensor
            return None
        frozen = dataclasses.replace(state, buffers={name: buffer.clone() for name, buffer in state.buffers.items()})
        stream: torch.cuda.Stream | None = None
        if device.type == "cuda":  # of its own: the default one is full of training
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        target = run_dir / SNAPSHOTS / f"step-{step}"
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(atomic_folder(target, replace=True))
            written = written_names(model, state, folder)
            assert written is not None, "names alone change"
            unfinished = stack.pop_all()

        snapshot = Snapshot(path=target, kind="full", step=step)

        def write() -> None:
            with unfinished, torch.cuda.stream(stream):
                parts = [[plain_source(name, copy) for name, copy in copies.items()]]
                stream_to_files(frozen, written, parts, folder, workers=_WORKERS, stream=stream)
                write_beside_weights(folder, dtype, tokenizer)
            then(snapshot)

        return cls(write, snapshot, size)

    def _run(self) -> None:
        try:
            assert self._write is not None
            self._write()
        except Exception as error:
            self._error = error
            let_go(error)
        finally:
            self._write = None  # and with it the copy

    @property
    def done(self) -> bool:
        """Whether `finish` would not wait."""
        return not self._thread.is_alive()

    def finish(self) -> Snapshot:
        """Wait for the files; raises what `publish` would."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.snapshot


def _room_beside(device: torch.device, peak_bytes: int) -> float:
    """Bytes that can be held on `device` while training goes on as before, a tenth of it to spare: batches vary."""
    if device.type != "cuda":
        return math.inf
    if not peak_bytes:
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - peak_bytes - total / 10
