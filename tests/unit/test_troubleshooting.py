"""docs/troubleshooting.md quotes what the code says, and every problem the checks can find is explained there."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where a message of a configuration starts its life; each of them must be explained in troubleshooting.md.
PROBLEM_MODULES = ("arguments", "preflight", "traps", "launch", "adapters", "checks", "memory", "data",
                   "auto", "planner/request", "harness/job", "export/adapter_format", "run_folder", "resume", "disk",
                   "run/command", "run/parent", "run/state", "run/for_arguments", "run/for_trainers",
                   "wiring")  # fmt: skip


def as_text(node: ast.expr) -> str:
    """A string expression as written, `…` for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(as_text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


@functools.cache
def strings_of_the_package() -> list[str]:
    files = (ROOT / "hf_dsvllm").rglob("*.py")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    kinds = (ast.Constant, ast.JoinedStr)
    return [as_text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def quotes() -> list[str]:
    """The first cells of troubleshooting.md's tables."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)


def says(message: str, quote: str) -> bool:
    """Whether the fixed parts of `quote` stand in `message` in their order, from its beginning on."""
    parts = [re.escape(part) for part in quote.split("…")]
    return re.match(".*?".join(parts), message, re.DOTALL) is not None


def problems() -> Iterator[tuple[str, str]]:
    """(module:line, message) of every `Problem(…)` whose message is written there."""
    for module in PROBLEM_MODULES:
        tree = ast.parse((ROOT / "hf_dsvllm" / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
                first = node.args[0] if node.args else node.keywords[0].value
                message = as_text(first)
                if message.strip("…"):
                    yield f"{module}.py:{node.lineno}", message


@pytest.mark.parametrize("quote", quotes())
def test_every_message_quoted_in_troubleshooting_is_said_by_the_code(quote: str) -> None:
    assert quote.strip("… "), "a quote of nothing"
    assert any(says(message, quote) for message in strings_of_the_package()), quote


def test_every_problem_the_checks_can_find_is_explained_in_troubleshooting() -> None:
    known = quotes()
    missing = [f"{place}: {message}" for place, message in problems() if not any(says(message, q) for q in known)]
    assert missing == []
