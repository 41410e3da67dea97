"""The proof in vLLM: log-probabilities and greedy answers, the trained model in transformers, the export in vLLM."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.verify import ANSWER_TOKENS, GREEDY_LIMIT, LOGPROB_FACTOR, Answer, Comparison

__all__ = ["EngineVerification", "compare_in_engine", "prove_in_vllm"]

GIB = 1 << 30
READY_S = 1800.0
LENGTH_SLACK = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineVerification:
    """Log-probabilities of `tokens` tokens in vLLM against the trained model's in transformers, in nats.

    `answer_agreement` is the share of the `answer_tokens` that vLLM generates greedily as the trained model does, near
    ties included, up to where an answer goes another way; None without a chat template.
    """

    vllm: str
    tokens: int
    mean_logprob_difference: float
    max_logprob_difference: float
    limit: float
    answer_tokens: int = 0
    answer_agreement: float | None = None
    greedy_limit: float = GREEDY_LIMIT

    @property
    def passed(self) -> bool:
        """Whether mean difference and greedy answers keep the limits that transformers had to keep too."""
        agrees = self.answer_agreement is None or self.answer_agreement >= self.greedy_limit
        return self.mean_logprob_difference <= self.limit and agrees


def prove_in_vllm(
    export: Path,
    comparison: Comparison,
    *,
    python: Path,
    device: Literal["cuda", "cpu"],
    base: Path | None = None,
    rank: int | None = None,
) -> EngineVerification:
    """Start vLLM on `export` (an adapter of `rank` on `base` if those are given), compare, stop it.

    Raises ExportError if the limit is not kept and EngineError if vLLM does not start.
    """
    length = max(len(text) for text in comparison.texts) + LENGTH_SLACK
    spec = EngineSpec(
        model=base or export,
        python=python,
        device=device,
        dtype="float32" if device == "cpu" else "auto",
        tokenizer=None,
        max_model_len=length,
        max_lora_rank=rank,
        kv_cache_bytes=GIB,
    )
    with tempfile.TemporaryDirectory(prefix="hf-dsvllm-proof-") as folder:
        server = EngineServer.start(spec, Path(folder))
        try:
            server.wait_ready(READY_S)
            client = EngineClient(server.uds)
            if rank is not None:
                client.load_adapter("export", export)
            found = compare_in_engine(client, "base" if rank is None else "export", comparison)
            client.close()
        finally:
            server.stop()
    if not found.passed:
        raise ExportError(
            f"In vLLM {found.vllm} the export differs from the trained model: mean |log-probability difference| "
            f"{found.mean_logprob_difference:.4g} (allowed {found.limit:.4g}), greedy answers alike "
            f"{found.answer_agreement} (at least {found.greedy_limit}). transformers loads it correctly, so this is "
            " vLLM's reading of it: try another vLLM, or report it with manifest.json."
        )
    return found


def compare_in_engine(client: EngineClient, model: str, comparison: Comparison) -> EngineVerification:
    """Ask a running vLLM for the log-probabilities of the texts and for its answers; figures without a judgement."""
    differences: list[float] = []
    for text, expected in zip(comparison.texts, comparison.logprobs, strict=True):
        differences += _differences(client.prompt_logprobs(text, model), expected)
    agreed, asked = _agreement(client, model, comparison.answers)
    return EngineVerification(
        vllm=client.version(),
        tokens=len(differences),
        mean_logprob_difference=sum(differences) / len(differences),
        max_logprob_difference=max(differences),
        limit=LOGPROB_FACTOR * comparison.verification.mean_limit,
        answer_tokens=asked,
        answer_agreement=agreed / asked if asked else None,
    )


def _agreement(client: EngineClient, model: str, answers: Sequence[Answer]) -> tuple[int, int]:
    """(tokens alike, tokens compared): where an answer goes another way, even by a tie, what follows says nothing."""
    if not answers:
        return 0, 0
    questions = [answer.question for answer in answers]
    found = client.generate(
        questions, model=model, max_new_tokens=ANSWER_TOKENS, temperature=0.0, seed=None, stop_token_ids=()
    )
    alike = compared = 0
    for answer, completion in zip(answers, found, strict=True):
        for token, own, ties in zip(completion.token_ids, answer.tokens, answer.ties, strict=False):
            compared += 1
            alike += token in ties
            if token != own:
                break
    return alike, compared


def _differences(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(found, expected, strict=True)]
