"""Bytes between files and a GPU, through small page-locked buffers that are used again.

A plain `.to("cuda")` or `.cpu()` goes through pageable memory that is new for every tensor, whose pages the kernel
clears first; merging 8B parameters that way on an H200 wrote 1.3 GB/s to memory that takes 22 (docs/lab-notes.md).
Here a buffer is filled while the GPU empties the other one.  All threads share the default stream: bitsandbytes (0.50)
launches its quantisation there, whatever stream is current.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

__all__ = ["CPU", "download", "upload"]

CPU = torch.device("cpu")
CHUNK_BYTES = 8 << 20  # long enough for a copy at the link's full rate; two for each thread stay page-locked
_of_thread = threading.local()


def upload(read: Callable[[memoryview, int], None], size_bytes: int, device: torch.device) -> torch.Tensor:
    """A new uint8 tensor [size_bytes] on `device`; `read(into, at)` fills `into` with the bytes from `at` on."""
    whole = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    buffers = _buffers(device)
    for number, begin in enumerate(range(0, size_bytes, CHUNK_BYTES)):
        buffer = buffers[number % 2]
        piece = buffer.first(min(CHUNK_BYTES, size_bytes - begin))
        buffer.wait()
        read(memoryview(piece.numpy()), begin)
        whole[begin : begin + len(piece)].copy_(piece, non_blocking=True)
        buffer.in_use()
    return whole


def download(tensor: torch.Tensor, write: Callable[[memoryview, int], None], dtype: torch.dtype | None = None) -> None:
    """`write(data, at)` for all bytes of a `tensor`, in order; `data` is valid until `write` returns.

    It is cast to `dtype`, if given, where it lies and piece by piece: that takes no more memory than the buffers.  One
    on the CPU goes the same way without copies.
    """
    dtype = tensor.dtype if dtype is None else dtype
    flat = tensor.detach().reshape(-1)
    elements = CHUNK_BYTES // dtype.itemsize
    buffers = _buffers(tensor.device)
    coming: tuple[_Buffer, torch.Tensor, int] | None = None
    for number, begin in enumerate(range(0, len(flat), elements)):
        source, at = flat[begin : begin + elements], begin * dtype.itemsize
        buffer = buffers[number % 2]
        piece = buffer.first(len(source) * dtype.itemsize)
        if not tensor.is_cuda:
            same = source if source.dtype == dtype else piece.view(dtype).copy_(source)
            write(memoryview(same.view(torch.uint8).numpy()), at)
            continue
        piece.copy_(source.to(dtype).view(torch.uint8), non_blocking=True)
        buffer.in_use()
        if coming is not None:
            _arrived(coming, write)
        coming = buffer, piece, at
    if coming is not None:
        _arrived(coming, write)


def _arrived(coming: tuple[_Buffer, torch.Tensor, int], write: Callable[[memoryview, int], None]) -> None:
    buffer, piece, begin = coming
    buffer.wait()
    write(memoryview(piece.numpy()), begin)


class _Buffer:
    """Page-locked bytes, and whether a copy to or from them is still on its way."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._bytes = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        # Who waits sleeps: a thread that spins takes the core from one that merges or hashes.
        self._copied = torch.cuda.Event(blocking=True) if on_gpu else None

    def first(self, count: int) -> torch.Tensor:
        return self._bytes[:count]

    def in_use(self) -> None:
        """A copy was queued on the current stream of the tensor's device, which need not be the thread's own."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Return when the last copy is done."""
        if self._copied is not None:
            self._copied.synchronize()


def _buffers(device: torch.device) -> tuple[_Buffer, _Buffer]:
    """This thread's two; they go with the thread."""
    if getattr(_of_thread, "device", None) != device:
        _of_thread.device = device
        _of_thread.buffers = (_Buffer(device), _Buffer(device))
    found: tuple[_Buffer, _Buffer] = _of_thread.buffers
    return found
