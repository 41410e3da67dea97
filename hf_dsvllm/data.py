"""Training data for the recipes: JSONL files in TRL's formats, or a dataset by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import ConfigError, Problem

__all__ = ["DataArguments", "load_split"]

SFT_COLUMNS = ("messages", "prompt", "text")


@dataclasses.dataclass
class DataArguments:
    """Where the data comes from: --train_file (and --test_file), or --dataset_name."""

    train_file: str | None = dataclasses.field(default=None, metadata={"help": "JSONL file to train on."})
    test_file: str | None = dataclasses.field(default=None, metadata={"help": "JSONL file for the evaluation loss."})
    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Dataset on the hub, or its folder."})
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "Configuration of that dataset."})
    dataset_train_split: str = dataclasses.field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = dataclasses.field(default="test", metadata={"help": "Split for the evaluation loss."})


def load_split(data: DataArguments, *, needs_test: bool, columns: Sequence[str] = SFT_COLUMNS) -> tuple[Any, Any]:
    """The train and test `datasets.Dataset` (test None if not needed).

    Raises ConfigError for a missing file or split, a broken line, or when none of `columns` is there.
    """
    from datasets import load_dataset

    if bool(data.train_file) == bool(data.dataset_name):
        given = "both are given" if data.train_file else "neither is given"
        raise ConfigError([Problem(f"train from --train_file or --dataset_name; {given}", "--train_file data.jsonl")])
    if data.train_file:
        files = {"train": data.train_file} | ({"test": data.test_file} if data.test_file else {})
        _check_files(files)
        try:
            with _quiet_datasets():
                splits: Any = load_dataset("json", data_files=files)
        except Exception as error:  # pyarrow and datasets each have their own tree of errors for a broken line
            cause = str(error.__cause__ or error).splitlines()[0]
            broken = next(filter(None, map(_broken_line, files.values())), f"the training data cannot be read: {cause}")
            raise ConfigError([Problem(broken, "one JSON object a line, the same keys on each")]) from error
        names = ("train", "test")
    else:
        try:
            splits = load_dataset(data.dataset_name, data.dataset_config)
        except Exception as error:  # datasets, pyarrow and the hub each have their own tree of errors
            telling = error if isinstance(error, OSError | ValueError) else error.__cause__ or error
            cause = (str(telling).splitlines() or [type(telling).__name__])[0]
            what = f"the dataset {data.dataset_name!r} cannot be had: {cause}"
            fix = "check the name and --dataset_config, log in with `hf auth login` for a gated one, or --train_file"
            raise ConfigError([Problem(what, fix)]) from error
        names = (data.dataset_train_split, data.dataset_test_split)
    problems = []
    for name, needed in zip(names, (True, needs_test), strict=True):
        if needed and name not in splits:
            fix = "--test_file FILE.jsonl, or --eval_strategy no" if name == "test" else f"one of {', '.join(splits)}"
            problems.append(Problem(f"there is no split {name!r}", fix))
        elif needed and not set(columns) & set(splits[name].column_names):
            found = ", ".join(splits[name].column_names)
            problems.append(Problem(f"split {name!r} has the columns {found}", f"it needs one of {', '.join(columns)}"))
    if problems:
        raise ConfigError(problems)
    return splits[names[0]], splits[names[1]] if needs_test else None


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """datasets logs the traceback of an error that it raises as well."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _broken_line(path: str) -> str | None:
    """File, number and fault of the first line that is no JSON object: the libraries name no line, or another."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                return f"{path}, line {number}: {error.msg} at column {error.colno}"
            except UnicodeDecodeError as error:
                return f"{path}, line {number}: not UTF-8 ({error.reason})"
            if not isinstance(value, dict):
                return f"{path}, line {number}: a {type(value).__name__}, not an object"
    return None


def _check_files(files: dict[str, str]) -> None:
    problems = []
    for path in map(Path, files.values()):
        if not path.is_file():
            beside = sorted(item.name for item in path.parent.glob("*.json*"))[:5] if path.parent.is_dir() else []
            fix = f"in {path.parent} there are: {', '.join(beside)}" if beside else "check the path"
            problems.append(Problem(f"{path} does not exist", fix))
        elif path.stat().st_size == 0:
            problems.append(Problem(f"{path} is empty", "write one JSON object a line"))
    if problems:
        raise ConfigError(problems)
