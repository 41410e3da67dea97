"""What the proofs are taken on, and what the one in vLLM makes of its answers, with a stand-in for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_dsvllm.export import verify
from hf_dsvllm.export.verify import ANSWER_TOKENS, Answer, Comparison, Verification
from hf_dsvllm.export.verify_engine import EngineVerification, compare_in_engine

FIGURES = Verification(
    prompts=1, tokens=3, device="cpu", mean_abs_difference=0, max_abs_difference=0, reference_std=1, greedy_agreement=1,
    mean_limit=0.03, greedy_limit=0.97,
)  # fmt: skip


def compared(answered: Sequence[int]) -> EngineVerification:
    """The trained model answers 5 6 7 8; 60 is as good as 6."""
    answer = Answer(question=(1, 2), tokens=(5, 6, 7, 8), ties=tuple(map(frozenset, ({5}, {6, 60}, {7}, {8}))))
    comparison = Comparison(verification=FIGURES, texts=((1, 2, 3),), logprobs=((-1.0, -2.0),), answers=(answer,))

    def generate(questions: list[tuple[int, ...]], **asked: object) -> list[SimpleNamespace]:
        assert questions == [(1, 2)]
        assert (asked["temperature"], asked["max_new_tokens"]) == (0.0, ANSWER_TOKENS)
        return [SimpleNamespace(token_ids=tuple(answered))]

    client = SimpleNamespace(
        prompt_logprobs=lambda *_: [-1.0, -2.0], version=lambda: "0.32", generate=generate
    )  # fmt: skip
    return compare_in_engine(client, "base", comparison)


@pytest.mark.parametrize(
    ("answered", "agreement", "tokens", "passed"),
    [
        ([5, 6, 7, 8], 1.0, 4, True),
        ([5, 6], 1.0, 2, True),  # it stopped: the trained model was made to go on
        ([5, 60, 99, 99], 1.0, 2, True),  # a tie, after which it is another answer
        ([5, 6, 99, 8], 2 / 3, 3, False),
        ([99, 6, 7, 8], 0.0, 1, False),
    ],
)
def test_greedy_answers_are_compared_up_to_where_they_part(
    answered: list[int], agreement: float, tokens: int, passed: bool
) -> None:
    found = compared(answered)
    assert (found.answer_agreement, found.answer_tokens, found.passed) == (pytest.approx(agreement), tokens, passed)
    assert found.mean_logprob_difference == 0


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TEXTS = [torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(length)) for length in (3, 9, 5)]


@torch.inference_mode()
def test_texts_in_one_batch_have_the_logits_they_have_alone() -> None:
    model = tiny_llama()
    alone = torch.cat([model(input_ids=ids).logits[0] for ids in TEXTS])
    torch.testing.assert_close(verify._logits(model, TEXTS), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
@torch.inference_mode()
def test_answers_are_greedy_whatever_the_model_would_do_by_itself(adapted: bool) -> None:
    model = tiny_llama()
    expected = list(TEXTS)
    for _ in range(ANSWER_TOKENS):
        following = [model(input_ids=ids).logits[:, -1:].argmax(dim=-1) for ids in expected]
        expected = [torch.cat(pair, dim=1) for pair in zip(expected, following, strict=True)]
    model.generation_config = GenerationConfig(eos_token_id=expected[0][0, 5].item(), repetition_penalty=9.0)
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).eval()
    assert all(torch.equal(*pair) for pair in zip(verify._answered(model, TEXTS), expected, strict=True))
