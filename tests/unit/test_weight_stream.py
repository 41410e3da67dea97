"""Live weights into a server that is strict about each release's words: every form, every point of failure."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dsvllm.engine import EngineClient, EngineRefusal, WeightSync
from hf_dsvllm.errors import EngineError
from hf_dsvllm.evaluation.delivery import Delivery
from hf_dsvllm.live import stream as live_weights
from hf_dsvllm.live.stream import _Plan as Plan
from hf_dsvllm.transfer import ipc
from hf_dsvllm.transfer.base import packed
from hf_dsvllm.transfer.ipc import IpcTransfer, Parcel
from tests import weight_taker
from tests.streaming import BUCKET_BYTES, checkpoint, same, send, syncing, tiny_model
from tests.weight_taker import FakeNccl, FakeServer, FakeVllm, gpu_spec, served

FORMS = sorted(weight_taker.KEYS)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    return weight_taker.stand_in(monkeypatch)


@pytest.mark.parametrize(("backend", "release"), FORMS)
def test_every_release_gets_the_weights_in_the_form_it_knows(backend: str, release: str, nccl: FakeNccl) -> None:
    model, fake = tiny_model(), FakeVllm(backend, release)
    with syncing(fake) as sync:
        result = send(model, sync)
        again = send(model, sync) if not fake.weights.clear() else None  # type: ignore[func-returns-value]
    assert same(fake.weights, checkpoint(model))
    assert (result.path_used, result.model_name, result.generation) == (backend, "base", 0)
    assert again is not None
    assert fake.whole
    assert not fake.paused
    assert fake.asked.count("/init_weight_transfer_engine") <= 2, "the connection is kept"
    assert {"start", "update", "finish", "reset"} <= result.phases.keys()


@pytest.mark.parametrize(("backend", "release"), FORMS)
def test_the_server_decides_the_form_even_if_its_version_says_otherwise(
    backend: str, release: str, nccl: FakeNccl
) -> None:
    known_late = release in ("0.22.0", "0.26.0") or (backend, release) == ("nccl", "0.27.0")
    model, fake = tiny_model(), FakeVllm(backend, release, says="1.5.0" if known_late else "0.22.1")
    with syncing(fake) as sync:
        send(model, sync)
    assert same(fake.weights, checkpoint(model))
    assert fake.asked.count("/init_weight_transfer_engine") == (2 if known_late else 1)


def test_a_build_without_a_version_number_is_asked_too(nccl: FakeNccl) -> None:
    fake = FakeVllm("nccl", "0.26.0", says="0.1.dev20+g1f3a")
    with syncing(fake) as sync:
        send(tiny_model(), sync)
    assert fake.whole


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
@pytest.mark.parametrize("failure", ["refuse", "hang"])
@pytest.mark.parametrize(
    ("path", "marked"),
    [
        ("/pause", False),
        ("/init_weight_transfer_engine", False),
        ("/start_weight_update", True),
        ("/update_weights", True),
        ("/finish_weight_update", True),
        ("/reset_prefix_cache", True),
    ],
)
def test_wherever_it_fails_it_says_so_and_the_next_push_makes_the_server_whole(
    backend: str, failure: str, path: str, marked: bool, nccl: FakeNccl, tmp_path: Path
) -> None:
    fake = FakeVllm(backend)
    fake.failing[path] = failure
    with syncing(fake) as sync:
        sync.client.default_timeout_s = 30.0 if failure == "refuse" else 1.0
        with pytest.raises(EngineError, match=r"step 7: the weights could not be streamed to vLLM: .*" + path):
            send(tiny_model(), sync, timeout_s=30.0 if failure == "refuse" else 1.5)
        assert (sync.broken is not None) == marked
        fake.release_hanging.set()
        fake.failing.clear()
        sync.client.default_timeout_s = 30.0
        pushed = sync.push(tmp_path, "full", 8)
        assert sync.server.restarts == ([tmp_path] if marked else [])  # type: ignore[union-attr]
        assert (pushed.path_used, pushed.generation) == (("restart", 1) if marked else ("reload", 0))
        assert sync.stream_path()[0] == backend
        fake.weights.clear()
        assert send(tiny_model(), sync).generation == pushed.generation
    assert fake.whole


def test_a_server_that_has_to_start_anew_takes_no_stream_and_no_sleep_before_that(nccl: FakeNccl) -> None:
    fake = FakeVllm()
    fake.failing["/update_weights"] = "refuse"
    with syncing(fake) as sync:
        with pytest.raises(EngineError, match="was told to fail"):
            send(tiny_model(), sync)
        path, why = sync.stream_path()
        assert path is None
        assert "started again first" in why
        assert "has to be started again" in str(sync.rest())
        with pytest.raises(EngineError, match="started again first"):
            send(tiny_model(), sync)


def test_after_two_failures_in_a_row_files_are_used(nccl: FakeNccl, tmp_path: Path) -> None:
    fake = FakeVllm()
    with syncing(fake) as sync:
        for step in (1, 2):
            assert sync.stream_path()[0] == "ipc"
            fake.failing["/update_weights"] = "refuse"
            with pytest.raises(EngineError, match="was told to fail"):
                send(tiny_model(), sync)
            sync.push(tmp_path, "full", step)
        assert sync.stream_path() == (None, "2 streams in a row failed")
        assert sync.push(tmp_path, "full", 3).path_used == "reload"


def test_after_a_stream_that_brought_other_weights_files_are_used_by_an_engine_started_anew(
    nccl: FakeNccl, tmp_path: Path
) -> None:
    fake = FakeVllm()
    with syncing(fake) as sync:
        send(tiny_model(), sync)
        sync.distrust_streams("they are those of the last evaluation")
        assert not sync.whole
        assert sync.stream_path()[0] is None
        assert sync.push(tmp_path, "full", 8).path_used == "restart"
        assert sync.whole
        assert sync.stream_path() == (None, "weights came out wrong by a stream: they are those of the last evaluation")


def test_an_engine_on_more_gpus_than_the_trainer_takes_no_handles(nccl: FakeNccl) -> None:
    fake = FakeVllm()
    fake.workers = 4
    with syncing(fake) as sync, pytest.raises(EngineError, match="vLLM has 4 GPUs and the trainer 1"):
        send(tiny_model(), sync)
    assert fake.whole


def test_a_rank_without_a_worker_on_its_gpu_gathers_and_exports_nothing(
    nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(path="ipc", workers=2, gpus=("GPU-a", "GPU-b"))
    heard = iter([plan, plan, *[False] * 4, None, "the result"])
    handed: list[Any] = []

    def from_all(value: Any) -> list[Any]:
        handed.append(value)
        return ["GPU-a", "GPU-b"] if value == weight_taker.GPU else [value]

    monkeypatch.setattr(live_weights, "is_main_process", lambda: False)
    monkeypatch.setattr(live_weights, "from_all", from_all)
    monkeypatch.setattr(live_weights, "from_main", lambda value: next(heard))
    live_weights.send(tiny_model(), None, step=7, dtype=torch.bfloat16, bucket_bytes=BUCKET_BYTES)
    assert weight_taker.EXPORTS == []
    assert [value for value in handed if isinstance(value, tuple)] == [(None, None)] * 4, "four buckets were gathered"


def test_the_gpus_of_workers_are_the_first_that_the_server_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-x,6")
    monkeypatch.setattr(ipc, "gpu_uuid", lambda index: f"uuid-{index}")
    assert ipc.worker_uuids("GPU-x,4,6", 2) == ("uuid-1", "uuid-0")
    assert ipc.worker_uuids(None, 2) == ("uuid-0", "uuid-1")


@pytest.mark.parametrize("path", ["/version", "/pause", "/wake_up", "/is_sleeping", "/resume", "/reset_prefix_cache"])
def test_no_call_of_a_stream_waits_longer_than_the_stream_may_take(path: str, nccl: FakeNccl) -> None:
    fake = FakeVllm()
    with syncing(fake) as sync:
        if path in ("/wake_up", "/is_sleeping"):
            sync.rest()
        fake.failing[path] = "hang"
        started = time.monotonic()
        with pytest.raises(EngineError, match="step 7"):
            send(tiny_model(), sync, timeout_s=1.0)
        assert time.monotonic() - started < 15.0, "as long as any call by itself"
        fake.release_hanging.set()


def test_a_server_that_stays_paused_is_started_anew(
    nccl: FakeNccl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVllm()
    fake.failing |= {"/init_weight_transfer_engine": "refuse", "/resume": "refuse"}
    with syncing(fake) as sync:
        with pytest.raises(EngineError, match="told to fail"):
            send(tiny_model(), sync)
        assert "it was paused and does not go on" in str(sync.broken)
        assert sync.push(tmp_path, "full", 8).path_used == "restart"
    assert not fake.paused


def test_a_broadcast_that_hangs_is_cut_off_at_the_deadline(nccl: FakeNccl) -> None:
    nccl.fails = "hang"
    fake = FakeVllm("nccl")
    with syncing(fake) as sync, pytest.raises(EngineError, match=r"no answer within|not done in time"):
        send(tiny_model(), sync, timeout_s=1.0)
    assert nccl.aborted.wait(10.0), "the communicator is aborted"


def test_a_server_whose_workers_never_come_is_an_error_and_no_thread_waits_for_them(
    nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "meet", lambda info: None)
    fake = FakeVllm("nccl")
    with syncing(fake) as sync, pytest.raises(EngineError, match=r"not done in time|none came to the meeting point"):
        send(tiny_model(), sync, timeout_s=0.5)
    assert sync.broken is None


@pytest.mark.parametrize("lacking", ["transfer", "nothing started", "cpu", "adapters"])
def test_without_the_means_there_is_no_stream_and_the_reason_is_said(lacking: str, nccl: FakeNccl) -> None:
    fake = FakeVllm("ipc", "0.26.0")
    spec: dict[str, Any] = {}
    if lacking == "transfer":
        fake.routes -= {"/update_weights"}
        expected = "/update_weights"
    elif lacking == "nothing started":
        spec, expected = {"weight_transfer": None}, "without --weight-transfer-config"
    elif lacking == "cpu":
        spec, expected = {"weight_transfer": None, "sleep_mode": False, "device": "cpu"}, "from files only"
    else:
        spec, expected = {"max_lora_rank": 8}, "0.28 and newer can"
    with syncing(fake, **spec) as sync:
        path, why = sync.stream_path()
        assert path is None
        assert expected in why
        with pytest.raises(EngineError, match="could not be streamed"):
            send(tiny_model(), sync)
        assert sync.broken is None
    assert "/start_weight_update" not in fake.asked


def test_a_server_that_is_gone_has_no_stream() -> None:
    client = EngineClient(Path("/nowhere/at/all"), default_timeout_s=1.0)
    sync = WeightSync(FakeServer(FakeVllm(), None, gpu_spec("ipc")), client)  # type: ignore[arg-type]
    assert sync.stream_path()[0] is None
    assert "does not answer" in sync.stream_path()[1]


def test_weights_go_into_a_sleeping_engine_before_its_cache_wakes(nccl: FakeNccl) -> None:
    fake = FakeVllm()
    with syncing(fake) as sync:
        assert sync.rest() is None
        assert fake.asleep == {"weights", "kv_cache"}
        with pytest.raises(EngineError, match="slept at level 2 and has no weights"):
            sync.wake_for_answers()
        result = send(tiny_model(), sync)
    order = [path for path in fake.asked if "wake_up" in path or "weight" in path or "reset" in path]
    assert order == [
        "/wake_up?tags=weights",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        *["/update_weights"] * 4,
        "/finish_weight_update",
        "/wake_up?tags=kv_cache",
        "/reset_prefix_cache",
    ]
    assert not fake.asleep
    assert {"wake weights", "wake cache"} <= result.phases.keys()
    assert "/pause?mode=wait" not in fake.asked, "nobody asks a sleeping engine"


@pytest.mark.parametrize("refuses", [False, True])
def test_a_sleeping_engine_wakes_beside_the_trainers_own_forward(refuses: bool, nccl: FakeNccl, tmp_path: Path) -> None:
    fake = FakeVllm()
    with served(fake) as uds:
        server: Any = FakeServer(fake, uds, gpu_spec("ipc", sleep_mode=True))
        delivery = Delivery(server, run_dir=tmp_path, timeout_s=5.0)
        with delivery.waking():
            pass
        assert fake.asleep == set()
        delivery.rest()
        fake.failing = {"/wake_up": "refuse"} if refuses else {}
        with delivery.waking():
            pass
        assert fake.asleep == ({"weights", "kv_cache"} if refuses else {"kv_cache"})
        fake.failing = {}
        assert "wake weights" in send(tiny_model(), delivery.sync).phases
        assert fake.asked.count("/wake_up?tags=weights") == (2 if refuses else 1)
        delivery.client.close()


def test_tensors_that_lie_ready_are_offered_where_they_are_and_others_as_a_copy_that_lives_until_the_answer(
    nccl: FakeNccl,
) -> None:
    bucket = [("a", torch.arange(6.0)), ("b", torch.ones(3, dtype=torch.bfloat16))]
    assert [tensor.data_ptr() for tensor in Parcel(bucket, staged=False).memory] == [t.data_ptr() for _, t in bucket]
    fake = FakeVllm("ipc", "0.26.0")
    with served(fake) as uds:
        client = EngineClient(uds)
        for staged in (False, True):
            fake.weights.clear()
            transfer = IpcTransfer(client, staged=staged, forms=("init", "update"))
            transfer.open(deadline=time.monotonic() + 30)
            if not staged:
                client.start_weight_update()
            transfer.send(bucket, deadline=time.monotonic() + 30)
            assert same(fake.weights, dict(bucket))
        client.close()
    assert all(reference() is None for reference in weight_taker.EXPORTS[-1:]), "copies are let go"


def test_packed_tensors_begin_where_their_dtype_can() -> None:
    bucket = [("odd", torch.ones(3, dtype=torch.uint8)), ("half", torch.ones(3).half()), ("wide", torch.ones(2))]
    buffer, ordered = packed(bucket)
    assert [name for name, _ in ordered] == ["wide", "half", "odd"]
    assert buffer.nbytes == 3 + 6 + 8


def test_a_refusal_is_told_from_silence() -> None:
    fake = FakeVllm()
    fake.failing["/version"] = "refuse"
    with served(fake) as uds, pytest.raises(EngineRefusal, match="answered 500: /version was told to fail"):
        EngineClient(uds).version()
    assert os.environ.get("HF_DSVLLM_API_KEY") is None
