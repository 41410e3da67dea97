"""A user's own metric: a function in a package or in a file."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import EvalFileError
from hf_dsvllm.metrics.base import Metric

__all__ = ["load_function"]


def load_function(spec: str, source: str, function_name: str) -> Metric:
    """The function called `function_name` of the module or file `source` as a metric; `spec` is quoted in errors.

    Raises EvalFileError if it cannot be had.
    """
    module = load_module(source, spec)
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(function_name, callables, n=3)
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise EvalFileError(f"metric {spec!r}: {source} has no function {function_name!r}{guess}")
    return Metric(name=function_name, function=function, right_or_wrong=says_bool(function))


def says_bool(function: Any) -> bool:
    """Whether the function is annotated `-> bool` (as text too, where annotations are postponed)."""
    return getattr(function, "__annotations__", {}).get("return") in (bool, "bool")


def load_module(source: str, spec: str) -> Any:
    """Import a user's module by dotted name or by file; its own error is quoted in ours."""
    by_file = source.endswith(".py") or "/" in source or "\\" in source
    path = Path(source).expanduser()
    if by_file and not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=3)
        guess = f" Nearest there: {', '.join(near)}." if near else ""
        raise EvalFileError(f"metric {spec!r}: there is no file {source} (looked from {Path.cwd()}).{guess}")
    try:
        return load_file(path) if by_file else importlib.import_module(source)
    except Exception as error:
        hint = (
            "" if by_file else " Is it installed or on PYTHONPATH? A file can be named directly: path/file.py:function."
        )
        raise EvalFileError(
            f"metric {spec!r}: importing {source} failed with {type(error).__name__}: {error}.{hint}"
        ) from error


def load_file(path: Path) -> Any:
    """Execute a Python file as a module of its own name, once per process."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"_hf_dsvllm_metric_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
