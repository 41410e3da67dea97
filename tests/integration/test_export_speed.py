"""The benchmark of exports runs: what it leaves out of an export by hand is still where it looks for it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    from hf_dsvllm.export import make as export

    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(export, "_where_to_compare", export._where_to_compare)  # put back afterwards
    import export_speed

    yield export_speed
    for name in ("export_speed", "export_measures", "standin"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_export_is_timed_without_its_proof_and_with_it(benchmark: Any, tmp_path: Path, kind: str) -> None:
    args = argparse.Namespace(shape="tiny", kind=kind, work=tmp_path)
    benchmark.write_run(args)
    proven, bare, by_hand = benchmark.merge_proven(args), benchmark.merge_ours(args), benchmark.merge_peft(args)
    found = benchmark.merge_equal(args)
    assert found["tensors"] == 24
    assert found["only_one_has"] == []
    assert found["equal_numbers"] > 0.6
    assert proven["verification"]["greedy_agreement"] == 1.0
    assert bare["merged_on"] == "cpu"
    assert "verification" not in bare
    assert bare["seconds"] > 0
    assert by_hand["seconds"] > 0
    made = {"base-tiny", f"run-tiny-{kind}", "out-ours", "out-peft"}
    assert {path.name for path in tmp_path.iterdir()} == made
    if kind == "qlora":
        in_4bit = benchmark.merge_peft_4bit(args)
        assert in_4bit["gb"] <= by_hand["gb"]
        assert {path.name for path in tmp_path.iterdir()} == made


def test_steps_of_bf16_are_counted_across_zero(benchmark: Any) -> None:
    smallest = torch.finfo(torch.bfloat16).smallest_normal
    one = torch.tensor([1.0, 1.0, 0.0, -1.0, smallest])
    other = torch.tensor([1.0, 1.0078125, -0.0, -1.015625, -smallest])
    assert benchmark.bf16_steps(one, other).tolist() == [0, 1, 0, 2, 256]
