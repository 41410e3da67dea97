"""How an answer is scored against its reference: built-in metrics, tests of code, a judge, a user's own function.

A metric is a function `(completion, reference) -> float | bool`; the built-in ones give 0 to 1.
Nothing here knows about models or evaluation files, and torch is never imported.
"""

from hf_dsvllm.metrics.base import Metric, Question
from hf_dsvllm.metrics.catalogue import BUILT_IN, resolve
from hf_dsvllm.metrics.keys import less_is_better, pass_at, score_key, score_names
from hf_dsvllm.metrics.scoring import Summary, score, summarise
from hf_dsvllm.statistics import Interval, paired_bootstrap

__all__ = [
    "BUILT_IN",
    "Interval",
    "Metric",
    "Question",
    "Summary",
    "less_is_better",
    "paired_bootstrap",
    "pass_at",
    "resolve",
    "score",
    "score_key",
    "score_names",
    "summarise",
]
