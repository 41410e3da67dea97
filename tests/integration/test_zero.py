"""Each preset runs the engine, ZeRO stage, optimizer and processes it stands for, and says so when it does not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hf_dsvllm.errors import WiringError
from hf_dsvllm.presets import get_preset
from hf_dsvllm.wiring import Wiring, check_wiring
from tests.scripts.runs import Runs, train_all

ZERO2 = {"zero_optimization": {"stage": 2}}
SOUND = Wiring(
    engine="DeepSpeedEngine",
    zero_stage=2,
    world_size=1,
    adapter_modules=0,
    four_bit_modules=0,
    trainable_parameters=10,
)

# preset: (engine, ZeRO stage, layers with adapters)
EXPECTED = {
    "zero3": ("DeepSpeedEngine", 3, 0),
    "zero3+lora": ("DeepSpeedEngine", 3, 14),
    "zero1": ("DeepSpeedEngine", 1, 0),
    "zero2": ("DeepSpeedEngine", 2, 0),
    "lora_zero2": ("DeepSpeedEngine", 2, 14),
    "zero2_lowmem": ("DeepSpeedEngine", 2, 0),
    "ddp": ("DistributedDataParallel", None, 0),
    "lora": ("DistributedDataParallel", None, 14),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    shorter = {"max_steps": 1}
    wanted: list[dict[str, Any]] = [{"name": name, "preset": name, "args": shorter} for name in EXPECTED]
    wanted.append({"name": "fell back", "preset": "zero2", "args": shorter, "fall_back": True})
    return train_all(tmp_path_factory.mktemp("zero"), wanted)


@pytest.mark.distributed
@pytest.mark.parametrize("preset", EXPECTED)
def test_the_live_trainer_is_what_the_preset_stands_for(preset: str, runs: Runs) -> None:
    result = runs[preset]
    assert (result["engine"], result["zero_stage"], result["adapter_modules"]) == EXPECTED[preset]
    assert result["world_size"] == 2


@pytest.mark.distributed
def test_master_weights_in_bf16_begin_where_fp32_ones_do(runs: Runs) -> None:
    (lowmem,), (zero2,) = runs.losses("zero2_lowmem"), runs.losses("zero2")
    assert lowmem != zero2, "it ran in float32"
    assert lowmem == pytest.approx(zero2, abs=0.01)


@pytest.mark.distributed
def test_the_run_folder_records_what_ran(runs: Runs) -> None:
    record = json.loads((runs.folder("zero3") / "run.json").read_text(encoding="utf-8"))
    assert (record["preset"], record["zero_stage"], record["world_size"]) == ("zero3", 3, 2)
    config = json.loads((runs.folder("zero3") / "ds_config.json").read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(config["zero_optimization"])
    measured = json.loads((runs.folder("zero3") / "measured.json").read_text(encoding="utf-8"))
    assert measured["steps"] == 1
    assert measured["skipped_steps"] == 0


@pytest.mark.distributed
def test_a_trainer_that_lost_deepspeed_trains_nothing(runs: Runs) -> None:
    result = runs.results["fell back"]
    assert result["error"] == "WiringError"
    assert "DeepSpeed ZeRO stage 2 was asked for, the engine is DistributedDataParallel" in result["message"]
    assert not (runs.folder("fell back") / "run.json").exists()


def test_wiring_as_asked_for_passes() -> None:
    check_wiring(SOUND, get_preset("zero2"), ZERO2)


@pytest.mark.parametrize(
    ("change", "preset", "config", "told"),
    [
        ({"zero_stage": None, "engine": "Llama"}, "zero2", ZERO2, "ZeRO stage 2 was asked for, the engine is Llama"),
        ({"zero_stage": 0}, "zero2", ZERO2, "ZeRO stage 2 was asked for, the engine runs stage 0"),
        ({"world_size": 2}, "zero2", ZERO2, "1 processes were started, 2 train together"),
        ({"world_size": 2, "engine": "Llama"}, "ddp", None, "2 processes train, each its own copy"),
        ({"zero_stage": None, "engine": "DataParallel"}, "none", None, "by nn.DataParallel"),
        ({}, "lora_zero2", ZERO2, "trains adapters, the model has none"),
        ({"adapter_modules": 3}, "qlora_zero2", ZERO2, "no layer is in 4 bit"),
    ],
)
def test_anything_plainer_than_asked_for_is_an_error(
    change: dict[str, Any],
    preset: str,
    config: dict[str, Any] | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(WiringError, match=told):
        check_wiring(dataclasses.replace(SOUND, **change), get_preset(preset), config)


def test_a_resumed_optimizer_on_nvme_is_an_error_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "nvme"}}}
    check_wiring(SOUND, get_preset("zero2"), config)
    with pytest.raises(WiringError, match="does not restore an optimizer that lies on NVMe"):
        check_wiring(SOUND, get_preset("zero2"), config, resumed=True)


def test_processes_that_train_apart_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WiringError, match="2 processes were started, 1 train together"):
        check_wiring(SOUND, get_preset("zero2"), ZERO2)
