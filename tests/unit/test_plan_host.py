"""Host memory, held against whole recipes on H200s as well (benchmarks/results, 2026-11-22, Qwen3-1.7B's shape)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from hf_dsvllm.planner.explain import record, sentences
from hf_dsvllm.planner.footprint import Setup, gpu_footprint
from hf_dsvllm.planner.host import host_footprint
from hf_dsvllm.presets import get_preset
from tests.unit.test_plan_rules import plan, shape

GIB = 2**30
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FILES = [RESULTS / f"2026-11-22-main-job-{count}xH200.json" for count in (1, 2)]


def setup(preset: str, world: int = 1, **more: object) -> Setup:
    options: dict[str, object] = {"micro": 4, "length": 2048, "recompute": True, **more}
    return Setup(shape=shape("1.7b"), preset=get_preset(preset), world=world, **options)  # type: ignore[arg-type]


def recipes() -> list[tuple[Setup, dict[str, float]]]:
    rows = [row for file in FILES for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    return [
        (setup(row["run"], row["processes"], micro=row["micro_batch_size"], length=row["length"]), row)
        for row in rows
        if "1.7b" in row["model"] and row["kind"] == "dsvllm" and row.get("host_peak_gib")
    ]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the measurements are in the repository only")
def test_whole_recipes_take_what_is_predicted() -> None:
    host, allocated = [], []
    for found, row in recipes():
        allocated.append(abs(gpu_footprint(found).peak / GIB / row["gpu_peak_allocated_gib"] - 1))
        if found.method != "qlora":  # vLLM's base was held in memory then: docs/planner.md
            host.append(abs(host_footprint(found).resident_peak / found.world / GIB / row["host_peak_gib"] - 1))
    assert (len(allocated), len(host)) == (14, 11)
    assert statistics.mean(allocated) < 0.02
    assert max(allocated) < 0.05
    assert statistics.mean(host) < 0.03
    assert max(host) < 0.07


def test_the_file_of_weights_shows_in_every_process_and_need_not_fit() -> None:
    weights = 2 * shape("1.7b").parameters
    for world in (1, 4):
        found = host_footprint(setup("zero2", world))
        assert found.mapped == world * weights
        assert found.resident_peak == found.load + found.mapped
        assert found.load < world * 1.5 * GIB
    assert host_footprint(setup("none")).load > 2 * weights  # fp32 is no view of a file in bf16


def test_4_bit_weights_are_read_from_the_same_file() -> None:
    assert host_footprint(setup("qlora")).resident_peak == host_footprint(setup("lora")).resident_peak


@pytest.mark.parametrize("world", [1, 2])
def test_buckets_are_whole_even_for_a_few_adapters(world: int) -> None:
    parts = gpu_footprint(setup("lora_zero2", world)).parts["backward"]
    assert parts["buckets"] == 2 * 2 * 200_000_000


def test_pages_of_a_bucket_that_are_never_touched_are_no_memory_on_a_cpu() -> None:
    found = setup("lora_zero2", device="cpu")
    assert gpu_footprint(found).parts["backward"]["buckets"] == 4 * found.trainable < 4 * 200_000_000


def test_the_host_memory_that_was_validated_is_told_from_what_a_save_takes() -> None:
    found = plan("1.7b", "2xH100-80GB", global_batch=8, length=1024)
    assert found.chosen is not None
    host, text = found.chosen.host, " ".join(sentences(found))
    assert f"{host.measured_peak / GIB:.1f} GiB of host RAM in training" in text
    assert f"({host.peak / GIB:.1f} GiB while the model is loaded or saved)" in text
    kept = record(found, "MODEL")["chosen"]
    assert (kept["host_training_bytes"], kept["host_peak_bytes"]) == (host.measured_peak, host.peak)


EVALUATED = RESULTS / "2026-11-27-evaluation-4xH200.json"


@pytest.mark.skipif(not EVALUATED.is_file(), reason="the measurements are in the repository only")
@pytest.mark.parametrize(
    ("row", "preset", "optimizer_bytes"),
    [
        ("full", "zero2", 0.0),  # SGD
        ("8b-zero2-1", "zero2", 0.0),
        ("8b-zero3-1", "zero3", 0.0),
        ("lora", "lora", 8.0),
        ("qlora", "qlora", 8.0),
    ],
)
def test_recipes_of_8b_read_from_several_files_take_what_is_predicted(
    row: str, preset: str, optimizer_bytes: float
) -> None:
    measured = json.loads(EVALUATED.read_text(encoding="utf-8"))["rows"][row]["measured"]
    found = Setup(
        shape=shape("8b"),
        preset=get_preset(preset),
        world=1,
        micro=4,
        length=2048,
        recompute=optimizer_bytes == 0,  # activations of adapters fit
        optimizer_bytes=optimizer_bytes,
        file_bytes=2 * shape("8b").parameters // 4,
    )
    assert gpu_footprint(found).peak / GIB == pytest.approx(measured["gpu_peak_allocated_gib"], rel=0.01)
    assert host_footprint(found).resident_peak / GIB == pytest.approx(measured["host_peak_gib"], rel=0.1)
