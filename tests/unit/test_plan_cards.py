"""Rates: of the catalogue, of a calibration that belongs to the card, corrected by runs beside the same rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_dsvllm import forecast
from hf_dsvllm.errors import HardwareError
from hf_dsvllm.files import write_json
from hf_dsvllm.hardware import Gpu, Machine, parse_machine
from hf_dsvllm.planner import cards
from hf_dsvllm.planner.explain import command_line, sentences
from hf_dsvllm.planner.speed import step_time
from hf_dsvllm.wiring import Wiring
from tests.unit.test_plan_auto import predicted
from tests.unit.test_plan_rules import plan

WHOLE = {
    "device": "cuda",
    "device_name": "NVIDIA H100 80GB HBM3",
    "device_bytes": 85_000_000_000,
    "matmul_flops": {"a": 1e14, "b": 2e14},
    "copy_bytes_per_s": 1e12,
    "collectives": {"2": {"all_gather": {"1": 1e9, "512": 9e9}}},
}


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def keep(record: dict[str, Any]) -> None:
    file = cards.calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def gpu(name: str, gib: float) -> Gpu:
    return Gpu(name=name, memory_bytes=int(gib * 2**30), index=0)


def test_measured_rates_of_this_machine_win_over_the_catalogue() -> None:
    machine = parse_machine("1xH100-80GB")
    assert "data sheet" in cards.machine_rates(machine).source
    keep(WHOLE)
    rates = cards.machine_rates(machine)
    assert (rates.product_flops, rates.link_bytes_per_s) == (2e14, 9e9)
    assert "NVIDIA H100 80GB HBM3" in rates.source


def test_a_calibration_of_another_card_is_left_alone_and_said() -> None:
    keep(WHOLE)
    rates = cards.machine_rates(parse_machine("1xA100-80GB"))
    assert rates.product_flops == cards.rates_of("A100-80GB").product_flops
    assert "the calibration kept here is that of NVIDIA H100" in rates.source


def test_a_card_outside_the_catalogue_has_the_rates_measured_with_it_and_no_others() -> None:
    unknown = Machine(gpus=(gpu("NVIDIA L40", 45),), cpu_count=1, ram_bytes=1)
    for record in (None, WHOLE):
        if record is not None:
            keep(record)
        with pytest.raises(HardwareError, match="--calibrate"):
            cards.machine_rates(unknown)
    keep({**WHOLE, "device_name": "NVIDIA L40"})
    assert cards.machine_rates(unknown).product_flops == 2e14


def test_what_a_calibration_lacks_comes_from_its_own_card() -> None:
    keep({key: value for key, value in WHOLE.items() if key != "collectives"})
    rates = cards.machine_rates(parse_machine("1xH100-80GB"))
    assert rates.host_bytes_per_s == cards.rates_of("H100-80GB").host_bytes_per_s
    keep({**WHOLE, "device_name": "NVIDIA A100-SXM4-80GB", "collectives": {}})
    rates = cards.machine_rates(parse_machine("1xA100-80GB"))
    assert rates.link_bytes_per_s == cards.rates_of("A100-80GB").link_bytes_per_s


@pytest.mark.parametrize("record", [{"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"},
                                    {**WHOLE, "matmul_flops": {}}, {**WHOLE, "collectives": {"2": 5}}])  # fmt: skip
def test_half_a_calibration_is_no_traceback(record: dict[str, Any]) -> None:
    keep(record)
    rates = cards.machine_rates(parse_machine("1xH100-80GB"))
    assert rates.product_flops == cards.rates_of("H100-80GB").product_flops
    assert "is not whole" in rates.source
    assert "--calibrate" in rates.source


@pytest.mark.parametrize(
    ("name", "gib", "card"),
    [("NVIDIA H100 80GB HBM3", 79.6, "H100-80GB"), ("NVIDIA A100-SXM4-40GB", 40, "A100-40GB"),
     ("NVIDIA L40S", 45, "L40S-48GB"), ("NVIDIA GeForce RTX 4090", 24, "RTX4090-24GB"),
     ("NVIDIA H200", 140.4, "H200-141GB"), ("Tesla V100-SXM2-16GB", 16, "V100-16GB"), ("Tesla T4", 15, "T4-16GB"),
     ("NVIDIA RTX 6000 Ada Generation", 48, "RTX6000Ada-48GB"), ("NVIDIA RTX A6000", 48, "RTXA6000-48GB")],
)  # fmt: skip
def test_a_detected_card_is_found_in_the_catalogue(name: str, gib: float, card: str) -> None:
    assert cards.catalogue_name(gpu(name, gib)) == card


@pytest.mark.parametrize(
    "name",
    ["NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA T400", "NVIDIA GB200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
     "NVIDIA GeForce RTX 4090 Laptop GPU"],
)  # fmt: skip
def test_a_card_whose_name_only_resembles_one_is_not_taken_for_it(name: str) -> None:
    with pytest.raises(HardwareError, match="not in the catalogue"):
        cards.catalogue_name(gpu(name, 16))


class OwnLoss(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    ("trainer", "adapters", "share", "teaches"),
    [(Trainer, 0, 1.0, True), (Trainer, 4, 0.01, False), (Trainer, 0, 0.5, False), (OwnLoss, 0, 1.0, False)],
)
def test_only_a_run_that_the_formulas_describe_corrects_plans(
    trainer: type, adapters: int, share: float, teaches: bool
) -> None:
    found = predicted()
    wiring = Wiring(
        engine="DeepSpeedEngine",
        zero_stage=2,
        world_size=1,
        adapter_modules=adapters,
        four_bit_modules=0,
        trainable_parameters=int(share * found.setup.shape.parameters),
    )
    trained = forecast.as_trained(found, object.__new__(trainer), wiring)
    assert trained is not None
    assert trained.teaches is teaches
    seconds, tokens = found.step.seconds, 10 * found.setup.step_tokens
    measured = {"steps": 10, "median_step_seconds": seconds, "tokens": tokens}
    assert forecast.learn_from(trained, measured) is teaches


def test_runs_of_this_machine_correct_its_plans_and_it_is_said() -> None:
    found = predicted()
    measured = {
        "steps": 10,
        "median_step_seconds": 1.5 * found.step.seconds,
        "tokens": 10 * found.setup.step_tokens,
    }
    assert not forecast.learn_from(found, {**measured, "tokens": 10})
    assert not forecast.learn_from(found, {**measured, "steps": 2})
    before = cards.machine_rates(found.machine)
    for _ in range(3):
        assert forecast.learn_from(found, measured)
    after = cards.machine_rates(found.machine)
    assert (before.correction, after.correction) == (1.0, pytest.approx(1.5, rel=1e-3))
    assert "by 3 runs of this machine" in after.source
    slower = step_time(found.setup, after).seconds
    assert slower == pytest.approx(1.5 * found.step.seconds, rel=1e-3)


def test_a_new_calibration_makes_the_runs_before_it_count_no_more() -> None:
    machine = parse_machine("1xH200")
    for _ in range(3):
        cards.learn(machine.gpus[0].name, cards.machine_rates(machine), 1.5)
    assert cards.machine_rates(machine).correction == 1.5
    keep({**WHOLE, "device_name": "NVIDIA H200"})
    assert cards.machine_rates(machine).correction == 1.0


def test_runs_of_the_format_before_are_passed_over() -> None:
    cards.runs_file().parent.mkdir(parents=True, exist_ok=True)
    cards.runs_file().write_text('{"card": "H200-141GB", "ratio": 1.5}\n' * 3 + "7\n", encoding="utf-8")
    assert cards.machine_rates(parse_machine("1xH200")).correction == 1.0


def test_a_card_without_bf16_is_told_to_train_in_fp16() -> None:
    found = plan("1.7b", "1xT4", method="qlora", global_batch=4, length=512)
    assert command_line(found, "MODEL").endswith("--fp16 true")
    assert any("no bf16" in sentence for sentence in sentences(found))
    assert "--fp16" not in command_line(plan("1.7b", "1xL4", method="qlora", global_batch=4, length=512), "MODEL")
