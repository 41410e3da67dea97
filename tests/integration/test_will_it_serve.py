"""Every kind of adapter, really trained, answers in the real vLLM as it does in PEFT: token by token, one engine."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_dsvllm.engine import EngineServer, EngineSpec
from hf_dsvllm.evaluation.canary import TOLERANCES, engine_logprobs, judge, trainer_logprobs
from hf_dsvllm.evaluation.evaluator import Evaluator, Sampling
from hf_dsvllm.export.adapter_format import will_it_serve
from hf_dsvllm.live.snapshot import publish
from tests.tiny import VOCAB_SIZE, write_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

NEW_TOKENS = 12
EOS = 2
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("hot-load", {}),
    "rslora": ("hot-load", {"use_rslora": True}),
    "patterns": ("rewrite", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 2, "k_proj": 32}}),
    "dora": ("merge", {"use_dora": True}),
    "rank above 512": ("merge", {"r": 520}),
    "bias": ("merge", {"bias": "all"}),
    "trained tokens": ("merge", {"trainable_token_indices": [10, 11, 12]}),
    "embeddings": ("merge", {"target_modules": ["q_proj", "embed_tokens"]}),
    # These untie the output head, which a running engine would not notice: it is started again, so they come last.
    "saved head": ("merge", {"modules_to_save": ["lm_head"]}),
    "head": ("merge", {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, VOCAB_SIZE) for _ in range(length)] for length in (5, 12, 33)] + [[10, 11, 12, 40]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def evaluator(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluator]:
    spec = EngineSpec(model=base, python=Path(sys.executable), device="cpu", dtype="float32", max_model_len=128,
                      max_lora_rank=8, kv_cache_bytes=2**30, cpu_threads=1)  # fmt: skip
    run = tmp_path_factory.mktemp("run")
    server = EngineServer.start(spec, run)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0, seed=0, timeout_s=300.0, stop_token_ids=(EOS,))
    evaluator = Evaluator(server=server, tasks=(), tokenizer=SimpleNamespace(), sampling=sampling, run_dir=run)
    try:
        server.wait_ready(300.0)
        yield evaluator
    finally:
        evaluator.close()


def trained(base: Path, **given: Any) -> Any:
    """Some steps at a rate that changes every trained tensor visibly."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings | given))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.arange(4, 100).reshape(4, 24)
    model.train()
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def answers_of(model: Any, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=EOS,
        )
        found.append(tuple(out[0, len(prompt) :].tolist()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_answers_like_the_trained_model(
    kind: str, base: Path, evaluator: Evaluator, prompts: list[list[int]], tmp_path: Path
) -> None:
    how, given = KINDS[kind]
    model = trained(base, **given)
    assert will_it_serve(model.peft_config["default"], model).how == how
    if how != "merge":
        evaluator.delivery.sync.push(base, "full", 0)
    evaluator.delivery.merge_base = base if how == "merge" else None
    snapshot = publish(model, tmp_path, step=4, dtype=torch.float32)
    pushed = evaluator.delivery._push(snapshot)
    completions = evaluator.delivery.client.generate(
        prompts, model=pushed.model_name, max_new_tokens=NEW_TOKENS, temperature=0.0, seed=0, stop_token_ids=[EOS]
    )
    mine = trainer_logprobs(model, [tuple(prompt) for prompt in prompts])
    engines = engine_logprobs(evaluator.delivery.client, pushed.model_name, [tuple(prompt) for prompt in prompts])
    verdict = judge(mine, engines, tolerance=TOLERANCES["float32"])
    assert verdict.ok, f"{pushed.path_used}: {verdict.sentence}"
    model.eval()
    assert [completion.token_ids for completion in completions] == answers_of(model, prompts)
    untouched = trainer_logprobs(AutoModelForCausalLM.from_pretrained(base), [tuple(prompt) for prompt in prompts])
    assert not judge(untouched, engines, tolerance=TOLERANCES["float32"]).ok, "training changed nothing"
