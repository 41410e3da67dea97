"""Where scores come late the callback never lets training wait for vLLM, nor writes what a stream brings sooner."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from hf_dsvllm import callback as callback_module
from hf_dsvllm.evaluation.delivery import FREE, GONE, STARTING
from hf_dsvllm.evaluation.rounds import Round
from tests.callbacks import made, publishing


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return publishing(monkeypatch)


@pytest.mark.parametrize(("late", "wait", "waited"), [(True, False, False), (True, True, True), (False, False, True)])
def test_training_does_not_wait_for_an_engine_that_is_busy_with_a_late_score(
    late: bool, wait: bool, waited: bool, tmp_path: Path, published: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step they wait in a folder; where the score has to be waited for, or is not late, they go."""
    callback = made(tmp_path, streams=True, late=late)
    delivery = SimpleNamespace(wait_ready=lambda: None, sync=None, state=FREE)
    callback.session.evaluator.delivery = delivery  # type: ignore[attr-defined]
    callback.session.evaluator.shut_door = lambda step: None  # type: ignore[method-assign]
    left: list[int | None] = []
    rounds = callback._rounds
    rounds.pending = [0]

    def collect(*, leave: int | None = None) -> list[Round]:
        left.append(leave)
        rounds.pending = [0] if leave is None else []
        return []

    rounds.collect = collect  # type: ignore[method-assign, assignment]
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(callback_module, "send", lambda *_, step, **__: sent.append(step))
        callback._send(4, wait)
    assert left[0] == (0 if waited else None)
    assert sent == ([4] if waited else [])
    assert ("still busy with step 0" in capsys.readouterr().err) == (not waited)


@pytest.mark.parametrize("state", [STARTING, GONE])
@pytest.mark.parametrize(("late", "wait", "waited"), [(True, False, False), (True, True, True), (False, False, True)])
def test_training_does_not_wait_for_an_engine_that_is_not_there(
    late: bool, wait: bool, waited: bool, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run, or one whose engine has died: another thread waits for it, or starts it anew."""
    callback = made(tmp_path, streams=True, late=late)
    calls: list[str] = []
    delivery = SimpleNamespace(wait_ready=lambda: calls.append("waited"), sync=None, state=state)
    callback.session.evaluator.delivery = delivery  # type: ignore[attr-defined]
    callback.session.evaluator.shut_door = lambda step: None  # type: ignore[method-assign]
    monkeypatch.setattr(callback_module, "send", lambda *_, **__: calls.append("sent"))
    callback._send(4, wait)
    assert calls == (["waited", "sent"] if waited else [])


@pytest.mark.parametrize("busy", ["step 0", "starting"])
def test_an_evaluation_moves_to_the_first_step_at_which_the_engine_is_free(
    busy: str, tmp_path: Path, published: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """By disk it would stall training for longer than the steps it moves by; the last step waits for its own."""
    callback = made(tmp_path, streams=True, late=True)
    delivery = SimpleNamespace(state=STARTING if busy == "starting" else FREE)
    callback.session.evaluator.delivery = delivery  # type: ignore[attr-defined]
    callback._rounds.pending = [0] if busy == "step 0" else []
    callback._rounds.collect = lambda *, leave=None: []  # type: ignore[method-assign, assignment]
    begun: list[tuple[int, bool]] = []
    state, args = callback.trainer.state, callback.trainer.args
    callback._evaluate = lambda *, wait: begun.append((state.global_step, wait))  # type: ignore[method-assign, assignment]

    def steps(*numbers: int) -> None:
        for number in numbers:
            state.global_step = number
            callback.measure = SimpleNamespace(step_ends=lambda: None, count_skipped=lambda _: None)  # type: ignore[assignment]
            callback.on_step_end(args, state, TrainerControl())

    steps(4, 5, 6)
    assert not begun
    assert capsys.readouterr().err.count("moves to the first step") == 1
    callback._rounds.pending, delivery.state = [], FREE
    steps(7)
    assert begun == [(7, False)]
    delivery.state = STARTING
    steps(8)
    assert begun == [(7, False), (8, True)]


def test_after_giving_up_a_late_run_goes_on_without_its_evaluator(tmp_path: Path, published: list[int]) -> None:
    """The third failure ends vLLM and the evaluator with it; who asked it then would end the run."""
    callback = made(tmp_path, streams=True, late=True)
    rounds, session = callback._rounds, callback.session
    session.stop_engine = lambda: delattr(session, "evaluator")  # type: ignore[method-assign]
    callback._failures = 2
    rounds.pending = [2]

    def collect(*, leave: int | None = None) -> list[Round]:
        rounds.pending, found = [], [Round(step=step, scores={}, error="it is gone") for step in rounds.pending]
        return found

    rounds.collect = collect  # type: ignore[method-assign, assignment]
    callback.measure = SimpleNamespace(step_ends=lambda: None, count_skipped=lambda _: None)  # type: ignore[assignment]
    for step in (4, 6, 8):
        callback.trainer.state.global_step = step
        callback.on_step_end(callback.trainer.args, callback.trainer.state, TrainerControl())
    assert callback._failures == 3
    assert not rounds.pending
    assert not published
