"""SHA-256 of files: of those that are there, several at a time, and of one while it is being written."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["HashBehind", "hash_files", "sha256_of"]

HASHERS = 8  # SHA-256 runs at about 1.7 GB/s on a core with SHA extensions; a disk array is faster than one of them
PIECE_BYTES = 8 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """File name -> SHA-256, several files at a time (hashing leaves the interpreter's lock alone)."""
    paths = list(files)
    with ThreadPoolExecutor(min(HASHERS, os.cpu_count() or 1)) as pool:
        return dict(zip([path.name for path in paths], pool.map(sha256_of, paths), strict=True))


class HashBehind:
    """SHA-256 of a file whose parts are written in any order: a thread reads back what has no gap before it.

    So the hash of a shard is there a moment after its last byte, instead of seconds later.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """`descriptor` must be readable and stay open until `close`."""
        self._descriptor = descriptor
        self._size = size_bytes
        self._whole = 0  # bytes without a gap
        self._parts: dict[int, int] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, name="sha256", daemon=True)
        self._thread.start()

    def wrote(self, offset: int, size_bytes: int) -> None:
        """These bytes are in the file now."""
        if not size_bytes:
            return
        with self._changed:
            self._parts[offset] = size_bytes
            while self._whole in self._parts:
                self._whole += self._parts.pop(self._whole)
            self._changed.notify()

    def finish(self) -> str:
        """The hash of the whole file, once all of it was written; OSError if it could not be read back."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def close(self) -> None:
        """Read no more; safe after `finish`."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _follow(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        done = 0
        try:
            while done < self._size:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._whole > done)  # noqa: B023
                    end = self._whole
                    if self._stopped:
                        return
                while done < end:
                    count = os.preadv(self._descriptor, [buffer[: end - done]], done)
                    if count == 0:
                        raise OSError(0, "it became shorter while it was written")
                    self._digest.update(buffer[:count])
                    done += count
        except OSError as error:
            self._error = error
