"""One export at a time writes to a folder, and clears away what a killed one left beside it.

Nothing at the target itself is ever half written: a new export is made in a hidden folder beside it and renamed.
Where the target is a symbolic link, it stays one, and "beside it" is beside the folder it leads to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import atomic_folder, behind_links, replace_folder

__all__ = ["claimed", "replacing"]


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold the only right to write `out`; ExportError if another process has it.

    The lock ends with the process, however that ends.  Leftovers of killed exports are removed, and an earlier export
    that a kill caught between two renames (`files.replace_folder`) is put back.
    """
    out = _behind_links(out)
    if out.is_mount():
        raise ExportError(f"{out} is the root of a disk and cannot be renamed to; name a folder in it.")
    lock = out.parent / f".{out.name}.lock"
    with _unwritable(out, errno.EACCES, errno.EROFS):
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock, out)
    try:
        _clear(out)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends without an error; needs `claimed`.

    An `out` that exists is there until the new one takes its place.
    """
    out = _behind_links(out)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    with _unwritable(out):
        if not out.exists():
            with atomic_folder(out) as folder:
                yield folder
            return
        fresh, old = _beside(out, "new"), _beside(out, "old")
        with atomic_folder(fresh) as folder:
            yield folder
    replace_folder(out, fresh, aside=old)


def _behind_links(out: Path) -> Path:
    """The folder that `out` leads to, which need not exist yet."""
    try:
        return behind_links(out)
    except OSError as error:
        raise ExportError(f"{out} is a symbolic link that leads to itself; remove it, or name a folder.") from error


@contextlib.contextmanager
def _unwritable(out: Path, *more: int) -> Iterator[None]:
    """A disk or quota that is used up, and the error numbers in `more`, as one clear error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, *more):
            raise
        raise ExportError(
            f"{error.filename or out} cannot be written: {error.strerror}; name another folder with --out, or free "
            "some space."
        ) from error


def _locked(lock: Path, out: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise ExportError(
                f"Another process is exporting to {out} (it holds {lock}); wait for it, or name another folder."
            ) from error
        except OSError:
            return descriptor  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # the last owner removed the file between our open and our lock


def _clear(out: Path) -> None:
    old, fresh = _beside(out, "old"), _beside(out, "new")
    if old.exists() and not out.exists():
        os.rename(old, out)
    for folder in (old, fresh):
        shutil.rmtree(folder, ignore_errors=True)
    # What tempfile.mkdtemp makes in `atomic_folder`: eight characters, none of them a dot.
    temporary = re.compile(rf"\.({re.escape(out.name)}|{re.escape(fresh.name)})\.[a-z0-9_]{{8}}\.tmp")
    for item in out.parent.iterdir():
        if temporary.fullmatch(item.name) and item.is_dir():
            shutil.rmtree(item, ignore_errors=True)


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.{what}"
