"""Where vLLM runs beside a trainer, whether training waits for it, and what cannot be."""

from __future__ import annotations

import dataclasses
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm import placement
from hf_dsvllm.hardware import Gpu, Machine
from hf_dsvllm.launch import Launch
from hf_dsvllm.placement import Place, choose_place, for_adapters, place_problems, visible_gpus


def asked(**given: Any) -> Any:
    defaults = {
        "gen_eval_placement": "auto",
        "gen_eval_server": None,
        "gen_eval_late": None,
        "gen_eval_weights": "auto",
        "ds_preset": "zero2",
        "gen_eval_tensor_parallel": None,
        "gen_eval_data_parallel": None,
        "metric_for_best_model": None,
        "save_strategy": "steps",
    }
    return SimpleNamespace(**(defaults | given))


def launch(local_world_size: int) -> Launch:
    return Launch(
        rank=0,
        local_rank=0,
        world_size=local_world_size,
        local_world_size=local_world_size,
        launched=True,
        asked_processes=None,
    )


@pytest.mark.parametrize(
    ("visible", "training", "kind", "gpus", "late"),
    [
        (["0"], 1, "shared", ("0",), False),
        (["0", "1"], 1, "spare", ("1",), True),
        (["4", "7", "9", "11"], 2, "spare", ("9", "11"), True),
        (["2", "3"], 2, "shared", ("2", "3"), False),
        (["GPU-aa", "GPU-bb"], 1, "spare", ("GPU-bb",), True),
    ],
)
def test_gpus_the_trainer_leaves_free_are_taken_first_and_do_not_hold_training_up(
    visible: list[str], training: int, kind: str, gpus: tuple[str, ...], late: bool
) -> None:
    place = choose_place(asked(), "cuda", launch(training), visible)
    assert (place.kind, place.gpus, place.late) == (kind, gpus, late)
    assert ("shared with the trainer" in place.reason) == (kind == "shared")
    assert ("while training goes on" in place.reason) == late


def test_a_process_that_sees_one_gpu_shares_that_one_whatever_its_rank() -> None:
    third = dataclasses.replace(launch(4), rank=3, local_rank=3)
    place = choose_place(asked(), "cuda", third, ["GPU-cc"])
    assert (place.kind, place.gpus) == ("shared", ("GPU-cc",))


def test_a_server_that_is_named_is_used_wherever_training_runs() -> None:
    for device, visible in (("cpu", []), ("cuda", ["0", "1"])):
        place = choose_place(asked(gen_eval_server="http://node7:8000"), device, launch(1), visible)
        assert (place.kind, place.url, place.late) == ("remote", "http://node7:8000", True)


def test_on_a_cpu_training_waits_and_the_engine_gets_all_cores() -> None:
    place = choose_place(asked(), "cpu", launch(2), [])
    assert (place.kind, place.device, place.late, place.cpu_threads) == ("cpu", "cpu", False, os.cpu_count())


def test_beside_training_on_the_same_cpu_the_engine_leaves_a_core_to_each_process() -> None:
    place = choose_place(asked(gen_eval_late=True), "cpu", launch(1), [])
    assert place.late
    assert place.cpu_threads == max(1, (os.cpu_count() or 1) - 1)


def test_a_trainer_on_gpus_does_not_wait_for_an_engine_on_the_cpu() -> None:
    assert choose_place(asked(gen_eval_placement="cpu"), "cuda", launch(1), ["0"]).late


def test_training_waits_where_the_best_checkpoint_is_saved_at_the_score() -> None:
    best = {"metric_for_best_model": "eval_gen_orders_json_equal", "save_strategy": "best"}
    assert not choose_place(asked(**best), "cuda", launch(1), ["0", "1"]).late
    assert choose_place(asked(**best | {"metric_for_best_model": "loss"}), "cuda", launch(1), ["0", "1"]).late


@pytest.mark.parametrize(
    ("kind", "weights", "streams"), [("spare", "auto", False), ("spare", "stream", True), ("shared", "auto", True)]
)
def test_adapters_that_no_preset_names_reach_a_spare_gpu_by_the_folder_too(
    kind: Any, weights: str, streams: bool
) -> None:
    place = Place(kind=kind, gpus=("1",), stream=True, reason="")
    assert for_adapters(place, asked(gen_eval_weights=weights)).stream == streams


def test_weights_are_streamed_where_a_snapshot_of_the_best_is_not_missed() -> None:
    stream = {"gen_eval_weights": "stream"}
    assert choose_place(asked(**stream), "cuda", launch(1), ["0"]).stream
    assert choose_place(asked(**stream), "cuda", launch(1), ["0", "1"]).stream
    late_best = stream | {"metric_for_best_model": "gen_a_b"}
    assert not choose_place(asked(**late_best), "cuda", launch(1), ["0", "1"]).stream
    assert not choose_place(asked(gen_eval_weights="disk"), "cuda", launch(1), ["0"]).stream


@pytest.mark.parametrize(
    ("given", "visible", "streams"),
    [
        ({}, ["0"], True),
        ({}, ["0", "1"], True),
        ({"ds_preset": None}, ["0", "1"], True),
        ({"ds_preset": "qlora"}, ["0"], True),
        ({"ds_preset": "zero3+lora"}, ["0", "1"], False),
        ({"ds_preset": "auto"}, ["0", "1"], True),  # not chosen yet: this is asked before
        ({"ds_preset": "auto+qlora"}, ["0", "1"], False),
        ({"ds_preset": "auto:my-lora"}, ["0", "1"], True),
        ({"ds_preset": "misspelt"}, ["0", "1"], True),
        ({"gen_eval_placement": "cpu"}, ["0"], False),
        ({"gen_eval_server": "http://node7:8000"}, ["0"], False),
        ({"metric_for_best_model": "gen_a_b"}, ["0"], True),
        ({"metric_for_best_model": "gen_a_b"}, ["0", "1"], False),
    ],
)
def test_weights_go_from_gpu_to_gpu_by_default_where_they_can_and_it_pays(
    given: dict[str, Any], visible: list[str], streams: bool
) -> None:
    assert choose_place(asked(**given), "cuda", launch(1), visible).stream == streams


@pytest.mark.parametrize(
    ("given", "device", "training", "visible", "named"),
    [
        ({"gen_eval_placement": "sparse"}, "cuda", 1, ["0"], "'sparse' is none of auto, spare"),
        ({"gen_eval_placement": "remote"}, "cuda", 1, ["0"], "without a server"),
        ({"gen_eval_placement": "cpu", "gen_eval_server": "http://a:1"}, "cuda", 1, ["0"], "two places"),
        ({"gen_eval_server": "node7:8000"}, "cuda", 1, ["0"], "no address of a server"),
        ({"gen_eval_server": "http://node7:80a"}, "cuda", 1, ["0"], "no address of a server"),
        ({"gen_eval_server": "http://"}, "cuda", 1, ["0"], "no address of a server"),
        ({"gen_eval_placement": "spare"}, "cpu", 1, [], "trains on CPUs"),
        ({"gen_eval_placement": "spare"}, "cuda", 2, ["0", "1"], "uses all 2 visible GPUs"),
        ({"gen_eval_late": True}, "cuda", 1, ["0"], "both would need its memory"),
        ({"gen_eval_weights": "ipc"}, "cuda", 1, ["0"], "none of auto, disk, stream"),
        ({"gen_eval_weights": "stream"}, "cpu", 1, [], "from GPU to GPU"),
        ({"gen_eval_weights": "stream", "gen_eval_server": "http://a:1"}, "cuda", 1, ["0"], "from GPU to GPU"),
        (
            {"gen_eval_server": "http://node7:8000", "gen_eval_data_parallel": 2},
            "cuda", 1, ["0", "1"], "gen_eval_data_parallel: how a server that already runs is spread",
        ),
        (
            {"gen_eval_late": True, "save_strategy": "best", "metric_for_best_model": "gen_a_b"},
            "cuda", 1, ["0", "1"], "its weights have moved on",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_with_its_fix(
    given: dict[str, Any], device: str, training: int, visible: list[str], named: str
) -> None:
    problems = place_problems(asked(**given), device, launch(training), visible)
    assert [problem for problem in problems if named in problem.what], problems


def test_what_can_be_has_no_problem() -> None:
    assert place_problems(asked(), "cuda", launch(2), ["0", "1"]) == []
    assert place_problems(asked(gen_eval_placement="spare"), "cuda", launch(1), ["0", "1"]) == []
    assert place_problems(asked(gen_eval_late=True), "cpu", launch(1), []) == []


def test_visible_gpus_are_named_as_the_user_named_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 3, GPU-ab ,")
    assert visible_gpus() == ["3", "GPU-ab"]


@pytest.mark.parametrize("imported", [True, False])
def test_without_the_variable_they_are_counted_by_torch_or_the_driver(
    imported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards = tuple(Gpu(name="H100", memory_bytes=80 << 30, index=index) for index in range(2))
    monkeypatch.setattr(placement, "detect", lambda: Machine(gpus=cards, cpu_count=8, ram_bytes=None))
    torch = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 3))
    if imported:
        monkeypatch.setitem(sys.modules, "torch", torch)
    else:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert visible_gpus() == (["0", "1", "2"] if imported else ["0", "1"])
    assert imported == ("torch" in sys.modules)
