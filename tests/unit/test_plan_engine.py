"""Where the plan puts vLLM is where a run puts it, and what it takes there."""

from __future__ import annotations

import dataclasses

import pytest

from hf_dsvllm import engine_size, placement
from hf_dsvllm.hardware import parse_machine
from hf_dsvllm.planner import engine
from hf_dsvllm.planner.cards import rates_of
from hf_dsvllm.planner.engine import EnginePlace, engine_footprint
from hf_dsvllm.planner.explain import command_line, record, sentences, suggestions
from hf_dsvllm.planner.search import Candidate, Job, placements
from tests.unit.test_plan_rules import plan, shape

GIB = 2**30
EVALUATION = (64, 2048)


def candidates(kind: str, *, sleeps: bool = False, **more: object) -> list[Candidate]:
    options: dict[str, object] = {"method": "lora", "global_batch": 24, "evaluation": EVALUATION, "streams": None}
    found = plan("8b", "4xH100-80GB", **{**options, **more})  # type: ignore[arg-type]
    return [c for c in found.candidates if c.placement == kind and c.place.sleeps is sleeps]


def test_sizes_are_those_the_run_starts_its_engine_with() -> None:
    assert engine.CONCURRENT_SEQUENCES == engine_size.CONCURRENT_SEQUENCES
    assert engine.MOST_KV_BYTES == engine_size.MAX_KV_CACHE_BYTES
    assert engine.WEIGHTS_SHARE == engine_size.WEIGHTS_SHARE
    assert "then sleeps" in str(placement.Place.__doc__)  # a shared engine, with stream only


@pytest.mark.parametrize(("length", "kv_gib"), [(16, 1.0), (512, 4.5), (2048, 8.0)])
def test_the_cache_is_for_64_sequences_within_the_bounds_of_the_run(length: int, kv_gib: float) -> None:
    found = engine_footprint(shape("8b"), EnginePlace(kind="shared"), length=length, card_bytes=80 * GIB)
    assert found.kv_bytes == kv_gib * GIB
    assert found.awake == 2 * shape("8b").parameters + found.kv_bytes + engine.WORK_BYTES


def test_an_engine_that_stays_awake_takes_its_memory_all_the_time() -> None:
    for found in candidates("shared"):
        assert found.engine is not None
        assert found.setup.world == 4
        assert found.gpu_bytes == found.footprint.peak + found.engine.awake


def test_an_engine_that_sleeps_takes_it_beside_what_training_holds_between_steps() -> None:
    for found in candidates("shared", sleeps=True):
        assert found.engine is not None
        after = found.footprint.parts["optimizer"]
        gone = after.get("optimizer step", 0)
        if found.setup.preset.zero_stage != 3:  # which keeps a buffer for gradients
            gone += after.get("gradients", 0)
        rest = sum(after.values()) - gone
        assert found.gpu_bytes >= max(found.footprint.peak + found.engine.asleep, rest + found.engine.awake)
        assert found.gpu_bytes < found.footprint.peak + found.engine.awake


def test_spare_gpus_are_taken_off_for_one_engine_or_several_copies_of_it() -> None:
    sizes = {(c.setup.world, c.place.gpus, c.place.copies) for c in candidates("spare")}
    assert sizes == {(3, 1, 1), (2, 1, 2)}
    large = plan("70b", "8xH100-80GB", method="lora", global_batch=24, evaluation=EVALUATION)
    assert {c.place.gpus for c in large.candidates if c.placement == "spare"} == {
        4
    }  # 6 and 4 train; 2 x 65 GiB: too much


def test_what_is_chosen_needs_no_sleep_where_all_fits_awake() -> None:
    found = plan("1.7b", "1xH200", method="lora", evaluation=EVALUATION, streams=None, length=512, global_batch=8)
    assert found.chosen is not None
    assert not found.chosen.place.sleeps
    assert "stream" not in command_line(found, "MODEL")


def test_a_plan_that_relies_on_sleep_says_so_and_its_command_line_has_the_flag() -> None:
    found = plan("8b", "1xH100-80GB", method="lora", evaluation=EVALUATION, streams=None)
    assert found.chosen is not None
    assert found.chosen.place.sleeps
    assert "--gen_eval_placement shared --gen_eval_weights stream" in command_line(found, "MODEL")
    assert any("it sleeps" in sentence and "--gen_eval_weights stream" in sentence for sentence in sentences(found))
    assert record(found, "MODEL")["chosen"]["engine"]["sleeps"] is True
    settled = plan("8b", "1xH100-80GB", method="lora", evaluation=EVALUATION, streams=False)
    assert not any(c.place.sleeps for c in settled.candidates)


def test_more_sequences_than_the_cache_holds_are_said_to_wait() -> None:
    found = plan("1.7b", "1xH200", method="lora", evaluation=(500, 512), length=512, global_batch=8)
    assert any("500 sequences are answered 64 at a time" in sentence for sentence in sentences(found))


def test_an_engine_whose_weights_a_run_would_refuse_does_not_fit_and_leaving_it_out_is_suggested() -> None:
    found = plan("32b", "1xH100-80GB", method="qlora", evaluation=EVALUATION, length=1024, global_batch=4)
    assert found.chosen is None
    assert all("vLLM's GPU" in candidate.scarce for candidate in found.candidates)
    assert "qlora without vLLM beside the trainer" in suggestions(found.job)[0]


def test_where_the_launch_has_settled_processes_the_engine_goes_where_the_run_puts_it() -> None:
    def placed(processes: int, *, streams: bool = False) -> tuple[int, EnginePlace]:
        job = Job(
            shape=shape("8b"),
            machine=parse_machine("4xH100-80GB"),
            rates=rates_of("H100-80GB"),
            length=2048,
            global_batch=12,
            evaluation=EVALUATION,
            processes=processes,
            streams=streams,
        )
        (found,) = placements(job)
        return found

    assert placed(3) == (3, EnginePlace(kind="spare"))
    assert placed(2) == (2, EnginePlace(kind="spare", copies=2))
    assert placed(4) == (4, EnginePlace(kind="shared"))
    assert placed(4, streams=True) == (4, EnginePlace(kind="shared", sleeps=True))
    assert placed(3, streams=True) == (3, EnginePlace(kind="spare"))


def test_a_candidate_on_cpus_counts_the_tensors_of_every_process() -> None:
    job = Job(
        shape=shape("1.7b"),
        machine=dataclasses.replace(parse_machine("1xL4"), gpus=()),
        rates=rates_of("L4"),
        length=128,
        global_batch=2,
        method="lora",
        device="cpu",
        processes=2,
    )
    from hf_dsvllm.planner.search import make_plan

    found = make_plan(job).candidates[0]
    assert found.host_bytes == found.host.peak + 2 * found.footprint.peak
