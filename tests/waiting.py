"""Waiting in tests: polled, and bounded so that only a test that fails waits long."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(
    condition: Callable[[], bool],
    ended: Callable[[], bool] = lambda: False,
    *,
    timeout_s: float = 60.0,
    poll_s: float = 0.05,
) -> None:
    """Until `condition` holds; AssertionError when what it waits for has `ended` before, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert not ended(), "what was waited for ended before"
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(poll_s)
