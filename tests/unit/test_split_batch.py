"""A batch that was split after the arguments were made: DeepSpeed takes the new numbers, and learns the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Trainer, default_data_collator

from hf_dsvllm.auto import split_batch
from tests.door import enter, leave
from tests.tiny import write_tiny_model

CHOSEN: Any = SimpleNamespace(
    setup=SimpleNamespace(micro=1, accumulation=4), gpu_bytes=0, step=SimpleNamespace(tokens_per_second=2.0)
)


@pytest.fixture(autouse=True)
def _left_behind() -> Iterator[None]:
    yield
    leave()


def losses(folder: Path, *, split: bool, preset: str) -> tuple[list[float], Any]:
    """Losses of three updates by four sequences each, and the engine."""
    import torch

    args = enter(
        folder, ds_preset=preset, max_steps=3, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    if split:
        split_batch(args, CHOSEN, CHOSEN)
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(folder / "model"), dtype=torch.float32)
    rows = [{"input_ids": list(range(4 + i, 20 + i)), "labels": list(range(4 + i, 20 + i))} for i in range(12)]
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model_wrapped


@pytest.mark.parametrize("preset", ["zero2", "none"])
def test_a_split_batch_is_the_same_batch(preset: str, tmp_path: Path) -> None:
    whole, _ = losses(tmp_path / "whole", split=False, preset=preset)
    leave()
    halves, engine = losses(tmp_path / "split", split=True, preset=preset)
    assert halves == pytest.approx(whole, abs=1e-5)
    if preset == "zero2":
        assert (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()) == (1, 4)
