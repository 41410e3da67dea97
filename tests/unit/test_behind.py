"""A snapshot written behind training: of the weights as they were, or none at all."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dsvllm import callback as callback_module
from hf_dsvllm.errors import ExportError
from hf_dsvllm.evaluation import keeping
from hf_dsvllm.evaluation.rounds import Round
from hf_dsvllm.evaluation.steering import Steering
from hf_dsvllm.live import behind as behind_module
from hf_dsvllm.live.behind import Behind
from hf_dsvllm.live.snapshot import Snapshot, publish
from hf_dsvllm.measure import BESIDE, RunMeasure
from hf_dsvllm.tensors import shard_file
from tests.callbacks import KEY, made, publishing
from tests.full_models import STREAMED, contents, experts, llama, same_bits

HOW: dict[str, Any] = {"step": 3, "dtype": torch.bfloat16, "tokenizer": None}


def begun(model: Any, run_dir: Path, **changes: Any) -> Behind:
    found = Behind.begin(model, run_dir, **(HOW | changes))
    assert found is not None
    return found


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    opened = threading.Event()
    write = behind_module.stream_to_files

    def later(*args: Any, **how: Any) -> None:
        assert opened.wait(60)
        write(*args, **how)

    monkeypatch.setattr(behind_module, "stream_to_files", later)
    return opened


@pytest.mark.parametrize("name", STREAMED)
def test_it_is_what_publish_would_have_written_whatever_training_does_meanwhile(
    name: str, tmp_path: Path, gate: threading.Event
) -> None:
    torch.manual_seed(0)
    model = STREAMED[name](tmp_path)
    wanted = contents(publish(model, tmp_path / "wanted", **HOW).path)
    behind = begun(model, tmp_path / "run")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert not behind.done
    assert not behind.snapshot.path.exists()
    gate.set()
    snapshot = behind.finish()
    assert behind.done
    assert (snapshot.kind, snapshot.step, snapshot.path) == ("full", 3, tmp_path / "run" / "snapshots" / "step-3")
    found = contents(snapshot.path)
    assert same_bits(found[0], wanted[0])
    assert found[1] == wanted[1]


def test_what_only_all_ranks_or_transformers_can_write_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tmp_path)
    assert Behind.begin(experts(), tmp_path / "run", **HOW) is None
    assert Behind.begin(torch.nn.Linear(2, 2), tmp_path / "run", **HOW) is None
    monkeypatch.setattr(behind_module, "_room_beside", lambda *_: 1000.0)
    assert Behind.begin(model, tmp_path / "run", **HOW) is None
    monkeypatch.undo()
    model.peft_config = {}
    assert Behind.begin(model, tmp_path / "run", **HOW) is None
    del model.peft_config
    model.model.norm.weight.ds_id = 1
    assert Behind.begin(model, tmp_path / "run", **HOW) is None
    assert not (tmp_path / "run").exists()


def test_room_is_what_neither_training_nor_anybody_else_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * gib, 140 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 60 * gib)
    room = behind_module._room_beside
    assert room(torch.device("cuda", 0), 80 * gib) == (40 + 60 - 80 - 14) * gib
    assert room(torch.device("cuda", 0), 0) == 0, "before anything is measured"


def test_a_full_disk_is_told_in_the_end_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_file.os, "pwrite", full)
    behind = begun(llama(tmp_path), tmp_path / "run")
    with pytest.raises(ExportError, match="No space left on device"):
        behind.finish()
    assert list((tmp_path / "run" / "snapshots").iterdir()) == []


# -- in a run


def streamed(step: int, score: float) -> Round:
    told: Any = SimpleNamespace(line=lambda: "scored", higher_is_better={KEY: True})
    return Round(step=step, scores={KEY: score}, result=told)


class Slow:
    """A snapshot behind training that is done when the test says so."""

    def __init__(self, path: Path, error: Exception | None = None) -> None:
        self.snapshot = Snapshot(path=path, kind="full", step=4)
        self.error = error
        self.done = False
        self.size_bytes = 100
        self.then: Any = None

    def finish(self) -> Snapshot:
        if self.error is not None:
            raise self.error
        self.snapshot.path.mkdir(parents=True, exist_ok=True)
        self.then(self.snapshot)
        return self.snapshot


def beginning(monkeypatch: pytest.MonkeyPatch, slow: Slow) -> None:
    def begin(*_: Any, then: Any, **__: Any) -> Slow:
        slow.then = then
        return slow

    monkeypatch.setattr(keeping, "Behind", SimpleNamespace(begin=begin))


def test_training_goes_on_and_the_best_is_noted_once_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publishing(monkeypatch)
    slow = Slow(tmp_path / "snapshots" / "step-4")
    beginning(monkeypatch, slow)
    callback = made(tmp_path, streams=True)
    best = tmp_path / "snapshots" / "best.json"
    callback._take([streamed(4, 0.5)])
    callback._keeping.settle(wait=False)
    assert not best.exists()
    slow.done = True
    callback._keeping.settle(wait=False)
    assert best.exists()
    assert callback._keeping.lost is None
    assert callback._last_snapshot(4) == slow.snapshot
    assert published == [], "it is there"


@pytest.mark.parametrize("at", ["evaluation", "end"])
def test_the_next_evaluation_and_the_end_wait_for_it(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publishing(monkeypatch)
    slow = Slow(tmp_path / "snapshots" / "step-4")
    beginning(monkeypatch, slow)
    finished: list[Any] = []
    callback = made(tmp_path, streams=True, finish=lambda _, snapshot: finished.append(snapshot))
    callback.trainer.args.metric_for_best_model = KEY if at == "evaluation" else None
    callback._take([streamed(4, 0.5)])
    callback._send = lambda step, wait: SimpleNamespace()  # type: ignore[method-assign, assignment, return-value]
    if at == "evaluation":
        callback._evaluate()
    else:
        callback.on_train_end(callback.trainer.args, callback.trainer.state, None)
        assert finished == [slow.snapshot]
    assert (tmp_path / "snapshots" / "best.json").exists()


def test_one_that_did_not_get_to_the_disk_is_said_and_the_last_weights_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = publishing(monkeypatch)
    monkeypatch.setattr(callback_module, "prune", lambda *_, **__: None)
    beginning(monkeypatch, Slow(tmp_path / "snapshots" / "step-4", error=ExportError("the disk is full")))
    callback = made(tmp_path, streams=True)
    callback.trainer.args.metric_for_best_model = None
    callback._take([streamed(4, 0.5)])
    callback.on_train_end(callback.trainer.args, callback.trainer.state, None)
    assert "step 4: its weights, the best so far, could not be kept: ExportError: the disk is full" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "snapshots" / "best.json").exists()
    assert published == [4]


def test_memory_beside_a_copy_is_not_taken_for_what_training_needs() -> None:
    measure = RunMeasure()
    measure.mark("steps")
    measure.copy_held(100)
    measure.mark("steps")
    measure.mark("loading")
    measure.copy_held(0)
    measure.mark("end")
    assert list(measure.phases) == ["steps", BESIDE, "loading", "end"]


@pytest.mark.parametrize("trained", [True, False])
def test_room_for_the_next_copy_is_not_what_the_last_one_left(
    trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training reserves 80 and keeps them; the copy takes 16 more.  Before the first step its needs are not known."""
    gauge = {"now": 80, "peak": 80}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: gauge["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: gauge.update(peak=gauge["now"]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gauge.update(now=80))
    asked: list[int] = []
    slow = Slow(tmp_path / "snapshots" / "step-4")
    slow.size_bytes = 16

    def begin(*_: Any, peak_bytes: int, then: Any, **__: Any) -> Slow:
        asked.append(peak_bytes)
        slow.then = then
        gauge.update(now=96, peak=96)
        return slow

    monkeypatch.setattr(keeping, "Behind", SimpleNamespace(begin=begin))
    callback = made(tmp_path, streams=True)
    callback.trainer.args.metric_for_best_model = None
    measure, held = callback.measure, callback._keeping
    for _ in range(2):
        if trained:
            measure.mark("steps")
            measure.durations.append(1.0)
        held.begin_behind(streamed(4, 0.5))
        measure.mark("steps")
        held.settle(wait=True)
    assert asked == ([80, 80] if trained else [0, 0])
    if trained:
        assert measure.needed_bytes == 80
        assert {"steps", "between steps", BESIDE} == measure.phases.keys()


def test_the_folder_is_pointed_to_by_whoever_wrote_it(tmp_path: Path) -> None:
    """Whatever ends the run after the rename, the weights are found: by the next run, by an export."""
    pointed: list[Path] = []
    behind = begun(llama(tmp_path), tmp_path / "run", then=lambda snapshot: pointed.append(snapshot.path))
    behind._thread.join()
    assert pointed == [behind.snapshot.path]
    assert pointed[0].is_dir()


def test_a_run_that_something_stops_between_two_steps_ends_with_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing(monkeypatch)
    slow = Slow(tmp_path / "snapshots" / "step-4")
    beginning(monkeypatch, slow)
    finished: list[Any] = []
    told = SimpleNamespace(scores={KEY: 0.5}, line=lambda: "scored", higher_is_better={KEY: True})
    evaluator = SimpleNamespace(
        evaluate=lambda _: told, delivery=SimpleNamespace(waking=contextlib.nullcontext), shut_door=lambda _: None
    )
    callback = made(tmp_path, streams=True, evaluator=evaluator, finish=lambda _, found: finished.append(found))
    callback.trainer.args.metric_for_best_model = None
    callback._send = lambda step, wait: SimpleNamespace()  # type: ignore[method-assign, assignment, return-value]
    callback.on_train_end(callback.trainer.args, callback.trainer.state, None)
    assert finished == [slow.snapshot]
    assert json.loads((tmp_path / "snapshots" / "latest.json").read_text(encoding="utf-8"))["path"] == "step-4"
    assert (tmp_path / "snapshots" / "best.json").exists()


def test_only_the_weights_that_were_lost_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = publishing(monkeypatch)
    beginning(monkeypatch, Slow(tmp_path / "snapshots" / "step-4", error=ExportError("the disk is full")))
    callback = made(tmp_path, streams=True)
    callback.trainer.args.metric_for_best_model = None
    callback._take([streamed(4, 0.5)])
    callback._keeping.settle(wait=True)
    callback.trainer.state.global_step = 8
    callback._publish(8)
    callback._evaluated[8] = {KEY: 0.4}
    callback.on_train_end(callback.trainer.args, callback.trainer.state, None)
    assert published == [8]


def test_the_trainers_own_evaluation_finds_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publishing(monkeypatch)
    slow = Slow(tmp_path / "snapshots" / "step-4")
    beginning(monkeypatch, slow)
    callback = made(tmp_path, streams=True)
    callback.trainer.args.metric_for_best_model = None
    callback._take([streamed(4, 0.5)])
    control = SimpleNamespace(should_evaluate=False, should_save=False, should_log=False)
    steering = Steering(callback, callback.trainer)
    steering.on_step_end(callback.trainer.args, callback.trainer.state, control)
    assert callback._keeping._behind is not None
    control.should_evaluate = True
    steering.on_step_end(callback.trainer.args, callback.trainer.state, control)
    assert callback._keeping._behind is None
