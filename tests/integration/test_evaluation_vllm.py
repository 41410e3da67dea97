"""One real engine, two evaluations: several answers a prompt, lm-evaluation-harness, and a client of the user's own."""

from __future__ import annotations

import importlib.util
import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dsvllm.engine import EngineServer, EngineSpec
from hf_dsvllm.evaluation.delivery import Asked
from hf_dsvllm.evaluation.evaluator import Evaluator, HarnessTasks, Sampling
from hf_dsvllm.live.snapshot import Snapshot
from hf_dsvllm.tasks import load_task
from tests.tiny import write_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

QUESTIONS = ("count to three", "name a river", "what is left of a cake that was eaten", "why")
CHOICES = (" one", " two or three", " none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, an evaluation file with settings of its own, and a task of lm-eval."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "later", seed=1)
    # More tokens than vLLM reads at a time, so that some prompts would be read in two pieces.
    asked = [*QUESTIONS, *(f"{n} " + "and again " * 18 for n in range(16))]
    rows = [{"prompt": [{"role": "user", "content": text}], "reference": "e"} for text in asked]
    (folder / "Sampled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"samples": 3, "temperature": 1.0, "max_new_tokens": 12, "metrics": ["contains", "rouge_l"]}
    (folder / "Sampled.task.json").write_text(json.dumps(settings))
    docs = [{"question": text, "choices": CHOICES, "label": place % 3} for place, text in enumerate(QUESTIONS)]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in docs))
    task = {
        "task": "Tiny-Choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "choices.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "choice.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def evaluator(place: Path) -> Iterator[Evaluator]:
    run = place / "run"
    spec = EngineSpec(
        model=place / "model", python=Path(sys.executable), device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="float32", max_model_len=256, kv_cache_bytes=2**30, cpu_threads=1,
    )  # fmt: skip
    server = EngineServer.start(spec, run)
    try:
        yield Evaluator(
            server=server,
            tasks=[load_task(place / "Sampled.jsonl")],
            tokenizer=AutoTokenizer.from_pretrained(place / "model"),
            sampling=Sampling(max_new_tokens=200, temperature=0.0, seed=7, timeout_s=400.0, stop_token_ids=(2,)),
            run_dir=run,
            harness=HarnessTasks(names=(str(place / "choice.yaml"),), limit=3),
            expose_port=0,
        )
    finally:
        server.stop()


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evals" / name).read_text(encoding="utf-8").splitlines()]


def likeliest(model_folder: Path, text: str) -> int:
    """The choice transformers finds most likely after `text`."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    sums = []
    for choice in CHOICES:
        before, ids = len(tokenizer(text)["input_ids"]), tokenizer(text + choice)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(logprobs[place - 1, ids[place]].item() for place in range(before, len(ids))))
    return max(range(len(sums)), key=sums.__getitem__)


def test_two_evaluations_by_samples_harness_and_client(place: Path, evaluator: Evaluator) -> None:
    run = place / "run"
    key = (run / "engine" / "expose.key").read_text(encoding="utf-8")
    assert stat.S_IMODE((run / "engine" / "expose.key").stat().st_mode) == 0o600
    assert evaluator.door is not None
    client = httpx.Client(
        base_url=evaluator.door.url.removesuffix("/v1"), headers={"Authorization": f"Bearer {key}"}, timeout=60.0
    )
    early = client.post("/v1/completions", json={"model": "training", "prompt": "x"})
    assert (early.status_code, early.headers["Retry-After"]) == (503, "5")

    first = evaluator.evaluate(Asked(step=0))
    assert set(first.scores) == {
        "eval_gen_sampled_contains", "eval_gen_sampled_contains_pass_at_3", "eval_gen_sampled_rouge_l",
        "eval_gen_tiny_choice_acc",
    }  # fmt: skip
    sampled = rows_of(run, "step-000000.sampled.jsonl")
    assert all(len(row["samples"]) == 3 for row in sampled)
    assert len({one["answer"] for row in sampled for one in row["samples"]}) > len(sampled)  # each seed its own
    for row in sampled:
        hits = [one["scores"]["contains"] for one in row["samples"]]
        assert row["scores"]["contains"] == pytest.approx(sum(hits) / 3)
        assert row["scores"]["contains_pass_at_3"] == max(hits)
    chosen = rows_of(run, "step-000000.tiny_choice.jsonl")
    right = [likeliest(place / "model", text) == place_ % 3 for place_, text in enumerate(QUESTIONS[:3])]
    assert [bool(row["scores"]["acc"]) for row in chosen] == right
    assert first.scores["eval_gen_tiny_choice_acc"] == pytest.approx(sum(right) / 3)

    def asked() -> str:
        body = {"model": "training", "prompt": "name a river", "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "training"
        return answer.json()["choices"][0]["text"]

    before = asked()
    assert before == greedy(place / "model")
    for path in ("/v1/load_lora_adapter", "/collective_rpc", "/sleep", "/reset_prefix_cache", "/v1/models/../../sleep"):
        assert client.post(path, json={}).status_code == 404
    with client.stream("POST", "/v1/chat/completions", json={
        "model": "training", "messages": [{"role": "user", "content": "why"}], "max_tokens": 4, "stream": True,
    }) as stream:  # fmt: skip
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {"training"}

    again = evaluator.evaluate(Asked(step=0))
    assert again.scores == first.scores  # fixed seeds
    assert rows_of(run, "step-000000.sampled.jsonl") == sampled
    assert rows_of(run, "step-000000.tiny_choice.jsonl") == chosen

    snapshot = Snapshot(path=place / "later", step=10, kind="full")
    evaluator.evaluate(Asked(step=10, snapshot=snapshot))
    assert asked() == greedy(place / "later") != before
    scores = rows_of(run, "scores.jsonl")
    assert [row["step"] for row in scores] == [0, 10]
    assert "an interval needs" in scores[1]["comparisons"]["eval_gen_sampled_contains"]["sentence"]

    evaluator.close()
    with pytest.raises(httpx.TransportError):
        client.get("/v1/models")


def greedy(model_folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer("name a river", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
