"""Where in the script something happens, and tracebacks that show the script's frames without ours."""

from __future__ import annotations

import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

__all__ = ["script_line", "without_our_frames"]

OURS = str(Path(__file__).resolve().parent) + os.sep
LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


def script_line() -> str:
    """`file.py:12`, the line of the user's code that is being executed: the script's, else the innermost of theirs."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    frames = list(_frames())
    own = [frame for frame in frames if script and frame.f_code.co_filename == script]
    own += [frame for frame in frames if not frame.f_code.co_filename.startswith((*LIBRARIES, OURS, "<"))]
    if not own:
        return "an unknown line"
    return f"{os.path.basename(own[0].f_code.co_filename)}:{own[0].f_lineno}"


def _frames() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def without_our_frames(error: BaseException) -> BaseException:
    """`error` and its causes with our frames cut from their tracebacks, unless it was raised in one of them."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        current.__traceback__ = _cut(current.__traceback__)
        todo += [current.__cause__, current.__context__]
    return error


def _cut(first: types.TracebackType | None) -> types.TracebackType | None:
    links = []
    link = first
    while link is not None:
        links.append(link)
        link = link.tb_next
    if links and _is_ours(links[-1]):
        return first
    kept: types.TracebackType | None = None
    for link in reversed([link for link in links if not _is_ours(link)]):
        kept = types.TracebackType(kept, link.tb_frame, link.tb_lasti, link.tb_lineno)
    return kept


def _is_ours(link: types.TracebackType) -> bool:
    return link.tb_frame.f_code.co_filename.startswith((OURS, "<frozen runpy>"))
