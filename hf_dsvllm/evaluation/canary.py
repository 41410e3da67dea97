"""The proof that the engine answers with the weights of this step: log-probabilities of fixed prompts, side by side.

The trainer's own forward gives one set of numbers, vLLM's `prompt_logprobs` the other.  `judge` compares them, and also
with the last evaluation's: weights that stayed the same where they should have changed are found, unless the step was
so small that 16-bit rounding hides it.

    canary = Canary(prompts_of(tasks, tokenizer), dtype="bfloat16")    # every rank, once
    ours = canary.ask_trainer(trainer)                                 # every rank: one forward
    verdict = canary.prove(client, model_name, ours)                   # rank 0; WrongWeights unless proven
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hf_dsvllm.console import say
from hf_dsvllm.engine.client import EngineClient
from hf_dsvllm.errors import EngineError
from hf_dsvllm.live.gather import put_away
from hf_dsvllm.tasks import EvalTask, render_prompt

__all__ = [
    "TOLERANCES",
    "Canary",
    "CanaryVerdict",
    "LogProbs",
    "Tolerance",
    "WrongWeights",
    "canary_of",
    "canary_prompts",
    "engine_logprobs",
    "judge",
    "prompts_of",
    "trainer_logprobs",
    "why_no_canary",
]

LogProbs = tuple[tuple[float, ...], ...]  # for each prompt: log p(token | tokens before) of all tokens but the first
TokenIds = tuple[int, ...]

PROMPTS = 3
PROSE = "The capital of France is Paris. Water boils at 100 degrees. Two and two are four."
LONGEST = 64  # tokens of one prompt: the whole is one batch of a small evaluation
# Two sets of numbers are told apart where each is this many standard errors from the middle between them.
CERTAIN = 5.0


class WrongWeights(EngineError):
    """The engine answered, but not with the weights of this step."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What may be between two right computations of the same log-probabilities, in nats.

    mean_for(ours) = max(mean, relative * mean |ours|): a number is rounded in proportion to its size.
    """

    mean: float
    max: float
    relative: float = 0.0

    def mean_for(self, ours: LogProbs) -> float:
        """The most that the mean difference to `ours` may be."""
        sizes = [abs(value) for row in ours for value in row]
        return max(self.mean, self.relative * math.fsum(sizes) / len(sizes)) if sizes else self.mean


# float32: transformers and vLLM on CPUs were 5e-7 to 9e-7 apart in the mean, 6e-6 at most (tiny Llama, vLLM 0.32, full,
# LoRA and QLoRA: tests/integration/test_canary.py); deeper models add up more.
# 16 bit: on random 8B shapes (H200, vLLM 0.26, benchmarks/results/2026-11-23-weights-into-vllm-2xH200.md) right weights
# were 0.06 to 0.17 away in the mean, stale ones 0.43 to 1.87, where all weights had changed more than 1.  The mean
# |log p| of such a model is about 12.8 by formula (log of 151,936 tokens plus half the variance of the logits), so that
# these are 0.5 to 1.3 % and 3.4 to 15 %.  RELATIVE_16_BIT, 2.3 %, is six roundings of bf16 (2**-8 each).  A trained
# model, with a mean |log p| of a few nats, is held to `mean`.
RELATIVE_16_BIT = 6 / 256
TOLERANCES = {
    "float32": Tolerance(mean=1e-3, max=0.02),
    "bfloat16": Tolerance(mean=0.15, max=3.0, relative=RELATIVE_16_BIT),
    "float16": Tolerance(mean=0.15, max=3.0, relative=RELATIVE_16_BIT),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CanaryVerdict:
    """`ok`: the engine has this step's weights.  Differences in nats; `sentence` says it with the numbers."""

    ok: bool
    mean_abs: float
    max_abs: float
    sentence: str
    rms: float = math.inf
    told: bool = False  # that the weights are not those of the last proof


class Canary:
    """The fixed prompts of a run and what was proven last; one on every rank, `prove` on rank 0 only."""

    def __init__(self, prompts: Sequence[TokenIds], *, dtype: str) -> None:
        """`dtype` is what the engine computes in, a key of TOLERANCES."""
        self.prompts = tuple(prompts)
        self.tolerance = TOLERANCES[dtype]
        self._proven: LogProbs | None = None
        self._rounding = 0.0  # rms difference of trainer and engine when that was proven
        self._generation = 0  # of the server it was proven for

    def ask_trainer(self, trainer: Any) -> LogProbs:
        """`trainer_logprobs` of a live Trainer; collective, call it on every rank between two optimizer steps."""
        with trainer.compute_loss_context_manager():
            return trainer_logprobs(trainer.model, self.prompts, deepspeed_engine=trainer.model_wrapped)

    def prove(
        self,
        client: EngineClient,
        model: str,
        ours: LogProbs,
        *,
        copies: int = 1,
        at_once: bool = False,
        generation: int = 0,
        timeout_s: float | None = None,
    ) -> str:
        """Ask every copy of the engine, judge, remember; the sentence of the verdict that is furthest from equal.

        `at_once` as in `engine_logprobs`; a server of another `generation` than the last one proven never had the
        weights of then.  WrongWeights unless all are proven.
        """
        previous = self._proven if generation == self._generation else None
        verdicts = []
        for copy in range(copies):
            asked = None if copies == 1 else copy
            engines = engine_logprobs(client, model, self.prompts, copy=asked, at_once=at_once, timeout_s=timeout_s)
            verdict = judge(ours, engines, previous, rounding=self._rounding, tolerance=self.tolerance)
            if not verdict.ok:
                which = f" (copy {copy + 1} of {copies})" if copies > 1 else ""
                raise WrongWeights(f"{verdict.sentence}{which} No score is logged for weights that are not proven.")
            verdicts.append(verdict)
        # After a step too small to tell, the one before stays what is told from: an engine that is stuck is found then.
        if previous is None or all(verdict.told for verdict in verdicts):
            self._proven, self._rounding = ours, max(verdict.rms for verdict in verdicts)
            self._generation = generation
        furthest = max(verdicts, key=lambda verdict: verdict.mean_abs).sentence
        return furthest if copies == 1 else f"{furthest}; the furthest of {copies} copies"


def canary_prompts(
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]] = (),
    *,
    count: int = PROMPTS,
    longest: int = LONGEST,
) -> tuple[TokenIds, ...]:
    """`count` token sequences of 2 to `longest` tokens, spread over `prompts`: the end of each with its reference.

    References are where training changes most.  The same input gives the same result on every rank.
    """
    whole = [(*prompt, *(references[at] if at < len(references) else ())) for at, prompt in enumerate(prompts)]
    usable = [tokens for tokens in dict.fromkeys(whole) if len(tokens) > 1]
    if not usable:
        joined = tuple(token for tokens in whole for token in tokens)
        usable = [joined if len(joined) > 1 else joined * 2]
    chosen = dict.fromkeys(usable[at * (len(usable) - 1) // max(count - 1, 1)] for at in range(count))
    return tuple(tokens[-longest:] for tokens in chosen)


def prompts_of(tasks: Sequence[EvalTask], tokenizer: Any) -> tuple[TokenIds, ...]:
    """`canary_prompts` of an evaluation's own samples; renders only those that can be chosen."""
    samples = [sample for task in tasks for sample in task.samples]
    if not samples:  # tasks of lm-evaluation-harness alone
        return canary_prompts([tokenizer.encode(PROSE, add_special_tokens=False)])
    few = [samples[at * (len(samples) - 1) // (4 * PROMPTS)] for at in range(4 * PROMPTS + 1)]
    texts = [tokenizer.encode(sample.reference, add_special_tokens=False) for sample in few]
    return canary_prompts([render_prompt(sample, tokenizer) for sample in few], texts)


def why_no_canary(trainer: Any) -> str | None:
    """Why this run's weights cannot be asked for log-probabilities with a plain forward; None if they can."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("sp", "cp"):
        if (getattr(parallelism, f"{name}_size", None) or 1) > 1:
            return f"{name}_size splits every sequence over the ranks, so that a plain forward means something else"
    return None


def canary_of(trainer: Any, tasks: Sequence[EvalTask], *, exact: bool) -> Canary | None:
    """The canary of a run, the same on every rank; None, and said why, where there can be none.

    `exact`: trainer and engine both compute in float32.
    """
    why_not = why_no_canary(trainer)
    if why_not is not None:
        say(f"vLLM's weights cannot be proven by log-probabilities: {why_not}")
        return None
    return Canary(prompts_of(tasks, trainer.processing_class), dtype="float32" if exact else "bfloat16")


def trainer_logprobs(model: Any, prompts: Sequence[TokenIds], *, deepspeed_engine: Any = None) -> LogProbs:
    """log p(token | tokens before) in nats by the live `model` (`trainer.model`, with its adapters), on every rank.

    One forward of all prompts, right-padded, as the Trainer's own evaluation does it: no gradients, no cache, dropout
    off.  Training modes of all modules and random states are as before; `deepspeed_engine` (`trainer.model_wrapped`)
    lets ZeRO-3 put away what it fetched ahead for a backward that does not come.  Collective under ZeRO-3.
    """
    import torch

    device = next(model.parameters()).device
    longest = max(len(tokens) for tokens in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids, mask = ids.to(device), mask.to(device)
    try:
        with _as_in_evaluation(model, device), torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return tuple(_of_row(logits[row], ids[row], len(tokens)) for row, tokens in enumerate(prompts))
    finally:
        put_away(deepspeed_engine)


def engine_logprobs(
    client: EngineClient,
    model: str,
    prompts: Sequence[TokenIds],
    *,
    copy: int | None = None,
    at_once: bool = False,
    timeout_s: float | None = None,
) -> LogProbs:
    """The same numbers from vLLM, for the weights served as `model`; `copy` as in EngineClient.prompt_logprobs.

    `at_once`: all prompts in one batch, for an engine without adapters.  Two at a time end a vLLM that serves them
    (0.32 on CPUs, the output head's LoRA takes a batch of prompts for one of answers: docs/lab-notes.md).
    """

    def ask(tokens: TokenIds) -> tuple[float, ...]:
        return tuple(client.prompt_logprobs(tokens, model, copy=copy, timeout_s=timeout_s))

    with ThreadPoolExecutor(len(prompts) if at_once else 1) as pool:
        return tuple(pool.map(ask, prompts))


def judge(
    ours: LogProbs,
    engines: LogProbs,
    previous: LogProbs | None = None,
    *,
    rounding: float = 0.0,
    tolerance: Tolerance,
) -> CanaryVerdict:
    """Whether `engines` are the numbers of the weights that gave `ours`, and not those of `previous`.

    `rounding` is how far right weights were apart when `previous` was proven (rms, in nats).  Not ok if a number is
    missing or not finite, if the differences exceed `tolerance`, or if the engine's numbers are nearer to `previous`
    and the step is large enough to tell.  With e = engines - ours and d = previous - ours the share of the way gone is
    t = <e, d> / <d, d>.  It is not 0 for fresh weights and 1 for stale ones: the rounding of `ours`, variance r, is in
    both e and d, so that t is r / D and 1 - r / D, where D = mean(d^2) is the step's own square plus 2 r.  Both are at
    least (D - 2 r) / 2 D from the middle, and that must be CERTAIN standard errors: rms(e - t d) / |d|, or where single
    tokens carry the noise that of HC3, |(e - t d) d / (1 - d^2 / <d, d>)| / <d, d> (MacKinnon and White 1985).
    """
    if [len(row) for row in ours] != [len(row) for row in engines]:
        return _refused(math.inf, math.inf, "it sent another number of log-probabilities than the prompts have tokens")
    pairs = [pair for rows in zip(engines, ours, strict=True) for pair in zip(*rows, strict=True)]
    errors = [theirs - mine for theirs, mine in pairs]
    if not all(math.isfinite(error) for error in errors):
        return _refused(math.inf, math.inf, "a log-probability is not finite")
    mean_abs = math.fsum(map(abs, errors)) / len(errors)
    max_abs = max(map(abs, errors))
    found = f"mean |log-probability difference| {mean_abs:.2g} over {len(errors)} tokens, {max_abs:.2g} at most"
    limit = tolerance.mean_for(ours)
    if mean_abs > limit or max_abs > tolerance.max:
        return _refused(mean_abs, max_abs, f"{found}; rounding explains {limit:.2g} and {tolerance.max:g}")
    proven = CanaryVerdict(
        ok=True, mean_abs=mean_abs, max_abs=max_abs, rms=_rms(errors), sentence=f"weights proven: {found}"
    )
    moved = _moved(ours, previous)
    if moved is None:
        return proven
    step = math.fsum(map(abs, moved)) / len(moved)
    share, from_middle, standard_error = _share(errors, moved, rounding)
    if from_middle <= CERTAIN * standard_error:
        unsure = f"the last evaluation's weights are only {step:.2g} away, too little to tell them apart"
        return dataclasses.replace(proven, sentence=f"{proven.sentence}; {unsure}")
    if share > 0.5:
        return _refused(mean_abs, max_abs, f"its numbers are those of the last evaluation's weights, {step:.2g} away")
    fresh = f"the last evaluation's weights are {step:.2g} away"
    return dataclasses.replace(proven, told=True, sentence=f"{proven.sentence}; {fresh}")


def _share(errors: Sequence[float], moved: Sequence[float], rounding: float) -> tuple[float, float, float]:
    """t of `judge`, how far from the middle it is for fresh and for stale weights at least, and its standard error."""
    square = math.fsum(d * d for d in moved)
    share = math.fsum(e * d for e, d in zip(errors, moved, strict=True)) / square
    rests = [e - share * d for e, d in zip(errors, moved, strict=True)]
    rest = _rms(rests)
    weighed = [each * d / max(1 - d * d / square, 1e-9) for each, d in zip(rests, moved, strict=True)]
    robust = math.sqrt(math.fsum(each * each for each in weighed)) / square
    mean_square = square / len(moved)
    # Both have the engine's rounding in them, too; of the trainer's, `rest` has half at least.
    rounded = max(rounding, rest if rounding else math.sqrt(2) * rest)
    # Few tokens may carry it all, and have been lucky when it was measured: by one standard deviation of a mean square.
    lucky = math.sqrt(2 * math.fsum(d**4 for d in moved)) / square
    from_middle = (mean_square - 2 * rounded**2 * (1 + lucky)) / (2 * mean_square)
    return share, from_middle, max(rest / math.sqrt(square), robust)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def _refused(mean_abs: float, max_abs: float, why: str) -> CanaryVerdict:
    sentence = f"The engine does not answer with the weights of this step: {why}."
    return CanaryVerdict(ok=False, mean_abs=mean_abs, max_abs=max_abs, sentence=sentence)


def _moved(ours: LogProbs, previous: LogProbs | None) -> list[float] | None:
    """previous - ours, None where there is nothing to compare or nothing moved."""
    if previous is None or [len(row) for row in ours] != [len(row) for row in previous]:
        return None
    moved = [old - new for rows in zip(previous, ours, strict=True) for old, new in zip(*rows, strict=True)]
    return moved if any(moved) else None


def _of_row(logits: Any, ids: Any, length: int) -> tuple[float, ...]:
    """Of one prompt, in float32; row by row, since a whole vocabulary of float32 for each token is large."""
    import torch

    rows = torch.log_softmax(logits[: length - 1].float(), dim=-1)
    return tuple(rows.gather(1, ids[1:length].unsqueeze(1)).squeeze(1).tolist())


@contextlib.contextmanager
def _as_in_evaluation(model: Any, device: Any) -> Iterator[None]:
    """Dropout off, compiled graphs left alone (the prompts have a shape of their own), then all as it was."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    # Importing dynamo takes seconds, so only where something has.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with torch.random.fork_rng(devices=devices), eager:
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
