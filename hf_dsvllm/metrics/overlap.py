"""How much of the reference an answer shares: ROUGE-L, sentence BLEU, chrF, each from 0 to 1."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hf_dsvllm.errors import MissingDependencyError
from hf_dsvllm.metrics.base import Metric

__all__ = ["METRICS", "bleu", "chrf", "longest_common_subsequence", "rouge_l"]

WORD = re.compile(r"\w+")


def rouge_l(completion: str, reference: str) -> float:
    """ROUGE-L, the F-measure of the longest common subsequence of words (Lin, 2004, section 3.1, with beta = 1).

    P = LCS / words of the completion;  R = LCS / words of the reference;  F = 2 P R / (P + R), 0 if LCS is 0

    Words are runs of letters, digits and underscores after case folding; nothing is stemmed.  In a script without
    spaces a whole clause is one word: use chrf there.
    """
    answer, truth = WORD.findall(completion.casefold()), WORD.findall(reference.casefold())
    common = longest_common_subsequence(answer, truth)
    # 2 P R / (P + R) with P = common / a and R = common / t is 2 common / (a + t).
    return 2 * common / (len(answer) + len(truth)) if common else 0.0


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one word of `b` at a time over a bit set of `a` (Hyyrö, 2004).

    With M[x] the positions of x in `a` as bits and V all ones: for each x in `b`: U = V & M[x]; V = (V + U) | (V - U).
    The length is the number of zeros in the lowest len(a) bits of V.  As fast as adding integers of len(a) bits.
    """
    positions: defaultdict[str, int] = defaultdict(int)
    for index, word in enumerate(a):
        positions[word] |= 1 << index
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hits = row & positions.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def bleu(completion: str, reference: str) -> float:
    """BLEU of one sentence by sacrebleu (13a tokens, exponential smoothing, effective order), divided by 100.

    The mean of it is not corpus BLEU, whose n-gram counts are added up before they are divided.
    """
    return _as_share(_scorers()[0].sentence_score(completion.strip(), [reference.strip()]).score)


def chrf(completion: str, reference: str) -> float:
    """chrF (character 6-grams, beta 2; Popović, 2015) of one sentence by sacrebleu, divided by 100."""
    return _as_share(_scorers()[1].sentence_score(completion.strip(), [reference.strip()]).score)


def _as_share(percent: float) -> float:
    return min(percent / 100, 1.0)  # sacrebleu gives 100.00000000000004 for equal texts


@functools.cache
def _scorers() -> tuple[Any, Any]:
    """sacrebleu's BLEU and chrF.  Raises MissingDependencyError."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise MissingDependencyError(
            "the metrics bleu and chrf are computed by sacrebleu, which is not installed: "
            "pip install 'hf-dsvllm[metrics]'"
        ) from error
    return BLEU(effective_order=True), CHRF()


def check_words(reference: str) -> str | None:
    if WORD.search(reference):
        return None
    return f"the reference {reference!r} holds no word, so rouge_l would be 0 for every answer"


def check_sacrebleu(reference: str) -> str | None:
    """A reference that is not blank; asks for sacrebleu before a model is loaded rather than at the first answer."""
    _scorers()
    return None if reference.strip() else "the reference is blank, so bleu and chrf would be 0 for every answer"


METRICS = (
    Metric(name="rouge_l", function=rouge_l, check_reference=check_words),
    Metric(name="bleu", function=bleu, check_reference=check_sacrebleu),
    Metric(name="chrf", function=chrf, check_reference=check_sacrebleu),
)
