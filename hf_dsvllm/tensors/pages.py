"""Pages of files that are mapped into this process: which they are, and how they are let go once they were read.

The kernel counts them as memory of the process although it can take them back at any time: a conversion that reads
a mapped file from its beginning to its end would seem to hold all of it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch

__all__ = ["Pages"]

MADV_DONTNEED = 4  # <sys/mman.h>
_LIBC = ctypes.CDLL(None)


class Pages:
    """The mappings of some files, as /proc/self/maps has them now; none where there is no such file."""

    def __init__(self, files: Iterable[Path]) -> None:
        names = {os.path.realpath(file) for file in files}
        self._ranges: list[tuple[int, int]] = []
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            lines = []
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in names:
                begin, _, end = fields[0].partition("-")
                self._ranges.append((int(begin, 16), int(end, 16)))

    def let_go(self, piece: torch.Tensor) -> None:
        """Drop the whole pages of `piece`, contiguous and never written to, if it lies in one of the files.

        Of any other memory this would be the end of its contents.  A storage's own `filename` does not tell: torch
        (2.13) forgets it for the tensors of a checkpoint, which are slices of one mapping.
        """
        begin, end = piece.data_ptr(), piece.data_ptr() + piece.numel() * piece.element_size()
        if not any(first <= begin and end <= last for first, last in self._ranges):
            return
        page = mmap.PAGESIZE
        begin, end = -(-begin // page) * page, end // page * page
        if end > begin:
            _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)
