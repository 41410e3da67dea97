"""Presets change where things live, not what is learnt: the same batches give the same losses under each of them.

All runs see the same global batches of 4 sequences for 8 steps in float32.  What may differ is the order in which
floating-point numbers are added: gradients of two halves of a batch are averaged by another rank, and ZeRO reduces and
steps in flat buckets.  One such difference is about 1e-7 of a loss near 6; Adam divides by the square root of small
second moments and carries it on over 8 steps.  Measured: 2e-6 at most, on an AVX2 processor (torch 2.13, DeepSpeed
0.19.8).  TOLERANCE leaves room for other processors; a process that trains on its half alone is 0.04 away at step 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.scripts.runs import Runs, train_all, write_wide_model

pytestmark = [pytest.mark.distributed]

TOLERANCE = 1e-4
EVALUATED = (1000, 40_000)  # parameters that stay gathered for their next use
SHARDED = ("zero3", "zero3_hpz", "zero2", "zero1", "ddp")  # ZeRO-3 first: see train_runs.py
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One process without DeepSpeed: what the others are measured against."""
    folder = tmp_path_factory.mktemp("alone")
    wide = {"name": "none wide", "preset": "none", "model": str(write_wide_model(folder / "wide"))}
    return train_all(folder, [{"name": "none", "preset": "none"}, wide], processes=1)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = [{"name": name, "preset": name} for name in SHARDED]
    runs.append({"name": "zero2 accumulated", "preset": "zero2", "args": ACCUMULATED})
    evaluated = {"eval_strategy": "steps", "eval_steps": 4}  # the last step, too: its weights are written after that
    runs[1:1] = [
        {"name": f"zero3 evaluated {few}", "preset": "zero3", "args": evaluated, "large": few} for few in EVALUATED
    ]
    return train_all(tmp_path_factory.mktemp("spread"), runs)


@pytest.mark.parametrize("name", [*SHARDED, "zero2 accumulated"])
def test_two_processes_learn_what_one_learns(name: str, alone: Runs, spread: Runs) -> None:
    assert spread[name]["world_size"] == 2
    assert len(spread.losses(name)) == 8
    assert spread.losses(name) == pytest.approx(alone.losses("none"), abs=TOLERANCE)


@pytest.mark.parametrize("few", EVALUATED)
def test_weights_are_written_after_the_trainers_own_evaluation(few: int, alone: Runs, spread: Runs) -> None:
    """A forward pass without a backward pass leaves weights on their way, which cannot be gathered as they are."""
    name = f"zero3 evaluated {few}"
    assert spread[name].get("error") is None, spread[name].get("message")
    assert spread.losses(name) == pytest.approx(alone.losses("none"), abs=TOLERANCE)
    assert (spread.folder(name) / "snapshots" / "step-8" / "model.safetensors").is_file()


def test_two_processes_with_half_of_each_sequence_learn_what_one_learns(alone: Runs, tmp_path: Path) -> None:
    """In a launch of its own: DeepSpeed leaves its attention in the process."""
    run = {"name": "sliced", "preset": "long_context", "args": {"per_device_train_batch_size": 4}}
    runs = train_all(tmp_path, [run])
    assert runs["sliced"]["world_size"] == 2
    assert runs.losses("sliced") == pytest.approx(alone.losses("none"), abs=TOLERANCE)


def test_the_losses_move_far_more_than_the_tolerance(alone: Runs) -> None:
    losses = alone.losses("none")
    assert max(losses) - min(losses) > 1000 * TOLERANCE


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same with optimizer states, and under ZeRO-3 weights, in host memory."""
    names = ("zero3_offload_optimizer", "zero3_offload", "zero2_offload")
    return train_all(tmp_path_factory.mktemp("offloaded"), [{"name": name, "preset": name} for name in names])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload", "zero3_offload_optimizer"])
def test_offloading_to_the_host_learns_the_same(name: str, alone: Runs, offloaded: Runs) -> None:
    assert offloaded[name]["optimizer"] == "DeepSpeedCPUAdam"
    assert offloaded.losses(name) == pytest.approx(alone.losses("none"), abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures("nvme_op")
def test_offloading_to_nvme_learns_the_same(alone: Runs, tmp_path: Path) -> None:
    swap = tmp_path / "nvme"
    swap.mkdir()
    wide = str(write_wide_model(tmp_path / "wide"))
    run = {"name": "zero3_nvme", "preset": "zero3_nvme", "model": wide, "args": {"nvme_path": str(swap)}}
    runs = train_all(tmp_path, [run])
    assert runs.losses("zero3_nvme") == pytest.approx(alone.losses("none wide"), abs=TOLERANCE)
    assert list(swap.rglob("*.swp")), "nothing was written to the NVMe folder"
    config = json.loads((runs.folder("zero3_nvme") / "ds_config.json").read_text(encoding="utf-8"))
    assert config["zero_optimization"]["offload_param"]["buffer_size"] == 100_000_000, "not fitted to the model"


@pytest.mark.slow
@pytest.mark.usefixtures("nvme_op")
@pytest.mark.parametrize("recompute", [False, True])
def test_weights_that_are_read_from_nvme_learn_the_same(tmp_path: Path, recompute: bool) -> None:
    """Four times as many weights as swap buffers: DeepSpeed keeps those that come again soon, and ends in an assertion.

    In two processes: a single one on CPUs computes with the swap buffer itself, which the next weight overwrites.
    """
    swap = tmp_path / "nvme"
    swap.mkdir()
    deep = str(write_wide_model(tmp_path / "deep", layers=3))
    given = {"gradient_checkpointing": recompute}
    offloaded = {"preset": "zero3_nvme", "swaps": True, "args": given | {"nvme_path": str(swap)}}
    runs = train_all(
        tmp_path,
        [
            {"name": "zero3", "preset": "zero3", "model": deep, "args": given},
            {"name": "zero3_nvme", "model": deep, **offloaded},
        ],
    )
    assert list(swap.rglob("*params/**/*.swp")), "no weight went to the NVMe folder"
    assert runs.losses("zero3_nvme") == pytest.approx(runs.losses("zero3"), abs=TOLERANCE)
    ours, theirs = (last_weights(runs.folder(name)) for name in ("zero3_nvme", "zero3"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last snapshot, for which each layer was gathered."""
    pointer = json.loads((run / "snapshots" / "latest.json").read_text(encoding="utf-8"))
    files = (run / "snapshots" / pointer["path"]).glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
