"""Two copies of a real vLLM behind one socket (data parallel): both get every weight; nothing listens outside."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec, WeightSync, list_engines
from hf_dsvllm.engine.remote import copies_of
from hf_dsvllm.engine.supervisor import birth
from hf_dsvllm.evaluation.canary import Canary, LogProbs, WrongWeights, trainer_logprobs
from tests.integration.test_engine_vllm import greedy_by_transformers, greedy_by_vllm, load, write_adapter
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

READY_TIMEOUT_S = 420.0
PROMPTS = [[5 + at, 9, 11 + at, 40, 41, 42] for at in range(12)]
CANARIES = (tuple(range(4, 60)), tuple(range(70, 120)))


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
        data_parallel_size=2,
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


def of_each_copy(client: EngineClient, model: str) -> list[list[float]]:
    return [client.prompt_logprobs(CANARIES[0], model, copy=copy) for copy in (0, 1)]


def logprobs_of(folder: Path) -> LogProbs:
    return trainer_logprobs(load(folder).eval(), CANARIES)


def test_the_server_says_how_many_copies_share_its_requests(client: EngineClient) -> None:
    assert (client.world_size(), client.world_size(of_one_copy=True)) == (2, 1)
    assert copies_of(client, client.routes()) == 2


def test_nothing_listens_beyond_this_host(server: EngineServer) -> None:
    (record,) = [record for record in list_engines() if record.engine.pid == server.pid]
    listening = [
        connection.laddr.ip
        for pid in record.pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening, "no copy listens at all: the test asks the wrong processes"
    assert set(listening) == {"127.0.0.1"}


def test_both_copies_answer_with_the_weights_of_every_push(
    client: EngineClient, sync: WeightSync, base: Path, tmp_path: Path
) -> None:
    canary = Canary(CANARIES, dtype="float32")
    canary.prove(client, "base", logprobs_of(base), copies=2)
    folder = write_tiny_model(tmp_path / "full", seed=3)
    assert sync.push(folder, "full", 10).path_used == "reload"
    sentence = canary.prove(client, "base", logprobs_of(folder), copies=2)
    assert "the furthest of 2 copies" in sentence
    with pytest.raises(WrongWeights, match="copy 1 of 2"):
        canary.prove(client, "base", logprobs_of(base), copies=2)
    answers = greedy_by_vllm(client, PROMPTS, "base")
    assert answers == greedy_by_transformers(load(folder), PROMPTS)
    first, second = of_each_copy(client, "base")
    assert first == pytest.approx(second, abs=1e-5)
    assert sync.push(base, "full", 20).path_used == "reload"


def test_both_copies_answer_with_a_hot_loaded_adapter(
    client: EngineClient, sync: WeightSync, base: Path, tmp_path: Path
) -> None:
    model = write_adapter(base, tmp_path / "adapter", seed=1)
    pushed = sync.push(tmp_path / "adapter", "adapter", 30)
    assert pushed.path_used == "hot-load"
    ours = trainer_logprobs(model.eval(), CANARIES)
    assert "2 copies" in Canary(CANARIES, dtype="float32").prove(client, pushed.model_name, ours, copies=2)
    assert greedy_by_vllm(client, PROMPTS, pushed.model_name) == greedy_by_transformers(model, PROMPTS)


def test_a_killed_copy_takes_the_other_with_it_and_the_next_push_starts_both_anew(
    server: EngineServer, client: EngineClient, sync: WeightSync, base: Path
) -> None:
    (record,) = [record for record in list_engines() if record.engine.pid == server.pid]
    named = {pid: psutil.Process(pid).name() for pid in record.pids}
    (victim,) = [pid for pid, name in named.items() if name.endswith("EngineCore_DP1")]
    os.kill(victim, signal.SIGKILL)
    until = time.monotonic() + 60
    while server.alive and time.monotonic() < until:
        time.sleep(0.1)
    assert not server.alive
    assert sync.push(base, "full", 40).path_used == "restart"
    assert not [pid for pid in record.pids if birth(pid)]
    first, second = of_each_copy(client, "base")
    assert first == pytest.approx(second, abs=1e-5)
