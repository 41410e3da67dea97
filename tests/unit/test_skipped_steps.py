"""Steps with gradients that are no numbers: counted whether logged or not, and told from steps that were taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_dsvllm.measure import RunMeasure
from tests.door import enter, leave, sound
from tests.tiny import write_tiny_model

STEPS, BROKEN = 4, (2, 3)


@pytest.fixture(autouse=True)
def _left_behind() -> Iterator[None]:
    yield
    leave()


def trained(folder: Path, **given: Any) -> tuple[RunMeasure, dict[str, bool]]:
    """A run whose steps `BROKEN` have a NaN loss, logged every second step; and which weights are numbers after it."""
    import torch

    class Breaking(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step + 1 in BROKEN else loss

    measure = RunMeasure()

    class Watching(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            measure.count_skipped(trainer)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            measure.look_at(logs or {}, trainer)

    args = enter(
        folder, TrainingArguments, use_cpu=True, max_steps=STEPS, logging_steps=2, save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=1, logging_nan_inf_filter=False, **given,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(folder / "model"), dtype=torch.float32)
    rows = [{"input_ids": list(range(4, 20)), "labels": list(range(4, 20))}] * STEPS
    trainer = Breaking(model=model, args=args, train_dataset=rows, data_collator=default_data_collator)
    trainer.add_callback(Watching())
    trainer.train()
    weights = {name: bool(tensor.isfinite().all()) for name, tensor in model.named_parameters()}
    return measure, weights


def test_a_step_that_deepspeed_leaves_out_is_counted_even_if_it_is_not_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, finite = trained(tmp_path, deepspeed=sound(bf16={"enabled": True}), bf16=True)
    said = capsys.readouterr().err
    assert measure.skipped_steps == len(BROKEN)
    assert "step 2: a gradient is inf or NaN, and DeepSpeed left the step out without a word (1 so far)" in said
    assert "step 3:" in said
    assert "the optimizer stepped all the same" not in said
    assert all(finite.values())


def test_without_deepspeed_such_a_step_is_taken_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, finite = trained(tmp_path)
    said = capsys.readouterr().err
    assert measure.skipped_steps == 0
    assert said.count("the gradient norm is nan, and the optimizer stepped all the same") == 1
    assert "DeepSpeed" not in said
    assert not any(finite.values())


def test_a_loss_scale_that_is_being_found_is_not_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    measure = RunMeasure()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(optimizer_step_was_skipped=True),
        args=SimpleNamespace(fp16=True),
        state=SimpleNamespace(global_step=1),
    )
    measure.count_skipped(trainer)
    measure.look_at({"grad_norm": float("inf")}, trainer)
    assert (measure.skipped_steps, capsys.readouterr().err) == (1, "")


def test_many_skipped_steps_do_not_flood_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    measure = RunMeasure()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(optimizer_step_was_skipped=True),
        args=SimpleNamespace(fp16=False),
        state=SimpleNamespace(global_step=1),
    )
    for _ in range(200):
        measure.count_skipped(trainer)
    assert capsys.readouterr().err.count("left the step out") == 5
