"""The proof in vLLM: log-probabilities of the same texts, the trained model in transformers, the export in vLLM."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.verify import LOGPROB_FACTOR, Comparison

__all__ = ["EngineVerification", "compare_in_engine", "prove_in_vllm"]

GIB = 1 << 30
READY_S = 1800.0
LENGTH_SLACK = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineVerification:
    """Log-probabilities of `tokens` tokens in vLLM against the trained model's in transformers, in nats."""

    vllm: str
    tokens: int
    mean_logprob_difference: float
    max_logprob_difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the mean difference keeps the limit that transformers had to keep too."""
        return self.mean_logprob_difference <= self.limit


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
            f"{found.mean_logprob_difference:.4g} (allowed {found.limit:.4g}). transformers loads it correctly, so "
            "this is vLLM's reading of it: try another vLLM, or report it with manifest.json."
        )
    return found


def compare_in_engine(client: EngineClient, model: str, comparison: Comparison) -> EngineVerification:
    """Ask a running vLLM for the log-probabilities of the texts; figures without a judgement."""
    differences: list[float] = []
    for text, expected in zip(comparison.texts, comparison.logprobs, strict=True):
        differences += _differences(client.prompt_logprobs(text, model), expected)
    return EngineVerification(
        vllm=client.version(),
        tokens=len(differences),
        mean_logprob_difference=sum(differences) / len(differences),
        max_logprob_difference=max(differences),
        limit=LOGPROB_FACTOR * comparison.verification.mean_limit,
    )


def _differences(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(found, expected, strict=True)]
