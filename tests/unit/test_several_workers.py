"""Engines of several workers, and NCCL met ahead: nothing is tried that could be refused, nothing left out of step."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_dsvllm.errors import EngineError
from hf_dsvllm.live import stream as live_weights
from hf_dsvllm.transfer.ipc import merged_handles
from tests import weight_taker
from tests.streaming import checkpoint, same, send, syncing, tiny_model
from tests.weight_taker import FakeNccl, FakeVllm

FORMS = sorted(weight_taker.KEYS)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    return weight_taker.stand_in(monkeypatch)


@pytest.mark.parametrize("release", [release for backend, release in FORMS if backend == "nccl"])
def test_several_workers_are_told_nothing_they_could_refuse(release: str, nccl: FakeNccl) -> None:
    model, fake = tiny_model(), FakeVllm("nccl", release)
    fake.workers = 4
    with syncing(fake, tensor_parallel_size=4) as sync:
        result = send(model, sync)
    assert same(fake.weights, checkpoint(model))
    assert result.path_used == "nccl"
    assert fake.asked.count("/init_weight_transfer_engine") == 1


def test_several_workers_that_refused_something_are_started_anew_before_they_are_asked_again(
    nccl: FakeNccl, tmp_path: Path
) -> None:
    fake = FakeVllm("nccl", "0.26.0", says="0.1.dev20+g1f3a")
    fake.workers = 2
    with syncing(fake, tensor_parallel_size=2) as sync:
        with pytest.raises(EngineError, match="unexpected keyword argument"):
            send(tiny_model(), sync)
        assert fake.left_behind
        assert sync.push(tmp_path, "full", 7).path_used == "restart"
    assert not fake.left_behind


def test_so_is_one_whose_workers_refused_an_adapter(tmp_path: Path) -> None:
    fake = FakeVllm()
    fake.workers = 2
    with syncing(fake, tensor_parallel_size=2, max_lora_rank=8) as sync:
        fake.whole = False
        with pytest.raises(EngineError, match="the base is gone"):
            sync.push(tmp_path, "adapter", 1)
        assert sync.push(tmp_path, "adapter", 2).path_used == "restart"


def test_an_engine_met_ahead_is_not_connected_to_again(nccl: FakeNccl) -> None:
    model, fake = tiny_model(), FakeVllm("nccl")
    with syncing(fake) as sync:
        live_weights.meet(sync)
        live_weights.meet(sync)
        assert fake.connected
        assert not fake.paused
        send(model, sync)
    assert fake.asked.count("/init_weight_transfer_engine") == 1
    assert same(fake.weights, checkpoint(model))


@pytest.mark.parametrize("workers", [1, 2])
def test_one_that_cannot_be_met_ends_nothing_and_several_workers_start_anew(workers: int, nccl: FakeNccl) -> None:
    fake = FakeVllm("nccl")
    fake.workers = workers
    fake.failing["/init_weight_transfer_engine"] = "refuse"
    with syncing(fake, tensor_parallel_size=workers) as sync:
        live_weights.meet(sync)
        assert (sync.broken is not None) == (workers > 1)
        fake.failing.clear()
        if workers == 1:
            assert send(tiny_model(), sync).path_used == "nccl"


def test_handles_of_several_gpus_are_offered_together() -> None:
    left, right = [{"GPU-0": (1,)}, {"GPU-0": (2,)}], [{"GPU-1": (3,)}, {"GPU-1": (4,)}]
    assert merged_handles([left, right]) == [{"GPU-0": (1,), "GPU-1": (3,)}, {"GPU-0": (2,), "GPU-1": (4,)}]


def test_one_that_hangs_while_it_is_met_is_not_streamed_into(nccl: FakeNccl) -> None:
    """It would wait inside the call, and the next stream for it."""
    fake = FakeVllm("nccl")
    fake.failing["/init_weight_transfer_engine"] = "hang"
    with syncing(fake) as sync:
        live_weights.meet(sync, timeout_s=0.3)
        assert sync.broken is not None
