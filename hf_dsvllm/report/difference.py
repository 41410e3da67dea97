"""What changed from one answer to the next, word by word."""

from __future__ import annotations

import difflib
import re
from typing import Literal

__all__ = ["Change", "changes", "clip"]

Change = tuple[Literal["same", "new", "gone"], str]
# A word, a sign, or one character of the scripts written without spaces; each with the space after it.
TOKEN = re.compile(r"[\u2e80-\u9fff]\s*|[^\W\u2e80-\u9fff]+\s*|[^\w\s]\s*|\s+")
MAX_TOKENS = 600  # of both answers: comparing takes the product of their lengths


def changes(before: str, after: str) -> list[Change]:
    """`after` in pieces that are the same or new, with what is gone from `before` where it stood.

    Without "gone" the pieces join to `after`, without "new" to `before`.  Texts of more than `MAX_TOKENS` words that
    differ are compared at their ends only: what they share at the beginning and at the end is the same.
    """
    old, new = TOKEN.findall(before), TOKEN.findall(after)
    if len(old) > MAX_TOKENS or len(new) > MAX_TOKENS:
        return by_ends(old, new)
    pieces: list[Change] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(new[k:m])))
            continue
        if j > i:
            pieces.append(("gone", "".join(old[i:j])))
        if m > k:
            pieces.append(("new", "".join(new[k:m])))
    return pieces


def by_ends(old: list[str], new: list[str]) -> list[Change]:
    shorter = min(len(old), len(new))
    head = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    tail = next((i for i in range(shorter - head) if old[-1 - i] != new[-1 - i]), shorter - head)
    pieces: list[Change] = [
        ("same", "".join(new[:head])),
        ("gone", "".join(old[head : len(old) - tail])),
        ("new", "".join(new[head : len(new) - tail])),
        ("same", "".join(new[len(new) - tail :])),
    ]
    return [piece for piece in pieces if piece[1]]


def clip(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters, and how many are left out."""
    return text[:limit], max(0, len(text) - limit)
