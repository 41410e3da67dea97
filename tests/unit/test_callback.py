"""What the callback does on a rank at each moment: errors known to all before anything collective, bests kept, ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl

from hf_dsvllm import callback as callback_module
from hf_dsvllm import measure
from hf_dsvllm.errors import EngineError, ExportError
from hf_dsvllm.evaluation import steering
from hf_dsvllm.evaluation.rounds import Round
from hf_dsvllm.evaluation.steering import keep_best
from hf_dsvllm.live.snapshot import Snapshot
from tests.callbacks import KEY, Canary, made, publishing


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return publishing(monkeypatch)


def test_a_rank_whose_main_failed_in_the_canarys_forward_is_not_alone_in_gathering(
    tmp_path: Path, published: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = made(tmp_path)
    callback.session.ranks.main_says = ["RuntimeError: no kernel"]  # type: ignore[attr-defined]
    callback._evaluate()
    assert callback.session.canary.forwards == 1  # type: ignore[union-attr, attr-defined]
    assert published == []
    assert "failed and is skipped. RuntimeError: no kernel" in capsys.readouterr().err


def test_a_rank_whose_main_could_not_publish_asks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = made(tmp_path)
    # rank 0: its forward went well, nothing was sent, the disk is full
    callback.session.ranks.main_says = [None, False, "OSError: no space left"]  # type: ignore[attr-defined]
    callback._evaluate()
    assert not callback._evaluated
    assert "failed and is skipped. OSError: no space left" in capsys.readouterr().err


def test_weights_that_only_the_engine_failed_on_are_not_written_again(tmp_path: Path, published: list[int]) -> None:
    def fails(asked: Any) -> Any:
        raise EngineError("it is gone")

    callback = made(tmp_path, evaluator=SimpleNamespace(evaluate=fails))
    callback._evaluate(wait=True)
    assert callback._failures == 1
    callback._last_snapshot(4)
    assert published == [4]


def test_weights_of_a_step_whose_writing_failed_are_written_again_by_all(tmp_path: Path, published: list[int]) -> None:
    callback = made(tmp_path)
    callback.session.ranks.main_says = [None, False, "OSError: no space left"]  # type: ignore[attr-defined]
    callback._evaluate()
    callback._last_snapshot(4)
    assert published == [4, 4], "this rank had done its part"


def streamed(step: int, score: float) -> Round:
    told = SimpleNamespace(line=lambda: f"step {step}", higher_is_better={KEY: True})
    return Round(step=step, scores={KEY: score}, result=told)


def full(*_: Any, **__: Any) -> Snapshot:
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_a_streaming_run_the_best_snapshot_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callback_module, "publish", full)
    callback = made(tmp_path, streams=True)
    callback._take([streamed(4, 0.5)])
    assert "step 4: its weights, the best so far, could not be kept: OSError" in capsys.readouterr().err
    assert callback._published is None
    assert not (tmp_path / "snapshots").exists()


@pytest.mark.parametrize(("metric", "late", "written"), [(KEY, False, [4]), (None, False, [4]), (None, True, [])])
def test_a_stream_writes_the_best_weights_while_the_model_still_has_them(
    metric: str | None, late: bool, written: list[int], tmp_path: Path, published: list[int]
) -> None:
    callback = made(tmp_path, streams=True, late=late)
    callback.trainer.args.metric_for_best_model = metric
    callback._take([streamed(4, 0.5)])
    assert published == written
    assert (tmp_path / "snapshots" / "best.json").exists() == bool(written)


def test_a_late_stream_that_went_by_disk_once_does_not_make_that_step_the_best(tmp_path: Path) -> None:
    callback = made(tmp_path, streams=True, late=True)
    callback.trainer.args.metric_for_best_model = None
    (tmp_path / "snapshots" / "step-4").mkdir(parents=True)
    callback._take([streamed(4, 0.5)])
    assert not (tmp_path / "snapshots" / "best.json").exists()


def test_a_metric_that_steers_and_is_not_among_the_scores_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt metric of lm-eval, say, of which only the task is known before."""
    callback = made(tmp_path)
    for step in (0, 4):
        other = Round(step=step, scores={"eval_gen_a_acc": 0.5}, result=SimpleNamespace(line=lambda: "scored"))
        callback._take([other])
    said = f"step 0: {KEY}, which chooses the best, is not among the scores: eval_gen_a_acc"
    assert capsys.readouterr().err.count(said) == 1


def test_without_a_metric_of_known_direction_no_best_is_kept_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = made(tmp_path)
    callback.trainer.args.metric_for_best_model = None
    for step in (4, 6):
        (tmp_path / "snapshots" / f"step-{step}").mkdir(parents=True)
        told = SimpleNamespace(line=lambda: "scored", higher_is_better={})
        callback._take([Round(step=step, scores={KEY: 0.5}, result=told)])
    said = f"no best snapshot is kept: whether more of {KEY} is better is not known. --metric_for_best_model {KEY}"
    assert capsys.readouterr().err.count(said) == 1
    assert not (tmp_path / "snapshots" / "best.json").exists()


def test_a_best_that_is_known_after_the_trainer_has_loaded_another_is_loaded_too(
    tmp_path: Path, published: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early stopping at step 7, checkpoint-2 is loaded, then the score of step 6 comes: the best, with a checkpoint."""
    restored: list[Path] = []
    monkeypatch.setattr(steering, "restore", lambda model, folder, kind: restored.append(folder))
    monkeypatch.setattr(callback_module, "prune", lambda *_, **__: None)

    def note_best(trainer: Any, scores: dict[str, float], *, step: int) -> bool:
        trainer.state.best_model_checkpoint, trainer.state.best_metric = f"run/checkpoint-{step}", scores[KEY]
        return True

    monkeypatch.setattr(callback_module, "note_best", note_best)
    finished: list[Snapshot] = []
    callback = made(tmp_path, late=True, finish=lambda measure, snapshot: finished.append(snapshot))
    callback.trainer.args.load_best_model_at_end = True
    state = callback.trainer.state
    state.global_step, state.best_model_checkpoint, state.best_metric = 7, "run/checkpoint-2", 0.5
    folder = tmp_path / "snapshots" / "step-6"
    folder.mkdir(parents=True)
    late = Round(step=6, scores={KEY: 0.9}, result=SimpleNamespace(line=lambda: "step 6"))

    def collect(*, leave: int | None = None) -> list[Round]:
        keep_best(tmp_path, callback.trainer.args, late, kind="full")
        return [late]

    monkeypatch.setattr(callback._rounds, "collect", collect)
    callback.on_train_end(callback.trainer.args, state, TrainerControl())
    assert json.loads((tmp_path / "snapshots" / "best.json").read_text())["step"] == 6
    assert restored == [folder]
    assert [snapshot.step for snapshot in finished] == [6]


@pytest.mark.parametrize(("of_the_loaded", "restored"), [(0.7, False), (0.2, True), (None, True)])
def test_a_snapshot_of_a_resumed_run_is_loaded_only_over_weights_that_scored_less(
    of_the_loaded: float | None, restored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    monkeypatch.setattr(steering, "restore", lambda model, folder, kind: loads.append(folder))
    callback = made(tmp_path)
    args, state = callback.trainer.args, callback.trainer.state
    args.load_best_model_at_end = True
    state.log_history = [] if of_the_loaded is None else [{"step": 2, KEY: of_the_loaded}]
    (tmp_path / "snapshots" / "step-4").mkdir(parents=True)
    keep_best(tmp_path, args, streamed(4, 0.3), kind="full")
    best = steering.load_best(callback.trainer.model, args, state, tmp_path, 2, callback.session.ranks)
    assert (best.step if best is not None else None) == (4 if restored else None)
    assert bool(loads) == restored


def test_last_weights_that_cannot_be_written_end_the_run_on_every_rank_with_the_engine_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def end(why: str) -> None:
        said.append(why)
        raise ExportError(why)

    callback = made(tmp_path, evaluates=False, stop_engine=lambda: said.append("stopped"), end_without_weights=end)
    with monkeypatch.context() as patched:
        patched.setattr(callback_module, "publish", full)
        with pytest.raises(ExportError):
            callback.on_train_end(callback.trainer.args, callback.trainer.state, TrainerControl())
    assert said == ["stopped", "OSError: [Errno 28] No space left on device"]
    # Another rank wrote nothing and hears of it.
    callback = made(tmp_path, evaluates=False, end_without_weights=end)
    callback.session.ranks.main_says = ["OSError: no room"]  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="no room"):
        callback.on_train_end(callback.trainer.args, callback.trainer.state, TrainerControl())


def test_a_run_that_is_killed_leaves_what_it_measured_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice a minute at most, and a full disk ends nothing."""
    callback = made(tmp_path)
    state, args = callback.trainer.state, callback.trainer.args
    state.log_history = [{"num_tokens": 96}]
    file = tmp_path / "measured.json"
    callback.on_log(args, state, TrainerControl(), logs={})
    assert not file.exists(), "nothing is trained yet"
    callback._training, callback.measure.durations = True, [0.5, 0.25]
    callback.on_log(args, state, TrainerControl(), logs={})
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["steps"], found["tokens"], found["tokens_per_second"]) == (2, 96, 128.0)
    assert found["finished"] is False
    assert found["host_peak_gib"] > 0
    file.unlink()
    callback.on_log(args, state, TrainerControl(), logs={})
    assert not file.exists(), "a moment later"
    monkeypatch.setattr(measure, "write_json", full)
    callback.measure._recorded_at = -math.inf
    callback.on_log(args, state, TrainerControl(), logs={})


def test_every_rank_streams_or_not_as_the_main_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's vLLM may be one that takes no stream, which the others cannot see."""
    monkeypatch.setattr(callback_module, "read_wiring", lambda _: SimpleNamespace(line=lambda: "", zero_stage=None))
    monkeypatch.setattr(callback_module, "check_wiring", lambda *_, **__: None)
    nothing = {"ready_engine": lambda _: None, "start_record": lambda *_: None, "preset": None, "ds_config": None}
    callback = made(tmp_path, streams=True, evaluates=False, **nothing)
    callback.session.ranks.main_says = [(False, False, False)]  # type: ignore[attr-defined]
    callback.on_train_begin(callback.trainer.args, callback.trainer.state, TrainerControl())
    assert not callback.streams


def test_only_a_run_that_starts_from_the_engines_model_is_evaluated_without_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: list[int]
) -> None:
    monkeypatch.setattr(callback_module, "read_wiring", lambda _: SimpleNamespace(line=lambda: "", zero_stage=None))
    monkeypatch.setattr(callback_module, "check_wiring", lambda *_, **__: None)
    nothing = {"ready_engine": lambda _: None, "start_record": lambda *_: None, "preset": None, "ds_config": None}
    callback = made(tmp_path, **nothing)
    callback.trainer.state.global_step = 0

    def begin() -> list[int]:
        callback.on_train_begin(callback.trainer.args, callback.trainer.state, TrainerControl())
        return published

    assert begin() == []
    assert begin() == [0], "a second train() goes on from the weights of the first"
    callback = made(tmp_path, **nothing)
    callback.trainer.state.global_step = 0
    callback.trainer.model = adapted(b=0.0)
    assert begin() == [0]
    callback.trainer.model, callback._trained_before = adapted(b=0.5), False
    assert begin() == [0, 0], "an adapter that was trained before is not what the engine started from"


def adapted(*, b: float) -> Any:
    """A linear layer with LoRA whose B is `b` everywhere."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(b)
    return model


@pytest.mark.parametrize(("sharded", "goes_on"), [(False, True), (True, False)])
def test_a_gpu_out_of_memory_amid_a_gathering_ends_the_rank_for_the_others_hear_no_word(
    sharded: bool, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Canary):
        def ask_trainer(self, trainer: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(callback_module, "is_distributed", lambda: True)
    callback = made(tmp_path, canary=Full())
    callback._sharded = sharded
    if goes_on:
        callback._evaluate()
        assert callback._failures == 1
    else:
        with pytest.raises(torch.OutOfMemoryError):
            callback._evaluate()


def test_an_engine_that_was_woken_and_got_no_weights_goes_to_sleep_again(tmp_path: Path) -> None:
    rested: list[int] = []

    class Fails(Canary):
        def ask_trainer(self, trainer: Any) -> Any:
            raise RuntimeError("out of memory")

    callback = made(tmp_path, streams=True, canary=Fails())
    callback.session.evaluator.rest = lambda: rested.append(1)  # type: ignore[method-assign]
    callback._send = lambda step, wait: SimpleNamespace()  # type: ignore[method-assign, assignment, return-value]
    callback._evaluate()
    assert rested == [1]
    assert callback._failures == 1
