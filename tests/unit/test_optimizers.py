"""What an optimizer keeps: in the plan, in what is refused before loading, and against three runs on an H200."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.training_args import OptimizerNames

from hf_dsvllm.errors import ConfigError
from hf_dsvllm.optimizers import ADAM, STATE_BYTES, optimizer_of, state_bytes
from hf_dsvllm.planner.explain import command_line
from hf_dsvllm.planner.footprint import gpu_footprint
from hf_dsvllm.planner.request import Request, job_of
from hf_dsvllm.planner.search import make_plan
from hf_dsvllm.planner.setup import Setup
from hf_dsvllm.presets import get_preset
from tests.unit.test_plan_rules import config, shape

GIB = 2**30


def test_every_name_is_one_of_the_trainers() -> None:
    assert set(STATE_BYTES) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize(
    ("optim", "given", "name", "size"),
    [
        (OptimizerNames.ADAMW_TORCH, None, "adamw_torch", 8.0),
        ("sgd", None, "sgd", 0.0),
        (OptimizerNames.SGD, "momentum=0.9", "sgd momentum", 4.0),
        ("sgd", "momentum=0.0,nesterov=False", "sgd", 0.0),
        ("paged_adamw_8bit", None, "paged_adamw_8bit", 2.0),
        ("galore_adamw", None, "galore_adamw", 8.0),
    ],
)
def test_an_optimizer_of_the_arguments_has_its_bytes(optim: Any, given: str | None, name: str, size: float) -> None:
    args = SimpleNamespace(optim=optim, optim_args=given)
    assert optimizer_of(args) == name
    assert state_bytes(name) == size


def test_adafactor_has_no_rows_and_columns_in_the_flat_pieces_of_zero() -> None:
    assert [state_bytes("adafactor", stage) for stage in (None, 0, 1, 2, 3)] == [0.0, 0.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("preset", "moment", "measured"),
    [("zero2", "peak", 83.0), ("zero3", "peak", 67.54), ("zero2", "between", 45.9)],
)
def test_sgd_takes_what_was_measured(preset: str, moment: str, measured: float) -> None:
    """8B, 4 x 2,048 tokens, recompute, one H200, 2026-11-27: 61 GiB less than Adam (benchmarks/results)."""
    setup = Setup(
        shape=shape("8b"), preset=get_preset(preset), world=1, micro=4, length=2048, recompute=True, optimizer_bytes=0.0
    )
    found = gpu_footprint(setup)
    held = {name: size for name, size in found.parts["optimizer"].items() if name in ("weights", "optimizer")}
    size = sum(held.values()) if moment == "between" else found.peak
    assert size / GIB == pytest.approx(measured, rel=0.01)


def test_eight_bits_stay_eight_bits_where_weights_are_in_half() -> None:
    setup = Setup(shape=shape("8b"), preset=get_preset("zero2_lowmem"), world=2, micro=1, length=512, recompute=True)
    adam, small = (
        gpu_footprint(dataclasses.replace(setup, optimizer_bytes=state_bytes(name))).parts["optimizer"]["optimizer"]
        for name in (ADAM, "adamw_8bit")
    )
    share = shape("8b").parameters / 2
    assert (adam, small) == (pytest.approx((2 + 4) * share), pytest.approx((2 + 2) * share))


def test_the_plan_is_for_the_optimizer_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("8b")), encoding="utf-8")
    request = Request(model=str(tmp_path), gpus="1xH100-80GB", optim="adafactor")
    plans = [make_plan(job_of(asked)) for asked in (request, dataclasses.replace(request, optim=ADAM))]
    assert plans[0].chosen is not None
    assert "--optim adafactor" in command_line(plans[0], "model")
    assert "--optim" not in command_line(plans[1], "model")
    with pytest.raises(ConfigError, match="--optim adamw_8bits is not known") as refused:
        job_of(dataclasses.replace(request, optim="adamw_8bits"))
    assert "adamw_8bit" in refused.value.problems[0].fix
