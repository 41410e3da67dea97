"""Answers that are Python code, judged by tests that run in a sandbox."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from hf_dsvllm.console import say
from hf_dsvllm.metrics.base import BATCH_S, Metric, Question
from hf_dsvllm.metrics.sandbox import Outcome, run_python

__all__ = ["METRICS", "code_tests", "extract_code", "program_of"]

FENCE = re.compile(r"(?ms)^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)")
LANGUAGES = frozenset({"", "py", "python", "python3"})
REACHABLE = {"files": "your files", "network": "the network"}  # by the wall of the sandbox that would hide it
PLACE = re.compile(r"^# ANSWER[ \t]*$", re.MULTILINE)


def code_tests(completion: str, reference: str) -> bool:
    """The reference, Python statements such as asserts, runs to its end after the completion's code.

    See `program_of` for how the two are joined and `hf_dsvllm.metrics.sandbox` for where they run.
    """
    return run_python(program_of(completion, reference)).passed


def program_of(completion: str, reference: str) -> str:
    """The code of the completion where the reference has a line `# ANSWER`, or else in front of the reference."""
    code = extract_code(completion)
    if PLACE.search(reference):
        return PLACE.sub(lambda _: code, reference, count=1)
    return f"{code}\n\n{reference}"


def extract_code(completion: str) -> str:
    """The first fenced block of Python (or of no language), closed or not; without one the whole completion."""
    blocks = (block for block in FENCE.finditer(completion) if block[1].lower() in LANGUAGES)
    return next((block[2] for block in blocks), completion)


def check_tests(reference: str) -> str | None:
    if not reference.strip():
        return "the reference is blank, but code_tests needs tests, such as assert add(1, 2) == 3"
    if PLACE.search(reference):
        return None  # without the answer it need not be complete
    try:
        compile(reference, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        return f"the reference is not Python, which code_tests needs: {error}"
    return None


def batch(questions: Sequence[Question]) -> list[bool | None]:
    """As many programs at a time as this process has cores; None for what was not begun within `BATCH_S`."""
    until = time.monotonic() + BATCH_S

    def run(question: Question) -> Outcome | None:
        in_time = time.monotonic() < until
        return run_python(program_of(question.completion, question.reference)) if in_time else None

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=min(cores, 16), thread_name_prefix="code-tests") as pool:
        outcomes = list(pool.map(run, questions))
    ran = [outcome for outcome in outcomes if outcome is not None]
    for outcome in ran[:1]:
        warn_of_missing_walls(frozenset(outcome.walls))
    if len(ran) < len(outcomes):
        missing = len(outcomes) - len(ran)
        say(f"metric code_tests: {missing} of {len(outcomes)} answers have no score (not begun within {BATCH_S:.0f} s)")
    return [None if outcome is None else outcome.passed for outcome in outcomes]


@functools.cache
def warn_of_missing_walls(walls: frozenset[str]) -> None:
    """Say once what the code of an answer could reach, since the kernel refused to hide it."""
    reachable = [what for wall, what in REACHABLE.items() if wall not in walls]
    if reachable:
        whom = "as root" if os.getuid() == 0 and "nobody" not in walls else "as an ordinary user"
        say(
            f"metric code_tests runs code of the model {whom} and without a wall before {' and '.join(reachable)}: "
            "user namespaces are refused here (a container's setting)"
        )


METRICS = (
    Metric(name="code_tests", function=code_tests, check_reference=check_tests, batch=batch, right_or_wrong=True),
)
