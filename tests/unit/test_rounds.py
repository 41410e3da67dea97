"""Rounds of evaluation in a thread: in order, none lost, again after an end; and deliveries that are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dsvllm.engine.remote import RemoteServer
from hf_dsvllm.engine.sync import SyncResult
from hf_dsvllm.errors import EngineError, WiringError
from hf_dsvllm.evaluation.delivery import Asked, Delivery
from hf_dsvllm.evaluation.rounds import Rounds
from hf_dsvllm.live.restore import restore
from hf_dsvllm.live.snapshot import Snapshot
from hf_dsvllm.ranks import Ranks


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


def test_a_remote_server_with_other_weights_is_refused_with_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> str:
        raise EngineError("the engine does not answer with the weights of this step")

    canary: Any = SimpleNamespace(prove=refuse)
    delivery = Delivery(RemoteServer("http://127.0.0.1:9"), run_dir=tmp_path, timeout_s=5.0, canary=canary)
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


def test_an_engine_that_does_not_start_compiled_is_started_eager(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restarts: list[dict[str, Any]] = []

    def wait_ready(_: float) -> None:
        if not restarts:
            raise EngineError("vLLM did not start (exit code 1).")

    server: Any = SimpleNamespace(
        spec=SimpleNamespace(model="base", enforce_eager=False),
        uds=tmp_path / "socket",
        alive=False,
        wait_ready=wait_ready,
        restart=lambda **how: restarts.append(how),
    )
    Delivery(server, run_dir=tmp_path, timeout_s=5.0).wait_ready()
    assert restarts == [{"model": "base", "eager": True}]
    assert "without compiled code: vLLM did not start" in capsys.readouterr().err
