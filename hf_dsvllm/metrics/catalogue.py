"""The metrics by name, as `--gen_eval_metrics` takes them."""

from __future__ import annotations

import difflib

from hf_dsvllm.errors import EvalFileError
from hf_dsvllm.metrics import code, numbers, overlap, structured, text
from hf_dsvllm.metrics.base import Metric
from hf_dsvllm.metrics.custom import load_function
from hf_dsvllm.metrics.judge import PREFIX, judge_metric

__all__ = ["BUILT_IN", "resolve"]

BUILT_IN: dict[str, Metric] = {
    metric.name: metric
    for metric in (*text.METRICS, *structured.METRICS, *numbers.METRICS, *overlap.METRICS, *code.METRICS)
}


def resolve(spec: str) -> Metric:
    """The metric called `spec`: a built-in name, `judge:URL?model=NAME`, `package.module:function`, or
    `path/file.py:function`.

    Raises EvalFileError for an unknown name (with the nearest ones) or a function that cannot be had.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if spec.startswith(PREFIX) and ("://" in spec or "?" in spec):  # else a module of the user's called judge
        return judge_metric(spec)
    source, colon, function_name = spec.rpartition(":")
    if not colon or not source or not function_name:
        near = difflib.get_close_matches(spec, BUILT_IN, n=3)
        guess = f" Did you mean {' or '.join(near)}?" if near else ""
        raise EvalFileError(
            f"metric {spec!r} does not exist.{guess} Built in: {', '.join(BUILT_IN)}; "
            "or judge:URL?model=NAME; or your own function as package.module:function or path/file.py:function."
        )
    return load_function(spec, source, function_name)
