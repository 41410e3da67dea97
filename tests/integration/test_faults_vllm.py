"""Faults that only the real vLLM can show: it refuses broken weights, stops at its deadline, dies in mid-answer."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec, WeightSync, list_engines
from hf_dsvllm.engine.supervisor import birth
from hf_dsvllm.errors import EngineError
from tests.integration.test_engine_vllm import write_adapter
from tests.tiny import write_tiny_model
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

READY_TIMEOUT_S = 420.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


def spec_of(base: Path, kv_cache_bytes: int = 2**30) -> EngineSpec:
    return EngineSpec(model=base, python=Path(sys.executable), device="cpu", dtype="float32", max_model_len=1024,
                      max_lora_rank=8, kv_cache_bytes=kv_cache_bytes, cpu_threads=1)  # fmt: skip


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    server = EngineServer.start(spec_of(base), tmp_path_factory.mktemp("run"))
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


def ask(client: EngineClient, tokens: int = 4, timeout_s: float = 60.0) -> list[tuple[int, ...]]:
    prompts = [[5, 6, 7, at] for at in range(8, 8 + 64)]
    completions = client.generate(
        prompts, model="base", max_new_tokens=tokens, temperature=1.0, seed=1, stop_token_ids=[], timeout_s=timeout_s
    )
    return [completion.token_ids for completion in completions]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def test_a_cut_adapter_is_refused_and_the_engine_goes_on(
    server: EngineServer, client: EngineClient, base: Path, tmp_path: Path
) -> None:
    before = ask(client)
    write_adapter(base, tmp_path, seed=1)
    cut(tmp_path / "adapter_model.safetensors")
    with pytest.raises(EngineError, match="vLLM answered"):
        WeightSync(server, client).push(tmp_path, "adapter", 1)
    assert client.health()
    assert client.loaded_models() == ("base",)
    assert ask(client) == before


def test_cut_weights_are_an_error_and_no_silence(client: EngineClient, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "new", seed=3)
    cut(folder / "model.safetensors")
    with pytest.raises(EngineError, match="vLLM answered"):
        client.reload_weights(folder)


def test_a_stopped_engine_is_given_up_at_the_deadline_and_replaced(server: EngineServer, client: EngineClient) -> None:
    (record,) = [record for record in list_engines() if record.engine.pid == server.pid]
    processes = record.pids
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="had no answer within"):
        ask(client, timeout_s=1.0)
    assert not client.health()
    server.restart()
    assert not [pid for pid in processes if birth(pid)]
    client.connect(server.uds)
    server.wait_ready(READY_TIMEOUT_S)
    assert len(ask(client)) == 64


def test_an_engine_core_killed_while_it_answers_is_an_error_at_once_and_leaves_nothing(
    server: EngineServer, client: EngineClient
) -> None:
    (record,) = [record for record in list_engines() if record.engine.pid == server.pid]
    processes = record.pids
    folder = server.uds.parent
    (core,) = [pid for pid in processes if "EngineCore" in " ".join(psutil.Process(pid).cmdline())]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask, client, 900)
        wait_for(lambda: b"vllm:num_requests_running{" in running(client))
        os.kill(core, signal.SIGKILL)
        with pytest.raises(EngineError):
            answers.result()
    wait_for(lambda: not server.alive)
    assert not [pid for pid in processes if birth(pid)]
    assert not folder.exists()


def running(client: EngineClient) -> bytes:
    """The lines of vLLM's metrics that count running requests, without those that say none."""
    lines = client._http.get("/metrics", timeout=5.0).content.splitlines()
    return b"\n".join(line for line in lines if line.startswith(b"vllm:num_requests_running{") and line[-4:] != b" 0.0")


def test_a_cache_larger_than_the_machine_is_explained_from_the_log(base: Path, tmp_path: Path) -> None:
    server = EngineServer.start(spec_of(base, kv_cache_bytes=2**45), tmp_path)
    try:
        with pytest.raises(EngineError, match="too little memory"):
            server.wait_ready(READY_TIMEOUT_S)
    finally:
        server.stop()
    assert not [record for record in list_engines() if record.run_dir == tmp_path]
