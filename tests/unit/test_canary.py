"""What the canary proves and refuses, on numbers: rounding passes, stale and wrong weights do not."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dsvllm.errors import EngineError
from hf_dsvllm.evaluation.canary import (
    LONGEST,
    TOLERANCES,
    Canary,
    LogProbs,
    canary_prompts,
    judge,
    prompts_of,
    trainer_logprobs,
    why_no_canary,
)
from hf_dsvllm.tasks import EvalSample, EvalTask
from tests.tiny import write_tiny_model

BF16 = TOLERANCES["bfloat16"]


def numbers(seed: int, spread: float, around: LogProbs | None = None) -> LogProbs:
    """Three rows of log-probabilities, or those of `around` with Gaussian noise."""
    rng = random.Random(seed)
    if around is None:
        return tuple(tuple(-rng.expovariate(0.2) for _ in range(63)) for _ in range(3))
    return tuple(tuple(value + rng.gauss(0, spread) for value in row) for row in around)


OURS = numbers(0, 0)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.02, 0.05])
def test_rounding_passes_whatever_the_last_evaluation_was(spread: float) -> None:
    engines = numbers(1, spread, OURS)
    for previous in (None, OURS, numbers(2, 0.001, OURS), numbers(3, 0.5, OURS)):
        verdict = judge(OURS, engines, previous, tolerance=BF16)
        assert verdict.ok, verdict.sentence
        assert "proven" in verdict.sentence


@pytest.mark.parametrize("moved", [0.05, 0.01, 1.0])
def test_weights_of_the_last_evaluation_are_caught_also_below_the_tolerance(moved: float) -> None:
    previous = numbers(2, moved, OURS)
    stale = numbers(3, moved / 10, previous)
    verdict = judge(OURS, stale, previous, tolerance=BF16)
    assert not verdict.ok
    if moved < 0.1:
        assert "those of the last evaluation's weights" in verdict.sentence


def test_a_step_smaller_than_the_noise_is_said_to_be_too_small_to_tell() -> None:
    previous = numbers(2, 0.0005, OURS)
    for engines in (numbers(3, 0.03, OURS), numbers(3, 0.03, previous)):
        verdict = judge(OURS, engines, previous, tolerance=BF16)
        assert verdict.ok
        assert "too little to tell" in verdict.sentence


@pytest.mark.parametrize("rounding", [0.03, 1e-6])
def test_two_roundings_of_the_same_weights_are_no_proof_of_stale_ones(rounding: float) -> None:
    """At the end of a learning rate's decay nothing moves but the trainer's own rounding, which is in both differences.

    SmolLM2 on an H200: an engine that computes more exactly than the trainer seemed to be half way back, and right
    weights were refused.
    """
    refused = 0
    for seed in range(40):
        previous, ours = numbers(100 + seed, rounding, OURS), numbers(200 + seed, rounding, OURS)
        engines = numbers(300 + seed, rounding / 10, OURS)
        known = math.sqrt(rounding**2 + (rounding / 10) ** 2)
        refused += not judge(ours, engines, previous, rounding=known, tolerance=BF16).ok
        refused += not judge(ours, engines, previous, tolerance=BF16).ok  # what the residual alone tells
    assert refused == 0


@pytest.mark.parametrize("step", [2.0, 3.0, 10.0])
def test_stale_weights_are_caught_where_the_step_is_three_times_what_rounding_is(step: float) -> None:
    for seed in range(20):
        before = numbers(400 + seed, 0.01 * step, OURS)
        previous, ours = numbers(100 + seed, 0.01, before), numbers(200 + seed, 0.01, OURS)
        known = math.sqrt(2) * 0.01
        fresh = judge(ours, numbers(300 + seed, 0.01, OURS), previous, rounding=known, tolerance=BF16)
        stale = judge(ours, numbers(300 + seed, 0.01, before), previous, rounding=known, tolerance=BF16)
        assert fresh.ok, fresh.sentence
        assert not stale.ok or "too little" in stale.sentence, stale.sentence
        assert not stale.ok or step < 3


def test_what_no_right_engine_sends_is_refused() -> None:
    for wrong in (numbers(9, 0), numbers(1, 0.5, OURS), OURS[:2], (*OURS[:2], OURS[2][:-1])):
        assert not judge(OURS, wrong, tolerance=BF16).ok
    infinite = (*OURS[:2], (math.nan, *OURS[2][1:]))
    assert "not finite" in judge(OURS, infinite, tolerance=BF16).sentence
    one_token = (*OURS[:2], (OURS[2][0] + 9.0, *OURS[2][1:]))
    assert "at most" in judge(OURS, one_token, tolerance=BF16).sentence


# -- as it was recorded (benchmarks/results/2026-11-23-weights-into-vllm-2xH200.md)

LOGITS_SPREAD = 0.02 * math.sqrt(4096)  # of a random model: its output head's deviation times its normed state's length
RANDOM_8B: LogProbs = tuple(
    tuple(random.Random(64 * row + at).gauss(-math.log(151_936) - LOGITS_SPREAD**2 / 2, LOGITS_SPREAD)
          for at in range(63)) for row in range(3)
)  # fmt: skip


def away(mean_abs: float, seed: int = 5) -> LogProbs:
    """RANDOM_8B with differences of that mean size: the mean of |x| is deviation * sqrt(2 / pi)."""
    return numbers(seed, mean_abs / math.sqrt(2 / math.pi), RANDOM_8B)


@pytest.mark.parametrize("right", [0.06, 0.08, 0.12, 0.17])
@pytest.mark.parametrize("stale", [0.43, 1.07, 1.40, 1.87])
def test_recorded_differences_of_right_weights_pass_and_those_of_stale_ones_do_not(right: float, stale: float) -> None:
    before = away(stale, seed=6)
    for previous in (None, before):
        assert judge(RANDOM_8B, away(right), previous, tolerance=BF16).ok
        assert not judge(RANDOM_8B, numbers(7, right, before), previous, tolerance=BF16).ok


def test_a_trained_model_and_float32_are_held_to_no_less_than_a_fixed_number() -> None:
    trained = tuple(tuple(-random.Random(at).expovariate(0.5) for at in range(63)) for _ in range(3))
    assert BF16.mean_for(trained) == 0.15
    assert not judge(trained, numbers(8, 0.25, trained), tolerance=BF16).ok
    float32 = TOLERANCES["float32"]
    assert float32.mean_for(RANDOM_8B) == 1e-3
    assert not judge(RANDOM_8B, away(0.002), tolerance=float32).ok


# -- on a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_numbers_are_those_of_each_prompt_alone_and_the_model_is_as_before(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    state = torch.random.get_rng_state()
    prompts = ((5, 6, 7, 8, 9, 10), (11, 12), tuple(range(20, 60)))
    found = trainer_logprobs(model, prompts)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (model.training, model.model.layers[0].mlp.training, model.model.layers[1].training) == (True, False, True)
    model.eval()
    for prompt, row in zip(prompts, found, strict=True):
        logits = model(input_ids=torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        alone = logits.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(row), alone, atol=1e-5, rtol=0)


def test_one_wrong_layer_is_caught(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = canary_prompts([list(range(4, 64)), list(range(64, 100))])
    before = trainer_logprobs(model, prompts)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.02)
    assert not judge(before, trainer_logprobs(model, prompts), tolerance=TOLERANCES["float32"]).ok


class Engine:
    """A client whose engine answers with given numbers."""

    def __init__(self, answers: LogProbs) -> None:
        self.answers = dict(zip(CANARIES, answers, strict=True))

    def prompt_logprobs(
        self, tokens: Any, model: str, *, copy: int | None = None, timeout_s: float | None = None
    ) -> list[float]:
        assert copy is None
        return list(self.answers[tuple(tokens)])


class Copies:
    """A client whose engine is several copies, each with numbers of its own."""

    def __init__(self, *engines: Engine) -> None:
        self.engines = engines

    def prompt_logprobs(self, tokens: Any, model: str, *, copy: int, timeout_s: float | None = None) -> list[float]:
        return self.engines[copy].prompt_logprobs(tokens, model)


CANARIES = tuple(tuple(range(at, at + 64)) for at in (4, 5, 6))


def test_a_refusal_is_an_engine_error_and_is_not_remembered_as_proven() -> None:
    canary: Any = Canary(CANARIES, dtype="bfloat16")
    later = numbers(2, 0.05, OURS)
    assert "proven" in canary.prove(Engine(numbers(1, 0.005, OURS)), "base", OURS)
    for _ in range(2):
        with pytest.raises(EngineError, match="last evaluation's weights"):
            canary.prove(Engine(numbers(3, 0.005, OURS)), "base", later)
    assert "proven" in canary.prove(Engine(numbers(3, 0.005, later)), "base", later)


def test_an_engine_that_is_stuck_is_found_once_the_steps_add_up() -> None:
    """Each step is hidden by rounding; what was told from last stays what later numbers are held against."""
    for seed in range(5):
        canary: Any = Canary(CANARIES, dtype="bfloat16")
        weights = OURS
        canary.prove(Engine(numbers(seed, 0.01, OURS)), "base", numbers(50 + seed, 0.01, OURS))
        found = None
        for step in range(1, 12):
            weights = numbers(1000 * seed + step, 0.015, weights)
            try:
                canary.prove(Engine(numbers(100 + step, 0.01, OURS)), "base", numbers(200 + step, 0.01, weights))
            except EngineError:
                found = step
                break
        assert found is not None
        assert found > 1, "at first nobody can tell"


def test_a_server_that_was_started_anew_never_had_the_weights_of_the_last_proof() -> None:
    canary: Any = Canary(CANARIES, dtype="bfloat16")
    later = numbers(2, 0.05, OURS)
    canary.prove(Engine(numbers(1, 0.005, OURS)), "base", OURS)
    seems_stale = Engine(numbers(3, 0.005, OURS))
    with pytest.raises(EngineError, match="last evaluation's weights"):
        canary.prove(seems_stale, "base", later)
    assert "proven" in canary.prove(seems_stale, "base", later, generation=1), "by the tolerance alone"
    assert "proven" in canary.prove(Engine(numbers(4, 0.005, later)), "base", later, generation=1)


def test_every_copy_of_an_engine_has_to_be_proven() -> None:
    canary: Any = Canary(CANARIES, dtype="bfloat16")
    right, other = Engine(numbers(1, 0.005, OURS)), Engine(numbers(2, 1.0, OURS))
    assert canary.prove(Copies(right, right, other), "base", OURS, copies=2).endswith("the furthest of 2 copies")
    with pytest.raises(EngineError, match=r"copy 3 of 3"):
        canary.prove(Copies(right, right, other), "base", OURS, copies=3)


# -- which prompts


def test_prompts_are_few_short_spread_and_end_with_their_references() -> None:
    prompts = [[at] * 100 for at in range(50)]
    chosen = canary_prompts(prompts, [[1000 + at] for at in range(50)])
    assert [tokens[-1] for tokens in chosen] == [1000, 1024, 1049]
    assert {len(tokens) for tokens in chosen} == {LONGEST}
    assert chosen == canary_prompts(prompts, [[1000 + at] for at in range(50)])


@pytest.mark.parametrize("prompts", [[[7]], [[7], [8]], [[7], [8, 9]], [[7, 8], [7, 8]]])
def test_a_prompt_has_at_least_two_tokens_however_short_the_file(prompts: list[list[int]]) -> None:
    chosen = canary_prompts(prompts)
    assert chosen
    assert all(len(tokens) >= 2 for tokens in chosen)


def test_prompts_come_from_the_tasks_as_they_are_asked(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = tuple(
        EvalSample(id=str(at), prompt=({"role": "user", "content": f"{at}?"},), reference=f"r{at}", line=at)
        for at in range(40)
    )
    chosen = prompts_of([EvalTask(name="t", samples=samples, metrics=())], tokenizer)
    texts = [tokenizer.decode(tokens) for tokens in chosen]
    assert texts[0] == "<|im_start|>user\n0?<|im_end|>\n<|im_start|>assistant\nr0"
    assert texts[-1].endswith("r39")
    assert len(chosen) == 3


def test_split_sequences_have_no_canary() -> None:
    def trainer(**sizes: int) -> Any:
        return SimpleNamespace(accelerator=SimpleNamespace(parallelism_config=SimpleNamespace(**sizes)))

    assert why_no_canary(SimpleNamespace(accelerator=SimpleNamespace())) is None
    assert why_no_canary(trainer(sp_size=1, cp_size=1)) is None
    assert "sp_size" in str(why_no_canary(trainer(sp_size=4)))
