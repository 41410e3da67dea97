"""Writing files so that a reader never sees half of one: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import Problem

__all__ = ["atomic_folder", "behind_links", "read_json_or_problem", "replace_folder", "write_json", "write_text"]

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def behind_links(path: Path) -> Path:
    """Where `path` leads to, which need not exist yet; OSError where its links go in a circle.

    Of a circle `Path.resolve` raises RuntimeError up to Python 3.12, and later returns one of its links.
    """
    try:
        found = path.resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error
    if found.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return found


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically, for those whom the umask lets read; the folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            _open_to_others(file.fileno(), 0o666)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextlib.contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder; on success fsync its files and rename it to `target`, on error remove it.

    A `target` that exists is an error, or with `replace` stays until the new one is finished.  It is open to those whom
    the umask lets in, the unfinished one to this user alone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                if not file.is_symlink():
                    _open_to_others(file, 0o666)  # safetensors, too, writes for its owner alone
                fsync_path(file)
        _open_to_others(temporary, 0o777)
        fsync_path(temporary)
        if replace and target.exists():
            replace_folder(target, temporary, aside=_sibling(target))
        else:
            os.rename(temporary, target)
        fsync_path(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _open_to_others(made: int | Path, mode: int) -> None:
    """Add to what was made for its owner alone the mode that any new file or folder has."""
    with contextlib.suppress(OSError):  # a file system without modes
        os.chmod(made, stat.S_IMODE(os.stat(made).st_mode) | mode & ~_umask())


def _umask() -> int:
    """Of this process.  os.umask tells it only by changing it, under the hands of other threads."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], base=8)
    except (OSError, StopIteration):
        return 0o077  # not Linux: what tempfile chose


def _sibling(target: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))


def replace_folder(target: Path, fresh: Path, *, aside: Path) -> None:
    """Put `fresh` in the place of `target`, a folder beside it, and remove the old one.

    In one step where the file system can, so that one of the two is always there; elsewhere the old one is renamed to
    `aside`, absent or empty, and back if the second rename fails.
    """
    if exchange(target, fresh):
        old, unused = fresh, aside
    else:
        old, unused = aside, fresh
        os.rename(target, aside)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(aside, target)
            raise
    fsync_path(target.parent)  # before the old one goes: a power cut leaves one of the two
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(unused, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28
    if renameat2 is None:
        return False
    result: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return result == 0


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_or_problem(given: str) -> tuple[dict[str, Any] | None, Problem | None]:
    """A DeepSpeed configuration given as a path, a `{json}` string or base64, or what is wrong with it."""
    text = given.strip()
    try:
        if not text.startswith("{"):
            path = Path(text).expanduser()
            # os.path.exists: Path.exists raises for base64 longer than a file name may be
            is_file = os.path.exists(path)
            text = path.read_text(encoding="utf-8") if is_file else base64.urlsafe_b64decode(text).decode()
        config = json.loads(text)
    except json.JSONDecodeError as error:
        return None, Problem(f"--deepspeed {given}: line {error.lineno}: {error.msg}", "correct the JSON")
    except (OSError, ValueError):
        return None, Problem(f"--deepspeed {given}: no such file", "give the path of a JSON file")
    if not isinstance(config, dict):
        return None, Problem(
            f"--deepspeed {given} holds a {type(config).__name__}, not an object", "write a JSON object"
        )
    return config, None
