"""ROUGE-L, BLEU and chrF against known values, and what is said where sacrebleu is absent."""

from __future__ import annotations

import random
import sys

import pytest

from hf_dsvllm.errors import MissingDependencyError
from hf_dsvllm.metrics import overlap


def plain_longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """The textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_longest_common_subsequence_is_that_of_the_textbook():
    generator = random.Random(0)
    for _ in range(300):
        a, b = (generator.choices("abcd", k=generator.randrange(12)) for _ in range(2))
        assert overlap.longest_common_subsequence(a, b) == plain_longest_common_subsequence(a, b), (a, b)


def test_rouge_l_is_that_of_the_paper():
    reference = "police killed the gunman"  # Lin (2004), section 3.1
    assert overlap.rouge_l("police kill the gunman", reference) == 0.75
    assert overlap.rouge_l("the gunman kill police", reference) == 0.5
    assert overlap.rouge_l("police", reference) == pytest.approx(2 * 1 * 0.25 / 1.25)
    assert overlap.rouge_l("", reference) == 0.0


def test_long_answers_are_compared_in_full():
    words = [str(number) for number in range(20_000)]
    assert overlap.longest_common_subsequence(words, words[::2]) == 10_000


def test_bleu_and_chrf_are_sacrebleus_as_shares():
    sacrebleu = pytest.importorskip("sacrebleu")
    answer, truth = "the cat sat on a mat today", "the cat sat on the mat"
    assert overlap.bleu(answer, truth) == pytest.approx(sacrebleu.sentence_bleu(answer, [truth]).score / 100)
    assert overlap.chrf(answer, truth) == pytest.approx(sacrebleu.sentence_chrf(answer, [truth]).score / 100)
    assert 0 < overlap.bleu(answer, truth) < overlap.chrf(answer, truth) < 1
    assert overlap.bleu("", truth) == overlap.chrf("", truth) == 0.0


def test_without_sacrebleu_the_reference_check_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    overlap._scorers.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'hf-dsvllm\[metrics\]'"):
        overlap.check_sacrebleu("a reference")
