"""What both ways of sending share: buckets, packing, and waiting with a deadline."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeVar

import torch

from hf_dsvllm.engine.bodies import TensorNames
from hf_dsvllm.errors import EngineError

__all__ = ["Bucket", "Transfer", "described", "in_background", "left_of", "packed", "synchronise", "wait_for"]

Bucket: TypeAlias = Sequence[tuple[str, torch.Tensor]]
T = TypeVar("T")


class Transfer(Protocol):
    """One connection from rank 0 to the workers of one server; every `deadline` is a time.monotonic()."""

    def open(self, *, deadline: float) -> None:
        """Connect, if not yet connected.  Raises EngineError; nothing on the server has changed then."""

    def send(self, bucket: Bucket, *, deadline: float) -> None:
        """Hand over whole tensors.  They may be changed or freed once this returns."""

    def drain(self, *, deadline: float) -> None:
        """Wait until the server has taken everything handed over."""

    def close(self) -> None:
        """Give the connection up; never raises, never blocks."""


def described(bucket: Bucket, *, sizes: bool) -> TensorNames:
    """What the server is told about a bucket."""
    return TensorNames(
        names=tuple(name for name, _ in bucket),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket),
        shapes=tuple(tuple(tensor.shape) for _, tensor in bucket),
        sizes_bytes=tuple(tensor.nbytes for _, tensor in bucket) if sizes else None,
    )


def packed(bucket: Bucket) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]:
    """One uint8 tensor with the bytes of all, and the bucket in the order they lie in it.

    The widest dtypes come first: so every tensor begins at a multiple of its element size, as a view on it must.
    """
    ordered = sorted(bucket, key=lambda item: -item[1].element_size())
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in ordered]
    return torch.cat(flat), ordered


def in_background(work: Callable[[], T], name: str) -> concurrent.futures.Future[T]:
    """Run `work` on a daemon thread: one that hangs in a library (NCCL waits for ever) does not keep the process up."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def wait_for(future: concurrent.futures.Future[T], what: str, *, deadline: float) -> T:
    """The result of `future`; EngineError with `what` if it fails or is not there at `deadline`."""
    try:
        return future.result(left_of(deadline))
    except concurrent.futures.TimeoutError:
        raise EngineError(
            f"{what} was not done in time. The other end is stuck or gone; the engine's log in the run folder says why."
        ) from None
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"{what} failed: {type(error).__name__}: {error}") from error


def left_of(deadline: float) -> float:
    """Seconds until `deadline`, at least a moment: a deadline that has passed is found out by whoever waits."""
    return max(0.001, deadline - time.monotonic())


def synchronise(device: torch.device | None = None) -> None:
    """Wait for what the GPU still has to do on this stream, so that another process reads finished weights."""
    if torch.cuda.is_available():
        torch.cuda.current_stream(device).synchronize()
