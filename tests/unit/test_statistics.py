"""Whether a difference of scores is more than noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hf_dsvllm import statistics
from hf_dsvllm.statistics import FEWEST_PAIRS, Reference, compare, paired_bootstrap, pass_at_k, pass_at_k_scores


def test_bootstrap_interval_is_reproducible_and_brackets_the_difference():
    generator = np.random.default_rng(0)
    before = generator.integers(0, 2, 200).astype(float)
    after = np.maximum(before, generator.integers(0, 2, 200))
    interval = paired_bootstrap(before, after, seed=1)
    assert interval == paired_bootstrap(before, after, seed=1)
    assert interval.mean == pytest.approx(after.mean() - before.mean())
    assert 0 < interval.low < interval.mean < interval.high


def test_bootstrap_agrees_with_the_normal_approximation():
    differences = np.random.default_rng(3).normal(0.1, 1.0, 2000)
    interval = paired_bootstrap(np.zeros(2000), differences, seed=0, resamples=4000)
    half_width = 1.96 * differences.std(ddof=1) / math.sqrt(2000)
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.06)


def test_drawing_counts_is_drawing_samples(monkeypatch):
    differences = np.random.default_rng(0).choice([1.0, 0.0, -1.0], size=100, p=[0.4, 0.4, 0.2])
    by_counts = paired_bootstrap(np.zeros(100), differences, seed=0)
    monkeypatch.setattr(statistics, "FEW_VALUES", 0)
    by_samples = paired_bootstrap(np.zeros(100), differences, seed=0)
    assert (by_counts.low, by_counts.high) == pytest.approx((by_samples.low, by_samples.high), abs=0.011)


def test_bootstrap_of_equal_scores_is_a_point():
    interval = paired_bootstrap([1.0, 0.0], [1.0, 0.0], seed=0, resamples=10)
    assert (interval.low, interval.high, interval.mean) == (0.0, 0.0, 0.0)


def test_bootstrap_refuses_unpaired_scores():
    with pytest.raises(ValueError):
        paired_bootstrap([1.0], [1.0, 0.0], seed=0)
    with pytest.raises(ValueError):
        paired_bootstrap([], [], seed=0)


@pytest.mark.parametrize(
    ("count", "gains", "losses", "lowest"), [(32, 0.3, 0.15, 0.90), (64, 0.1, 0.05, 0.90), (200, 0.3, 0.15, 0.93)]
)
def test_the_interval_covers_the_true_difference_about_as_often_as_it_says(count, gains, losses, lowest):
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        differences = generator.choice([1.0, -1.0, 0.0], size=count, p=[gains, losses, 1 - gains - losses])
        interval = paired_bootstrap(np.zeros(count), differences, seed=seed, resamples=1000)
        covered += interval.low - 1e-9 <= gains - losses <= interval.high + 1e-9
    assert lowest <= covered / 400 <= 0.98


def scores(*values: float | None) -> dict[str, float | None]:
    return {str(index): value for index, value in enumerate(values)}


def right(count: int, of: int = 100) -> dict[str, float | None]:
    """The first `count` of `of` answers are right."""
    return scores(*([1.0] * count + [0.0] * (of - count)))


def test_a_gain_beyond_noise_over_the_base_is_said_with_its_interval():
    comparison = compare(right(60), base=Reference(step=0, scores=right(40)), best=None)
    assert comparison.over_base is not None
    assert 0.1 < comparison.over_base.low < 0.2 < comparison.over_base.high < 0.3
    assert comparison.over_best is None
    low, high = 100 * comparison.over_base.low, 100 * comparison.over_base.high
    assert comparison.sentence == f"+20.0 points over step 0 (95 % interval {low:+.1f} to {high:+.1f})"


def test_a_small_gain_is_called_noise():
    now = scores(*[0.0] * 5, *[1.0] * 6, *[1.0] * 60, *[0.0] * 29)
    then = scores(*[1.0] * 5, *[0.0] * 6, *[1.0] * 60, *[0.0] * 29)
    sentence = compare(now, base=Reference(step=0, scores=then), best=None).sentence
    assert sentence.startswith("+1.0 points over step 0 (95 % interval -")
    assert sentence.endswith(", within noise")


def test_a_loss_is_said_without_a_sign_and_its_interval_with_one():
    sentence = compare(right(30), base=Reference(step=0, scores=right(60)), best=None).sentence
    assert sentence.startswith("30.0 points below step 0 (95 % interval -")


@pytest.mark.parametrize(
    ("now", "then", "higher_is_better", "verdict"),
    [
        (right(60), right(40), True, "better than"),
        (right(40), right(60), True, "worse than"),
        (right(60), right(40), False, "worse than"),
        (right(40), right(60), False, "better than"),
        (right(59), right(60), True, "no worse than the best so far within noise"),
        (right(61), right(60), True, "no worse than the best so far within noise"),
        (right(60), right(60), True, "as good as the best so far (step 50) on each of 100 prompts"),
    ],
)
def test_the_best_so_far_is_beaten_missed_or_not_told_apart(now, then, higher_is_better, verdict):
    comparison = compare(now, base=None, best=Reference(step=50, scores=then), higher_is_better=higher_is_better)
    assert comparison.sentence.startswith(verdict)
    assert "step 50" in comparison.sentence


def test_base_and_best_stand_in_one_sentence_unless_they_are_the_same_evaluation():
    base, best = Reference(step=0, scores=right(10)), Reference(step=50, scores=right(60))
    both = compare(right(60), base=base, best=best).sentence
    assert "over step 0" in both
    assert "; as good as the best so far" in both
    assert "best" not in compare(right(60), base=base, best=base).sentence
    assert compare(right(60), base=None, best=None).sentence == ""


def test_pairs_are_made_by_id_and_answers_without_a_score_are_left_out():
    now, then = right(60), dict(reversed(right(40).items()))
    plain = compare(now, base=Reference(step=0, scores=right(40)), best=None)
    assert compare(now, base=Reference(step=0, scores=then), best=None) == plain
    with_gaps = compare(
        {**now, "new": 1.0, "silent": None}, base=Reference(step=0, scores={**then, "silent": 0.0}), best=None
    )
    assert with_gaps == plain


def test_too_few_prompts_have_no_interval():
    few = right(1, of=FEWEST_PAIRS - 1)
    comparison = compare(few, base=Reference(step=0, scores=few), best=Reference(step=5, scores=few))
    assert (comparison.over_base, comparison.over_best) == (None, None)
    assert comparison.sentence.count(f"{FEWEST_PAIRS - 1} prompts have a score in both") == 2


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer():
    for samples, correct, k in [(5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 1, 6), (7, 3, 4), (4, 4, 1)]:
        draws = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_stays_exact_where_binomials_overflow_floats():
    expected = 1 - math.comb(9_000, 100) / math.comb(10_000, 100)  # integers of 240 digits; their ratio is a float
    assert pass_at_k(10_000, 1_000, 100) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_is_unbiased():
    generator = np.random.default_rng(0)
    estimates = [pass_at_k(10, int(generator.binomial(10, 0.2)), 3) for _ in range(4000)]
    assert np.mean(estimates) == pytest.approx(1 - 0.8**3, abs=4 * np.std(estimates) / math.sqrt(4000))


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_impossible_counts_are_refused(samples, correct, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(samples, correct, k)


def test_pass_at_k_of_prompts_leaves_out_those_with_too_few_scores():
    assert pass_at_k_scores([[1, 0, 0, 0], [0.0, None, None, 1.0], [1.0, None, None, None]], 2) == [0.5, 1.0, None]
    with pytest.raises(ValueError, match="right or wrong"):
        pass_at_k_scores([[0.5, 1.0]], 1)
