"""What offloading costs: the host's memory and its drive are shared by the processes on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hf_dsvllm import calibrate
from hf_dsvllm.features import PIECE, SLOT, SLOTS, left_to_plan
from hf_dsvllm.hardware import parse_machine
from hf_dsvllm.planner import cards, host
from hf_dsvllm.planner.explain import sentences
from hf_dsvllm.planner.footprint import Setup, gpu_footprint
from hf_dsvllm.planner.search import Job, judge, placements
from hf_dsvllm.planner.speed import ADAM_BYTES, step_time
from hf_dsvllm.presets import get_preset
from hf_dsvllm.presets.preset import Setting
from tests.unit.test_plan_rules import plan, shape

RATES = cards.rates_of("H200")


def optimizer(preset: str, world: int = 1, rates: cards.Rates = RATES, **more: object) -> float:
    options: dict[str, object] = {"micro": 1, "length": 1024, "recompute": True, **more}
    setup = Setup(shape=shape("8b"), preset=get_preset(preset), world=world, **options)  # type: ignore[arg-type]
    return step_time(setup, rates).parts["optimizer"]


def test_what_goes_to_the_drive_takes_time() -> None:
    parameters = shape("8b").parameters
    slower = optimizer("zero3_nvme") - optimizer("zero3_offload")
    assert slower == pytest.approx((32 + 2 * 4) * parameters / RATES.nvme_bytes_per_s)
    twice = dataclasses.replace(RATES, nvme_bytes_per_s=2 * RATES.nvme_bytes_per_s)
    assert optimizer("zero3_nvme", rates=twice) - optimizer("zero3_offload") == pytest.approx(slower / 2)


def test_more_processes_on_a_host_do_not_make_its_drive_faster() -> None:
    one, four = (optimizer("zero3_nvme", world) - optimizer("zero3_offload", world) for world in (1, 4))
    assert four == pytest.approx(one)


def test_adam_on_the_host_is_no_faster_than_its_memory() -> None:
    parameters = shape("8b").parameters
    floor = ADAM_BYTES * parameters / RATES.host_memory_bytes_per_s
    times = {world: optimizer("zero2_offload", world) for world in (1, 2, 4, 8)}
    assert times[1] > parameters / RATES.adam_parameters_per_s > floor
    assert times[1] > times[2] > times[4]
    assert times[8] > floor
    narrow = dataclasses.replace(RATES, host_memory_bytes_per_s=RATES.host_memory_bytes_per_s / 4)
    assert optimizer("zero2_offload", 8, narrow) - times[8] == pytest.approx(3 * floor)


def test_copies_that_overlap_take_no_time_but_adam_waits_for_the_link() -> None:
    overlapped = frozenset({"overlap_offload"})
    parameters = shape("8b").parameters
    saved = optimizer("zero2_offload", 2) - optimizer("zero2_offload", 2, features=overlapped)
    assert saved == pytest.approx((2 + 2) * parameters / 2 / RATES.host_bytes_per_s)
    fast = dataclasses.replace(RATES, adam_parameters_per_s=1e12, host_memory_bytes_per_s=1e15)
    slow = dataclasses.replace(fast, host_bytes_per_s=fast.host_bytes_per_s / 2)
    longer = optimizer("zero2_offload", 1, slow, features=overlapped)
    more = longer - optimizer("zero2_offload", 1, fast, features=overlapped)
    assert more == pytest.approx(4 * parameters / RATES.host_bytes_per_s)
    several = optimizer("zero2_offload", 2, accumulation=4)
    assert several - optimizer("zero2_offload", 2, accumulation=4, features=overlapped) < saved


@pytest.mark.parametrize("preset", ["zero2_offload", "zero3_offload_optimizer", "zero3_offload", "zero2"])
def test_gradients_on_their_way_to_the_host_take_half_a_gib_of_the_gpu(preset: str) -> None:
    plain = Setup(shape=shape("8b"), preset=get_preset(preset), world=2, micro=1, length=1024, recompute=True)
    overlapped = dataclasses.replace(plain, features=frozenset({"overlap_offload"}))
    more = gpu_footprint(overlapped).peak - gpu_footprint(plain).peak
    assert more == (0 if preset == "zero2" else 4 * (SLOTS * SLOT + PIECE))


def test_a_plan_that_needs_the_drive_says_how_fast_it_is_taken_to_be() -> None:
    found = plan("32b", "1xH100-80GB", ram_gib=192, nvme_bytes=2 * 10**12, length=1024, global_batch=8)
    assert found.chosen is not None
    assert found.chosen.setup.preset.name == "zero3_nvme"
    assert any("3.0 GB/s (an assumption)" in sentence for sentence in sentences(found))


def test_a_drive_and_the_hosts_memory_are_measured_and_kept(tmp_path: Path) -> None:
    try:
        rate = calibrate.drive_rate(tmp_path, mib=4)
    except OSError:
        pytest.skip("this file system allows no direct access")
    assert rate > 0
    assert list(tmp_path.iterdir()) == []
    record = {"device": "cuda", "device_name": "H200", "matmul_flops": {"a": 1e14}, "copy_bytes_per_s": 1e12}
    rates = cards.from_record({**record, "nvme_bytes_per_s": rate, "host_copy_bytes_per_s": 2e11})
    assert (rates.nvme_bytes_per_s, rates.host_memory_bytes_per_s) == (rate, 2e11)


@pytest.mark.parametrize(("card", "summed"), [("1xH200", True), ("1xA100-40GB", False)])
def test_gradients_are_summed_on_the_gpu_by_plans_that_have_the_room_and_by_no_others(card: str, summed: bool) -> None:
    """32B, whose gradients are 61 GiB: what fits as DeepSpeed has it fits as before, where they do not."""
    machine = parse_machine(card)
    job = Job(shape=shape("32b"), machine=machine, rates=RATES, length=1024, global_batch=8, host_bytes=1 << 40)
    place = next(iter(placements(job)))[1]
    without = judge(job, get_preset("zero3_offload"), 1, 1, True, place)
    found = judge(
        dataclasses.replace(job, features_that_fit=left_to_plan(None)), get_preset("zero3_offload"), 1, 1, True, place
    )
    assert without.fits
    assert found.fits
    assert found.setup.sums_on_gpu == summed
    if not summed:
        assert found == without


def test_swap_buffers_are_host_memory() -> None:
    """1.7B on one H200 took 44.4 GiB with a sub-group of 1e9 (as DeepSpeed cut it, 1.00e9) and 5 x 1.3e9 x 2 bytes."""

    def footprint(name: str, sub_group: int | None = None, world: int = 1) -> host.HostFootprint:
        preset = get_preset("zero3_nvme")
        if sub_group is not None:
            others = tuple(each for each in preset.deepspeed if not each.key.endswith(".sub_group_size"))
            wanted = Setting("zero_optimization.sub_group_size", sub_group, "")
            preset = dataclasses.replace(preset, deepspeed=(*others, wanted))
        setup = Setup(shape=shape(name), preset=preset, world=world, micro=2, length=4096, recompute=True)
        return host.host_footprint(setup)

    def of_an_unknown_model(monkeypatch: pytest.MonkeyPatch) -> host.HostFootprint:
        monkeypatch.setattr(host, "swap_buffer_elements", lambda *_: 1_300_001_024)
        return footprint("1.7b", 1_000_000_000 - shape("1.7b").largest_matrix)

    with pytest.MonkeyPatch.context() as monkeypatch:
        assert of_an_unknown_model(monkeypatch).train / 2**30 == pytest.approx(44.4, rel=0.01)
    small, large = footprint("32b"), footprint("32b", 10**9)
    assert large.train - small.train == 26 * (10**9 - 10**8)
    assert small.pinned > 2 * shape("32b").parameters  # the sum of a step's gradients
    assert footprint("32b", world=4).pinned < 2 * small.pinned
