"""Resuming from a checkpoint is the uninterrupted run: same losses, same weights, dropout included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts.runs import Runs, train_all

pytestmark = [pytest.mark.distributed]

PRESETS = ("zero3", "zero2", "qlora_zero2", "qlora")
OFFLOADED = ("zero3_offload", "zero2_offload")


def train_twice(folder: Path, presets: Sequence[str], **shared: Any) -> Runs:
    """Each preset uninterrupted, and once more from its checkpoint in the middle."""
    wanted = []
    saving = {"save_strategy": "steps", "save_steps": 4}
    for preset in presets:
        wanted.append({"name": f"{preset} whole", "preset": preset, "args": saving, **shared})
        checkpoint = str(folder / f"{preset} whole" / "checkpoint-4")
        wanted.append({"name": f"{preset} resumed", "preset": preset, "resume": checkpoint, **shared})
    return train_all(folder, wanted)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return train_twice(tmp_path_factory.mktemp("resume"), PRESETS, model_args={"lora_dropout": 0.1}, weights=True)


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return train_twice(tmp_path_factory.mktemp("offloaded"), OFFLOADED, weights=True)


@pytest.mark.slow
@pytest.mark.parametrize("preset", OFFLOADED)
def test_what_is_in_host_memory_is_resumed_as_well(preset: str, offloaded: Runs) -> None:
    test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(preset, offloaded)
    test_a_resumed_run_ends_at_the_same_weights(preset, offloaded)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(preset: str, runs: Runs) -> None:
    whole, resumed = runs[f"{preset} whole"]["losses"], runs[f"{preset} resumed"]["losses"]
    assert list(resumed) == list("12345678")
    for step in "5678":
        assert resumed[step] == pytest.approx(whole[step], abs=1e-5), f"step {step}"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_ends_at_the_same_weights(preset: str, runs: Runs) -> None:
    whole, resumed = runs.weights(f"{preset} whole"), runs.weights(f"{preset} resumed")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-5, msg=name)
