"""The real vLLM on a tiny random model: its answers are transformers' own, after every way of changing its weights.

One server is shared by the module (a cold start takes about a minute on two cores); the tests that end it come last.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec, WeightSync, list_engines
from hf_dsvllm.engine.supervisor import birth, engine_processes
from hf_dsvllm.errors import EngineError
from tests.tiny import VOCAB_SIZE, write_tiny_model, write_tiny_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

NEW_TOKENS = 16
EOS = 2
READY_TIMEOUT_S = 420.0


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Ten prompts of 3 to 60 tokens; some share a prefix of more than one cache block, so caching is at work."""
    rng = random.Random(0)
    shared = [rng.randrange(4, VOCAB_SIZE) for _ in range(40)]
    alone = [[rng.randrange(4, VOCAB_SIZE) for _ in range(length)] for length in (3, 7, 19, 33, 60)]
    return alone + [shared + [rng.randrange(4, VOCAB_SIZE) for _ in range(length)] for length in (1, 2, 5, 11, 20)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    spec = EngineSpec(
        model=base,
        python=Path(sys.executable),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="float32",
        max_model_len=256,
        max_lora_rank=8,
        kv_cache_bytes=2**30,
        cpu_threads=1,
    )
    server = EngineServer.start(spec, tmp_path_factory.mktemp("run"))
    try:
        server.wait_ready(READY_TIMEOUT_S)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def client(server: EngineServer) -> Iterator[EngineClient]:
    client = EngineClient(server.uds, default_timeout_s=120.0)
    yield client
    client.close()


@pytest.fixture(scope="module")
def sync(server: EngineServer, client: EngineClient) -> WeightSync:
    return WeightSync(server, client, restart_timeout_s=READY_TIMEOUT_S)


def greedy_by_transformers(model: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS)
        answers.append(tuple(out[0, ids.shape[1] :].tolist()))
    return answers


def greedy_by_vllm(client: EngineClient, prompts: Sequence[Sequence[int]], model: str) -> list[tuple[int, ...]]:
    completions = client.generate(
        prompts, model=model, max_new_tokens=NEW_TOKENS, temperature=0.0, seed=0, stop_token_ids=[EOS]
    )
    assert [completion.prompt_index for completion in completions] == list(range(len(prompts)))
    return [completion.token_ids for completion in completions]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_adapter(base: Path, folder: Path, seed: int) -> Any:
    """Save a LoRA of rank 4 with random A *and* B (PEFT's own start, B = 0, changes nothing); return the PEFT model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model


def test_the_server_starts_in_a_private_folder_and_is_on_record(server: EngineServer, client: EngineClient) -> None:
    assert server.alive
    assert client.health()
    assert server.load_seconds is not None
    assert server.load_seconds > 0
    assert client.version()
    assert client.loaded_models() == ("base",)
    assert stat.S_IMODE(server.uds.parent.stat().st_mode) == 0o700
    assert server.log.name == "vllm-1.log"
    (record,) = [record for record in list_engines() if record.engine.pid == server.pid]
    assert record.state == "running"
    assert record.owner.pid == os.getpid()
    assert len(record.pids) >= 2, "the API server and EngineCore both carry the mark or are in its session"


def test_greedy_answers_of_the_base_model_are_those_of_transformers(
    client: EngineClient, base: Path, prompts: list[list[int]]
) -> None:
    assert greedy_by_vllm(client, prompts, "base") == greedy_by_transformers(load(base), prompts)


def test_prompt_logprobs_are_those_of_transformers(client: EngineClient, base: Path, prompts: list[list[int]]) -> None:
    ids = torch.tensor([prompts[4]])
    with torch.no_grad():
        table = load(base)(ids).logits[0, :-1].log_softmax(-1)
    expected = table.gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert client.prompt_logprobs(prompts[4], "base") == pytest.approx(expected, abs=1e-3)


def test_sampling_returns_n_answers_in_order_and_is_repeatable(client: EngineClient, prompts: list[list[int]]) -> None:
    def ask() -> list[Any]:
        return client.generate(
            prompts[:3], model="base", max_new_tokens=4, temperature=1.0, seed=7, stop_token_ids=[], n=2, logprobs=0
        )

    first = ask()
    assert [(one.prompt_index, one.sample_index) for one in first] == [(i, j) for i in range(3) for j in range(2)]
    assert [one.token_ids for one in ask()] == [one.token_ids for one in first]
    assert all(one.logprobs is not None and len(one.logprobs) == len(one.token_ids) for one in first)


def test_more_prompts_than_fit_one_request_keep_their_order(client: EngineClient, prompts: list[list[int]]) -> None:
    once = greedy_by_vllm(client, prompts, "base")
    assert greedy_by_vllm(client, prompts * 15, "base") == once * 15


def test_hot_loaded_adapters_answer_like_peft_and_replace_each_other(
    client: EngineClient, sync: WeightSync, base: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    answers = []
    for step in (10, 20, 20):
        folder = tmp_path / f"adapter-{len(answers)}"
        model = write_adapter(base, folder, seed=len(answers))
        result = sync.push(folder, "adapter", step)
        assert result.path_used == "hot-load"
        assert client.loaded_models() == ("base", result.model_name)
        answers.append(greedy_by_vllm(client, prompts, result.model_name))
        assert answers[-1] == greedy_by_transformers(model, prompts)
    answers.append(greedy_by_vllm(client, prompts, "base"))
    assert len({tuple(answer) for answer in answers}) == 4, "three adapters and the base all differ"


def test_an_adapter_of_too_high_a_rank_is_refused_in_vllms_words(sync: WeightSync, base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(load(base), LoraConfig(r=16, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="rank"):
        sync.push(tmp_path, "adapter", 30)


def test_an_unknown_model_and_a_too_long_prompt_are_errors_with_the_servers_message(client: EngineClient) -> None:
    with pytest.raises(EngineError, match="nobody"):
        greedy_by_vllm(client, [[5, 6]], "nobody")
    with pytest.raises(EngineError, match="256"):
        greedy_by_vllm(client, [[5] * 300], "base")


def test_reloaded_weights_answer_like_transformers_and_no_cached_prefix_of_old_weights_is_used(
    client: EngineClient, sync: WeightSync, base: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    answers = [greedy_by_vllm(client, prompts, "base")]
    for seed in (1, 2):
        folder = write_tiny_model(tmp_path / f"full-{seed}", seed=seed)
        result = sync.push(folder, "full", seed)
        assert (result.model_name, result.path_used) == ("base", "reload")
        answers.append(greedy_by_vllm(client, prompts, "base"))
        assert answers[-1] == greedy_by_transformers(load(folder), prompts)
    assert len({tuple(answer) for answer in answers}) == 3
    assert sync.push(base, "full", 3).path_used == "reload"
    assert greedy_by_vllm(client, prompts, "base") == answers[0]


def test_a_killed_api_server_leaves_nothing_and_the_next_push_restarts_from_the_snapshot(
    server: EngineServer, client: EngineClient, sync: WeightSync, prompts: list[list[int]], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "new", seed=5)
    for file in tmp_path.glob("new/token*"):
        file.unlink()  # a mid-run snapshot may hold weights and config alone: the first model's tokenizer serves
    old_socket = server.uds
    (record,) = [record for record in list_engines() if record.engine.pid == server.pid]
    os.kill(record.engine.pid, signal.SIGKILL)
    result = sync.push(folder, "full", 40)
    assert result.path_used == "restart"
    assert not [pid for pid in record.pids if birth(pid)]
    assert not old_socket.exists()
    assert server.log.name == "vllm-2.log"
    write_tiny_tokenizer(folder)
    assert greedy_by_vllm(client, prompts, "base") == greedy_by_transformers(load(folder), prompts)


def test_stopping_leaves_no_process_no_socket_and_no_record(server: EngineServer, client: EngineClient) -> None:
    (record,) = [record for record in list_engines() if record.engine.pid == server.pid]
    folder = server.uds.parent
    server.stop()
    server.stop()
    assert not server.alive
    assert not client.health()
    assert not engine_processes(record.engine_id, record.engine.pid)
    assert not folder.exists()
    assert not record.file.exists()
    with pytest.raises(EngineError, match="vLLM process is probably gone"):
        client.version()


def test_a_folder_without_a_model_is_a_clear_error_from_the_log(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    spec = EngineSpec(model=empty, python=Path(sys.executable), device="cpu", dtype="float32")
    server = EngineServer.start(spec, tmp_path / "run")
    folder = server.uds.parent
    try:
        with pytest.raises(EngineError, match="the model was not found") as caught:
            server.wait_ready(READY_TIMEOUT_S)
    finally:
        server.stop()
    assert str(server.log) in str(caught.value)
    assert str(empty) in str(caught.value)
    assert not folder.exists()
