"""Lengths of chat-like training samples."""

from __future__ import annotations

import random

MEDIAN, SIGMA, SHORTEST = 300, 1.2, 16  # an assumption: most answers short, a long tail; mean 600 below 4,096


def chat_lengths(count: int, longest: int, *, seed: int = 0) -> list[int]:
    """`count` lengths in tokens, log-normal around MEDIAN and cut at `longest`; for a tiny `longest` scaled down."""
    rng = random.Random(seed)
    scale = min(1.0, longest / 4096)
    drawn = (round(scale * rng.lognormvariate(0, SIGMA) * MEDIAN) for _ in range(count))
    return [max(round(scale * SHORTEST), 2, min(longest, length)) for length in drawn]
