"""The names that scores are logged under, and what a name tells about which scores are better."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hf_dsvllm.metrics.catalogue import resolve

__all__ = ["less_is_better", "pass_at", "score_key", "score_names"]

# As whole words of a name.  lm-eval 0.4.13 says higher_is_better=False of the first four (api/metrics.py).
LESS = re.compile(
    r"(^|_)(perplexity|bits_per_byte|brier_score|ter"
    r"|ppl|bits_per_token|loss|distance|error_rate|wer|cer|mse|mae|rmse)(_|$)"
)


def score_key(task: str, metric: str) -> str:
    """The name a score is logged under, usable as `metric_for_best_model`."""
    return f"eval_gen_{task}_{metric}"


def pass_at(metric: str, answers: int) -> str:
    """The name of pass@k; without @, which MLflow takes in no name."""
    return f"{metric}_pass_at_{answers}"


def score_names(specs: Sequence[str], answers: int) -> tuple[str, ...]:
    """What the scores of a task with these metrics are called, where each prompt is given so many answers.

    Raises EvalFileError as `resolve` does.
    """
    metrics = [resolve(spec) for spec in specs]
    several = [pass_at(metric.name, answers) for metric in metrics if answers > 1 and metric.right_or_wrong]
    return (*(metric.name for metric in metrics), *several)


def less_is_better(name: str) -> bool:
    """Whether a metric is of a kind of which less is better, by its name: perplexity, distance, and so on."""
    return LESS.search(name.lower()) is not None
