"""Rounds of evaluation in a thread: in order, none lost, again after an end; and deliveries that are refused."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dsvllm.engine.remote import RemoteServer
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.engine.spec import EngineSpec
from hf_dsvllm.engine.sync import SyncResult
from hf_dsvllm.errors import EngineError, WiringError
from hf_dsvllm.evaluation.canary import WrongWeights
from hf_dsvllm.evaluation.delivery import FREE, GONE, STARTING, Asked, Delivery
from hf_dsvllm.evaluation.rounds import Rounds
from hf_dsvllm.live.restore import restore
from hf_dsvllm.live.snapshot import Snapshot
from hf_dsvllm.ranks import Ranks
from hf_dsvllm.tensors.fourbit import merge_place


def answered(asked: Asked) -> Any:
    if asked.step == 2:
        raise EngineError("the engine is gone")
    return SimpleNamespace(scores={"eval_gen_a_b": asked.step / 10})


def test_rounds_come_back_in_order_with_scores_or_the_reason() -> None:
    rounds = Rounds(answered, Ranks(60.0))
    for step in (1, 2, 3):
        rounds.begin(Asked(step=step))
    assert rounds.pending == [1, 2, 3]
    found = rounds.collect(leave=0)
    assert [(done.step, dict(done.scores), done.error) for done in found] == [
        (1, {"eval_gen_a_b": 0.1}, None),
        (2, {}, "EngineError: the engine is gone"),
        (3, {"eval_gen_a_b": 0.3}, None),
    ]
    assert rounds.pending == []
    rounds.close()


def test_a_second_training_of_the_same_trainer_is_answered_too() -> None:
    rounds = Rounds(answered, Ranks(60.0))
    for _ in range(2):
        rounds.begin(Asked(step=1))
        assert [done.step for done in rounds.collect(leave=0)] == [1]
        rounds.close()
    rounds.close()


def test_what_an_interrupted_training_left_is_neither_answered_nor_reported_in_the_next() -> None:
    seen: list[int] = []
    first_may_end = threading.Event()

    def slow(asked: Asked) -> Any:
        seen.append(asked.step)
        first_may_end.wait(10.0)
        return SimpleNamespace(scores={"eval_gen_a_b": asked.step / 10})

    rounds = Rounds(slow, Ranks(60.0))
    rounds.begin(Asked(step=1))
    rounds.begin(Asked(step=2))
    while not seen:
        time.sleep(0.001)
    left = rounds._thread
    assert left is not None
    rounds.abandon()
    assert rounds.pending == []
    assert rounds.collect(leave=0) == []
    first_may_end.set()
    left.join(10.0)
    rounds.begin(Asked(step=3))
    assert [done.step for done in rounds.collect(leave=0)] == [3]
    assert seen == [1, 3]
    rounds.close()


def test_a_remote_server_with_other_weights_is_refused_with_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise EngineError("the engine does not answer with the weights of this step")

    canary: Any = SimpleNamespace(prove=refuse)
    server = RemoteServer("http://127.0.0.1:9")
    server._spec = EngineSpec(model="base", python=tmp_path, device="cuda")
    delivery = Delivery(server, run_dir=tmp_path, timeout_s=5.0, canary=canary)
    pushed = SyncResult(model_name="base", path_used="reload", why="a test", seconds=0.0)
    monkeypatch.setattr(delivery, "_push", lambda _: pushed)
    asked = Asked(step=4, snapshot=Snapshot(path=tmp_path, kind="full", step=4), ours=((0.0,),))
    with pytest.raises(EngineError, match="with the weights of this step"):
        delivery.deliver(asked)


@pytest.mark.parametrize("broken", [True, False])
def test_a_snapshot_that_cannot_be_read_leaves_the_model_as_it_is(broken: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    other = write_tiny_model(tmp_path / "other", seed=1)
    if broken:
        (other / "model.safetensors").write_bytes(b"cut")
        with pytest.raises(WiringError, match="cannot be read"):
            restore(model, other, "full")
    else:
        restore(model, other, "full")
    same = [torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()]
    assert all(same) == broken


def test_an_engine_that_does_not_start_is_started_once_more_as_simple_as_it_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restarts: list[dict[str, Any]] = []

    def wait_ready(_: float) -> None:
        if not restarts:
            raise EngineError("vLLM did not start (exit code 1).")

    def restart(**how: Any) -> None:
        restarts.append(how)
        server.spec = dataclasses.replace(server.spec, enforce_eager=True, data_parallel_size=1)

    server: Any = SimpleNamespace(
        spec=EngineSpec(model="base", python=tmp_path, device="cuda", enforce_eager=False, data_parallel_size=2),
        uds=tmp_path / "socket",
        alive=False,
        wait_ready=wait_ready,
        restart=restart,
    )
    Delivery(server, run_dir=tmp_path, timeout_s=5.0).wait_ready()
    assert restarts == [{"model": "base", "simple": True}]
    assert "no compiled code: vLLM did not start" in capsys.readouterr().err


class SleepyServer:
    """A server on a GPU shared with training, as far as a delivery touches it."""

    def __init__(self, folder: Path) -> None:
        self.spec = EngineSpec(model="base", python=folder, device="cuda", sleep_mode=True)
        self.uds = folder / "socket"
        self.alive = True
        self.ready = True
        self.restarts = 0
        self.closed = False

    def wait_ready(self, _: float) -> None:
        if not self.ready:
            raise EngineError("vLLM was not ready after 5 s (still running).")

    def restart(self, **_: Any) -> None:
        self.restarts += 1
        self.alive = True

    def stop(self) -> None:
        self.alive = False

    close = stop


class Sync:
    """A WeightSync that answers `rest` with what is given, and notes what it is told."""

    def __init__(self, answer: str | EngineError | None = None, *, whole: bool = True) -> None:
        self.answer, self.whole = answer, whole
        self.rests = 0
        self.distrusted: list[str] = []

    def rest(self) -> str | None:
        self.rests += 1
        if isinstance(self.answer, EngineError):
            raise self.answer
        return self.answer

    def distrust_streams(self, reason: str) -> None:
        self.distrusted.append(reason)


def shared(tmp_path: Path, sync: Any, *, healthy: bool = True, **more: Any) -> tuple[Delivery, SleepyServer]:
    server: Any = SleepyServer(tmp_path)
    delivery = Delivery(server, run_dir=tmp_path, timeout_s=5.0, **more)
    delivery.sync = sync
    delivery.client = SimpleNamespace(health=lambda: healthy, connect=lambda _: None)  # type: ignore[assignment]
    return delivery, server


@pytest.mark.parametrize(
    ("sync", "alive"),
    [
        (Sync(None), True),
        (Sync("vLLM 0.26 cannot load a base again"), True),  # it lacks the means, and lives
        (Sync("the engine has to be started again", whole=False), False),
        (Sync(EngineError("POST /sleep had no answer within 120.0 s")), False),
    ],
)
def test_an_engine_in_no_state_to_sleep_is_ended_rather_than_awake_beside_training(
    sync: Sync, alive: bool, tmp_path: Path
) -> None:
    delivery, server = shared(tmp_path, sync)
    delivery.rest()
    assert (sync.rests, server.alive, server.restarts) == (1, alive, 0)
    delivery.rest()
    assert sync.rests == (2 if alive else 1)


def test_a_dead_or_hanging_engine_is_not_loaded_beside_training_on_its_gpu(tmp_path: Path) -> None:
    delivery, server = shared(tmp_path, Sync(), healthy=False)
    delivery.revive()
    assert (server.alive, server.restarts) == (False, 0)
    # On its own GPU, or always awake, it loads while training goes on.
    server.spec = dataclasses.replace(server.spec, sleep_mode=False)
    delivery.revive()
    assert server.restarts == 1


@pytest.mark.parametrize(
    ("alive", "answers", "age_s", "state"),
    [(True, True, 9.0, FREE), (True, False, 1.0, STARTING), (True, False, 9.0, GONE), (False, False, 1.0, GONE)],
)
def test_an_engine_that_never_answers_is_gone_once_a_start_may_not_take_longer(
    alive: bool, answers: bool, age_s: float, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise evaluations would wait for it to the end of the run, and nobody would start it anew."""
    server = EngineServer(EngineSpec(model=tmp_path, python=tmp_path, device="cpu"), tmp_path)
    monkeypatch.setattr(EngineServer, "alive", alive)
    monkeypatch.setattr(EngineServer, "age_seconds", age_s)
    monkeypatch.setattr(EngineServer, "answers", lambda self: answers)
    monkeypatch.setattr(EngineServer, "uds", tmp_path / "socket")
    assert Delivery(server, run_dir=tmp_path, timeout_s=5.0).state == state


@pytest.mark.parametrize("ready", [True, False])
def test_an_engine_nobody_asks_at_the_start_sleeps_once_it_is_there(ready: bool, tmp_path: Path) -> None:
    sync = Sync()
    delivery, server = shared(tmp_path, sync, healthy=ready)
    server.ready = ready
    delivery.rest_until_asked()
    assert (sync.rests, server.alive) == ((1, True) if ready else (0, False))


@pytest.mark.parametrize(
    ("refusal", "told"), [(WrongWeights("other weights"), ["other weights"]), (EngineError("no answer"), [])]
)
def test_streamed_weights_that_turn_out_to_be_others_are_told_to_who_streams(
    refusal: EngineError, told: list[str], tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise refusal

    canary: Any = SimpleNamespace(prove=refuse)
    sync = Sync()
    delivery, _ = shared(tmp_path, sync, canary=canary)
    sent = SyncResult(model_name="base", path_used="ipc", why="a test", seconds=0.0)
    with pytest.raises(EngineError):
        delivery.deliver(Asked(step=4, sent=sent, ours=((0.0,),)))
    assert sync.distrusted == told


@pytest.mark.parametrize("late", [True, False])
def test_adapters_are_merged_on_the_cpu_while_training_may_need_the_gpu(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (64 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    places: list[str] = []
    delivery, _ = shared(tmp_path, Sync())
    monkeypatch.setattr(delivery, "_push", lambda _: places.append(merge_place(1 << 20)[0].type))
    delivery.deliver(Asked(step=4, late=late))
    assert places == ["cpu" if late else "cuda"]
    assert merge_place(1 << 20)[0].type == "cuda"


def test_a_remote_server_that_never_answered_keeps_its_own_error(tmp_path: Path) -> None:
    """Rest comes after every evaluation, whatever came of it."""
    Delivery(RemoteServer("http://127.0.0.1:1"), run_dir=tmp_path, timeout_s=1.0).rest()
