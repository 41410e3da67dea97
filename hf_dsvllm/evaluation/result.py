"""What an evaluation is asked and what it gives: how answers are drawn, scores, their errors, seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_dsvllm.fields import metric_key, trusts_remote_code
from hf_dsvllm.harness import names_of
from hf_dsvllm.statistics import Comparison
from hf_dsvllm.tasks import EvalTask

__all__ = ["EvalResult", "HarnessTasks", "Sampling", "harness_tasks", "lower_is_better", "sampling_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy.  `timeout_s` bounds one evaluation, server start included.

    Of `samples` answers to a prompt number i is drawn with seed + i (vLLM's v1/engine/parallel_sampling.py).
    """

    max_new_tokens: int
    temperature: float
    seed: int
    timeout_s: float
    stop_token_ids: tuple[int, ...]
    samples: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness; `limit`: only the first so many prompts of each.

    `trust_remote_code`: the tokenizer's own code may run, as in training.
    """

    names: tuple[str, ...]
    limit: int | None = None
    trust_remote_code: bool = False


def sampling_of(task: EvalTask, sampling: Sampling) -> Sampling:
    """The arguments' sampling with what the task's own settings say otherwise."""
    own = task.settings
    given = {"max_new_tokens": own.max_new_tokens, "temperature": own.temperature, "samples": own.samples}
    return dataclasses.replace(sampling, **{name: value for name, value in given.items() if value is not None})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One evaluation: `scores` by metric key, and where the seconds went (`publish`: live weights to disk).

    `samples` counts prompts.  `proof`: the canary's sentence, None where it could not be asked.  `comparisons`: by
    metric key, against step 0 and the best step before this one.  `harness_seconds`: those of lm-eval.
    `higher_is_better`: by metric key, where it is known.

    `phases`: seconds of the parts that the sums above hide, `task_seconds` of answering each task.  `asked_at` and
    `answered_at`: the first question and the last answer, by time.time().  `asleep_gib`: what the engine holds of the
    GPU's memory while it sleeps (`measure.gib_of_others`).
    """

    step: int
    scores: Mapping[str, float]
    standard_errors: Mapping[str, float | None]
    samples: int
    generated_tokens: int
    weights_path: str
    weights_why: str
    proof: str | None
    publish_seconds: float
    wait_seconds: float
    sync_seconds: float
    generate_seconds: float
    total_seconds: float
    comparisons: Mapping[str, Comparison] = dataclasses.field(default_factory=dict)
    higher_is_better: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    harness_seconds: float = 0.0
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    task_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    asked_at: float | None = None
    answered_at: float | None = None
    asleep_gib: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.generate_seconds if self.generate_seconds else 0.0

    def _figure(self, name: str) -> str:
        """The score with its standard error, which one answer alone has not: a share, or a number (perplexity)."""
        score, error = self.scores[name], self.standard_errors[name]
        form = ".1%" if 0 <= score <= 1 else ".4g"
        return f"{score:{form}}" + ("" if error is None else f" ± {error:{form}}")

    def _compared(self, name: str) -> str:
        brief = self.comparisons[name].brief if name in self.comparisons else ""
        return f" ({brief})" if brief else ""

    def line(self) -> str:
        """One line for the console."""
        scores = ", ".join(f"{name} {self._figure(name)}{self._compared(name)}" for name in self.scores)
        return (
            f"step {self.step}: {scores} ({self.samples} prompts, {self.generated_tokens} tokens, "
            f"{self.tokens_per_second:.0f} tok/s, weights by {self.weights_path} in {self.sync_seconds:.2f} s, "
            f"{self.total_seconds:.1f} s in all)"
        )


def harness_tasks(args: Any, model_args: Any) -> HarnessTasks | None:
    """What --gen_eval_lm_eval asks for."""
    names = names_of(args.gen_eval_lm_eval)
    if not names:
        return None
    trusting = trusts_remote_code(args, model_args)
    return HarnessTasks(names=names, limit=args.gen_eval_limit, trust_remote_code=trusting)


def lower_is_better(args: Any) -> tuple[str, ...]:
    """The metric that steers, where its user says that less is better."""
    return (metric_key(args),) if args.greater_is_better is False else ()
