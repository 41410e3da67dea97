"""How an answer is scored against its reference: built-in metrics, a user's own function, means and intervals.

A metric is a function `(completion, reference) -> float | bool`; the built-in ones give 0.0 or 1.0.  Nothing here knows
about models or files, and torch is never imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from hf_dsvllm.errors import EvalFileError

__all__ = ["BUILT_IN", "Interval", "Metric", "Summary", "paired_bootstrap", "resolve", "score", "summarise"]

ScoreFunction = Callable[[str, str], float | bool]
NUMBER = re.compile(
    r"(?:(?<![0-9])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}\b)?"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A named scoring function; `check_reference` returns why a reference cannot be used, or None."""

    name: str
    function: ScoreFunction
    check_reference: Callable[[str], str | None] | None = None

    def __call__(self, completion: str, reference: str) -> float | bool:
        return self.function(completion, reference)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Mean of `count` scores; `standard_error` of that mean, or None below two scores."""

    mean: float
    count: int
    standard_error: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A difference of means with the bounds of its confidence interval."""

    low: float
    high: float
    mean: float


def exact_match(completion: str, reference: str) -> bool:
    """Equal but for white space at both ends."""
    return completion.strip() == reference.strip()


def normalized_match(completion: str, reference: str) -> bool:
    """Equal after case folding, Unicode NFKC, and replacing punctuation and white space by single spaces.

    A minus sign before a digit and a point or comma between digits stay: -5 is not 5, and 3.5 is not 35.
    """
    return normalise(completion) == normalise(reference)


def contains(completion: str, reference: str) -> bool:
    """The stripped reference stands somewhere in the completion (case matters)."""
    return reference.strip() in completion


def regex(completion: str, reference: str) -> bool:
    """The reference is a Python regular expression that `re.search` finds in the completion."""
    return re.search(reference, completion) is not None


def json_equal(completion: str, reference: str) -> bool:
    """The whole completion parses as JSON and equals the reference: 1 equals 1.0, true is not 1, key order is free.

    Text around the JSON, NaN, Infinity and a repeated key make the completion wrong.
    """
    expected = parse_json(reference)
    try:
        return same_json(parse_json(completion), expected)
    except (ValueError, RecursionError):
        return False


def number_match(completion: str, reference: str) -> bool:
    """The last number of the completion equals the last number of the reference (1,200 = 1200.0 = 1.2e3)."""
    expected, found = last_number(reference), last_number(completion)
    return found is not None and found == expected


def normalise(text: str) -> str:
    """See `normalized_match`."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = []
    for index, character in enumerate(folded):
        if not unicodedata.category(character).startswith("P"):
            kept.append(character)
            continue
        before_digit = folded[index + 1 : index + 2].isdigit()
        after_word = folded[index - 1 : index].isalnum()
        after_digit = folded[index - 1 : index].isdigit()
        sign = character == "-" and before_digit and not after_word
        separator = character in ".," and before_digit and after_digit
        kept.append(character if sign or separator else " ")
    return " ".join("".join(kept).split())


def last_number(text: str) -> Decimal | None:
    """The last decimal number in `text`; commas may separate thousands."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def parse_json(text: str) -> Any:
    """Strict JSON: raises ValueError on NaN, Infinity, a repeated key, or anything after the value."""
    return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=object_without_repeats)


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object repeats a key")
    return value


def same_json(left: Any, right: Any) -> bool:
    """Deep equality in which true and 1 differ, although Python calls them equal."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same_json(a, b) for a, b in zip(left, right, strict=True))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def check_pattern(reference: str) -> str | None:
    try:
        re.compile(reference)
    except re.error as error:
        return f"the reference {reference!r} is not a regular expression: {error}"
    return None


def check_json(reference: str) -> str | None:
    try:
        parse_json(reference)
    except (ValueError, RecursionError) as error:
        return f"the reference is not JSON, which json_equal needs: {error}"
    return None


def check_number(reference: str) -> str | None:
    return (
        None if NUMBER.search(reference) else f"the reference {reference!r} holds no number, which number_match needs"
    )


def check_not_blank(reference: str) -> str | None:
    return None if reference.strip() else "the reference is blank, so `contains` would accept every answer"


def check_not_punctuation(reference: str) -> str | None:
    if normalise(reference) or not reference.strip():
        return None
    return f"the reference {reference!r} is nothing but punctuation, which normalized_match ignores"


BUILT_IN: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="exact_match", function=exact_match),
        Metric(name="normalized_match", function=normalized_match, check_reference=check_not_punctuation),
        Metric(name="contains", function=contains, check_reference=check_not_blank),
        Metric(name="regex", function=regex, check_reference=check_pattern),
        Metric(name="json_equal", function=json_equal, check_reference=check_json),
        Metric(name="number_match", function=number_match, check_reference=check_number),
    )
}


def resolve(spec: str) -> Metric:
    """The metric called `spec`: a built-in name, `package.module:function`, or `path/file.py:function`.

    Raises EvalFileError for an unknown name (with the nearest ones) or a function that cannot be had.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    source, colon, function_name = spec.rpartition(":")
    if not colon or not source or not function_name:
        near = difflib.get_close_matches(spec, BUILT_IN, n=3)
        guess = f" Did you mean {' or '.join(near)}?" if near else ""
        raise EvalFileError(
            f"metric {spec!r} does not exist.{guess} Built in: {', '.join(BUILT_IN)}; "
            "or your own function as package.module:function or path/file.py:function."
        )
    module = load_module(source, spec)
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(function_name, callables, n=3)
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise EvalFileError(f"metric {spec!r}: {source} has no function {function_name!r}{guess}")
    return Metric(name=function_name, function=function)


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


def score(
    metric: Metric,
    completions: Sequence[str],
    references: Sequence[str],
    *,
    sample_ids: Sequence[str] | None = None,
) -> list[float]:
    """One score per completion, in order; `sample_ids` name the samples in errors (default: their positions).

    Raises EvalFileError if the metric raises or returns something that is not a finite number.
    """
    names = list(sample_ids) if sample_ids is not None else [str(index) for index in range(len(references))]
    return [
        score_one(metric, completion, reference, name)
        for completion, reference, name in zip(completions, references, names, strict=True)
    ]


def score_one(metric: Metric, completion: str, reference: str, sample_id: str) -> float:
    """See `score`."""
    try:
        result = metric(completion, reference)
    except Exception as error:
        raise EvalFileError(
            f"metric {metric.name} failed on sample {sample_id} with {type(error).__name__}: {error} "
            f"(completion {shorten(completion)!r}, reference {shorten(reference)!r})"
        ) from error
    try:
        value = (
            float(result) if isinstance(result, bool | int | float | np.bool_ | np.integer | np.floating) else math.nan
        )
    except OverflowError:  # an integer beyond every float
        value = math.inf
    if not math.isfinite(value):
        raise EvalFileError(
            f"metric {metric.name} returned {shorten(repr(result))} ({type(result).__name__}) for sample {sample_id}; "
            "it must return a finite number or a bool"
        )
    return value


def shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def summarise(scores: Sequence[float]) -> Summary:
    """mean = sum / n;  standard_error = sample standard deviation / sqrt(n).  Raises ValueError on no scores."""
    count = len(scores)
    if count == 0:
        raise ValueError("there are no scores to summarise")
    mean = math.fsum(scores) / count
    if count == 1:
        return Summary(mean=mean, count=1, standard_error=None)
    variance = math.fsum((value - mean) ** 2 for value in scores) / (count - 1)
    return Summary(mean=mean, count=count, standard_error=math.sqrt(variance / count))


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Percentile interval of mean(b - a), where a[i] and b[i] are scores of the same sample (Efron, 1979).

    The same seed gives the same interval.  Raises ValueError if the lengths differ or are zero.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired scores need equal, non-zero lengths, got {len(a)} and {len(b)}")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples={resamples} must be at least 1 and confidence={confidence} between 0 and 1")
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    count = len(differences)
    generator = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // count)  # resamples at a time: some 8 MB of indices, whatever the count
    means = [
        differences[generator.integers(count, size=(min(rows, resamples - start), count))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return Interval(low=float(low), high=float(high), mean=float(differences.mean()))
