"""The canary on live weights of two processes: training does not notice it, and vLLM's numbers prove or refuse.

One launch trains every run twice, with and without the canary; one vLLM then answers from each run's snapshots.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec, WeightSync
from hf_dsvllm.evaluation.canary import TOLERANCES, LogProbs, engine_logprobs, judge
from hf_dsvllm.export.merged_copy import merged_copy
from hf_dsvllm.tensors.fourbit import dequantised_base
from tests.scripts.canaries import PROMPTS
from tests.scripts.runs import Runs, train_all

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FULL, ADAPTERS, FOUR_BIT = ("zero3", "zero2"), ("zero3+lora", "lora"), ("zero3+qlora", "qlora_zero2")
PRESETS = (*(name for name in (*FULL, *ADAPTERS, *FOUR_BIT) if "zero3" in name), "zero2", "lora", "qlora_zero2")
LARGE = "zero3-trl-large"  # more than may stay gathered, by TRL's trainer
RUNS = (LARGE, *PRESETS)
STEPS = 3
FLOAT32 = TOLERANCES["float32"]
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    # Dropout and recomputation: what a canary could disturb.
    args = {"max_steps": STEPS, "gradient_checkpointing": True, "learning_rate": 1e-2}
    return train_all(
        tmp_path_factory.mktemp("canary"),
        [
            {"name": f"{name}-{ask}", "preset": name.partition("-")[0], "args": args, "canary": ask, "weights": True}
            | {"model_args": {"lora_dropout": 0.2}, "trl": name == LARGE, "large": name == LARGE}
            for name in RUNS
            for ask in (True, False)
        ],
    )


def ours(runs: Runs, name: str, rank: int = 0) -> dict[int, LogProbs]:
    text = (runs.folder(f"{name}-True") / f"canary.{rank}.json").read_text(encoding="utf-8")
    return {int(step): tuple(map(tuple, rows)) for step, rows in json.loads(text).items()}


@pytest.mark.parametrize("name", RUNS)
def test_training_with_the_canary_ends_with_the_very_weights_of_training_without(name: str, runs: Runs) -> None:
    assert len(runs.losses(f"{name}-True")) == STEPS
    assert runs.losses(f"{name}-True") == runs.losses(f"{name}-False")
    with_it, without = runs.weights(f"{name}-True"), runs.weights(f"{name}-False")
    assert with_it.keys() == without.keys()
    assert not [key for key, tensor in with_it.items() if not torch.equal(bits(tensor), bits(without[key]))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """4-bit weights stored as float32 hold patterns that mean NaN, which equals nothing."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", RUNS)
def test_every_rank_finds_the_same_numbers_and_they_change_with_every_step(name: str, runs: Runs) -> None:
    found = ours(runs, name)
    assert found == ours(runs, name, rank=1)
    assert len(found) == len(set(found.values())) == STEPS + 1


# -- with the engine


@pytest.fixture(scope="module")
def engine(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineClient, WeightSync]]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    spec = EngineSpec(model=runs.model, python=Path(sys.executable), device="cpu", dtype="float32", max_model_len=256,
                      max_lora_rank=8, kv_cache_bytes=2**30, cpu_threads=1)  # fmt: skip
    server = EngineServer.start(spec, tmp_path_factory.mktemp("engine"))
    try:
        server.wait_ready(420.0)
        client = EngineClient(server.uds, default_timeout_s=120.0)
        yield client, WeightSync(server, client)
        client.close()
    finally:
        server.stop()


def served(engine: tuple[EngineClient, WeightSync], runs: Runs, name: str, step: int, out: Path) -> LogProbs:
    """vLLM's numbers for the snapshot of a step, brought there as a run of this kind would bring it."""
    client, sync = engine
    folder = runs.folder(f"{name}-True") / "snapshots" / f"step-{step}"
    if name in FOUR_BIT:
        base = dequantised_base(runs.model, NF4, out / "base", dtype=torch.float32)
        folder = merged_copy(base, folder, out / "merged", dtype=torch.float32)
    elif name in ADAPTERS:
        sync.push(runs.model, "full", step)
    kind: Any = "adapter" if name in ADAPTERS else "full"
    return engine_logprobs(client, sync.push(folder, kind, step).model_name, PROMPTS)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["zero3", "zero3+lora", "zero3+qlora"])
def test_the_engine_is_proven_and_other_weights_are_refused(
    name: str, engine: tuple[EngineClient, WeightSync], runs: Runs, tmp_path: Path
) -> None:
    mine = ours(runs, name)
    last, before = served(engine, runs, name, 3, tmp_path / "a"), served(engine, runs, name, 2, tmp_path / "b")
    proven = judge(mine[3], last, mine[2], tolerance=FLOAT32)
    assert proven.ok, proven.sentence
    print(name, proven.sentence)
    swapped = judge(mine[3], before, mine[2], tolerance=FLOAT32)
    assert not swapped.ok
    base = engine_logprobs(engine[0], "base", PROMPTS) if name in ADAPTERS else mine[0]
    assert not judge(mine[3], base, mine[2], tolerance=FLOAT32).ok
