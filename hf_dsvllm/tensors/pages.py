"""Memory and files without the kernel's small pages, whose making and letting go many threads wait for each other in.

torch maps a checkpoint (`mmap=True`) and gives tensors into the mapping.  Touching them brings in pages, which the
kernel counts as memory of the process until they are let go.  `Pages` reads from the file what it shows, into a
small buffer: 3.0 GB/s on a core and in bf16, 2.3 through the mapping.  `empty` asks for pages of 2 MiB: 10 GB/s of new
memory on a core, 2 in pages of 4 KiB.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from hf_dsvllm.errors import ExportError

__all__ = ["Pages", "empty"]

HUGE_BYTES = 2 << 20
# 16 threads of a process read and convert 32.1 GB/s in pieces of this size, 14.5 in pieces of 1 MiB: the interpreter's
# lock is wanted between two pieces (16 CPUs of an H200 host).
PIECE_BYTES = 8 << 20
MADV_HUGEPAGE = 14  # <sys/mman.h>
_LIBC = ctypes.CDLL(None)


def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` for `count` elements on the CPU, in huge pages where they are many and the kernel has some."""
    made = torch.empty(count, dtype=dtype)
    first = -(-made.data_ptr() // HUGE_BYTES) * HUGE_BYTES
    end = (made.data_ptr() + count * made.element_size()) // HUGE_BYTES * HUGE_BYTES
    if end > first and hasattr(_LIBC, "madvise"):
        # Advice: what comes of it is not looked at.
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_HUGEPAGE)
    return made


class Pages:
    """The mappings of some files, as /proc/self/maps has them now; none where there is no such file.

    Files are opened for each read: a checkpoint has two for each of its ranks, more than a process may hold open.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        names = {os.path.realpath(file) for file in files}
        self._ranges: list[tuple[int, int, int, str]] = []  # first address, end, where in the file, which file
        self._mapped: dict[str, tuple[int, int]] = {}  # device and inode of each file
        self._own = threading.local()
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            lines = []
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in names:
                begin, _, end = fields[0].partition("-")
                self._ranges.append((int(begin, 16), int(end, 16), int(fields[2], 16), fields[5]))
        self._ranges.sort()
        for *_, file in self._ranges:
            found = os.stat(file)
            self._mapped[file] = found.st_dev, found.st_ino

    def pieces(self, tensor: torch.Tensor, size_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The elements of a vector, some at a time; the next piece may overwrite this one.

        `tensor` is contiguous and was never written to.  Where the file is not there any more, and of memory that is in
        none of the files, pieces are slices.  Raises ExportError where a file cannot be read, or has become shorter.
        """
        begin, element = tensor.data_ptr(), tensor.element_size()
        total, size_bytes = tensor.numel() * element, max(element, size_bytes // element * element)
        file, offset = self._place(begin, total)
        descriptor = self._open(file)
        if descriptor is None:
            yield from tensor.split(size_bytes // element)
            return
        try:
            buffer = self._buffer(min(size_bytes, total))
            for at in range(0, total, size_bytes):
                piece = memoryview(buffer)[: min(size_bytes, total - at)]
                _read(descriptor, piece, offset + at, file)
                yield torch.frombuffer(piece, dtype=tensor.dtype)
        finally:
            os.close(descriptor)

    def _place(self, begin: int, size_bytes: int) -> tuple[str, int]:
        """(file, offset) of so many bytes from address `begin`; no file ("") if they do not lie in one mapping."""
        number = bisect.bisect_right(self._ranges, begin, key=lambda each: each[0]) - 1
        if number < 0 or size_bytes == 0:
            return "", 0
        first, end, offset, file = self._ranges[number]
        return (file, offset + begin - first) if begin + size_bytes <= end else ("", 0)

    def _open(self, file: str) -> int | None:
        """A descriptor of the file that was mapped; None if there is none, or another one has its name by now."""
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC) if file else None
        except OSError:
            return None
        if descriptor is None:
            return None
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) == self._mapped[file]:
            return descriptor
        os.close(descriptor)
        return None

    def _buffer(self, size_bytes: int) -> bytearray:
        """This thread's, as large as it has needed so far."""
        held: bytearray | None = getattr(self._own, "buffer", None)
        if held is None or len(held) < size_bytes:
            held = self._own.buffer = bytearray(size_bytes)
        return held


def _read(descriptor: int, into: memoryview, offset: int, file: str) -> None:
    done = 0
    while done < len(into):
        try:
            count = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as error:
            raise ExportError(f"{file} cannot be read: {error.strerror}.") from error
        if count == 0:
            raise ExportError(f"{file} ends at {offset + done} bytes: it was cut off while it was read.")
        done += count
