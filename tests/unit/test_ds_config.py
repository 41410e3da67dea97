"""The DeepSpeed JSON of every preset: frozen in golden files, accepted by DeepSpeed, filled in by the Trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm.ds_config import RunShape, build, explain, get_key, set_key, zero_stage
from hf_dsvllm.presets import available_presets, every_preset, get_preset
from tests.golden.regenerate import FOLDER, golden_configs

CONFIGS = golden_configs()
REGENERATE = "run `python -m tests.golden.regenerate` and review the diff"


def test_there_is_a_golden_file_for_every_configuration_and_no_other() -> None:
    assert {path.name for path in FOLDER.glob("*.json")} == set(CONFIGS), REGENERATE


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_exactly_its_golden_file(name: str) -> None:
    assert json.loads((FOLDER / name).read_text(encoding="utf-8")) == CONFIGS[name], REGENERATE


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", [*(preset.name for preset in every_preset() if preset.uses_deepspeed), "zero3+lora"])
def test_every_value_has_a_reason(name: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dsvllm.presets.select.deepspeed_has_onebit", lambda: True)
    preset = get_preset(name)
    config = build(preset, RunShape(world_size=4, gpus_per_node=4, device=device, nvme_path=Path("/nvme")))
    assert config is not None
    explained = explain(preset, config)
    assert {key: value for key, value, _ in explained} == leaves(config)
    assert [key for key, _, why in explained if not why.strip()] == []
    assert explain(get_preset("lora"), None) == []


@pytest.fixture(scope="module")
def trainer_arguments(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ordinary arguments, as the Trainer would fill "auto" from."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("out")),
        bf16=True,
        use_cpu=True,
        report_to=[],
        max_grad_norm=0.7,
        gradient_accumulation_steps=3,
    )


def filled(config: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """`config` with every "auto" replaced as the Trainer does it before and after the model exists."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    trainer_config = HfTrainerDeepSpeedConfig(copy.deepcopy(config))
    trainer_config.trainer_config_process(arguments)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    trainer_config.trainer_config_finalize(arguments, model, num_training_steps=10)
    return dict(trainer_config.config)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_trainer_fills_in_every_auto_and_deepspeed_accepts_the_result(name: str, trainer_arguments: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = filled(CONFIGS[name], trainer_arguments)
    assert '"auto"' not in json.dumps(config)
    parsed = DeepSpeedConfig(config)
    ours = CONFIGS[name]["zero_optimization"]
    assert parsed.zero_config.stage == ours["stage"]
    assert parsed.gradient_clipping == 0.7
    assert parsed.gradient_accumulation_steps == 3
    assert parsed.bfloat16_config.enabled
    assert parsed.grad_accum_dtype == CONFIGS[name].get("data_types", {}).get("grad_accum_dtype")
    for block in ("offload_optimizer", "offload_param"):
        offload = getattr(parsed.zero_config, block)
        assert (offload.device if offload else None) == ours.get(block, {}).get("device")


@pytest.mark.parametrize("preset", every_preset(), ids=lambda preset: preset.name)
def test_a_preset_without_a_stage_has_no_configuration(preset: Any) -> None:
    assert (build(preset, RunShape()) is None) == (preset.zero_stage is None)


def test_every_configuration_follows_the_trainers_clipping() -> None:
    assert all(config["gradient_clipping"] == "auto" for config in CONFIGS.values())


@pytest.mark.parametrize("preset", available_presets(), ids=lambda preset: preset.name)
def test_on_a_cpu_nothing_overlaps_and_no_memory_is_pinned(preset: Any) -> None:
    config = build(preset, RunShape(device="cpu", nvme_path=Path("/nvme")))
    if config is not None:
        assert config["zero_optimization"].get("overlap_comm") in (None, False)
        for block in ("offload_optimizer", "offload_param"):
            assert not get_key(config, f"zero_optimization.{block}.pin_memory", False)


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_an_nvme_buffer_holds_the_largest_partition(world_size: int) -> None:
    largest = 1_244_659_712  # 151,936 x 8,192: Qwen's vocabulary at a hidden size of 8,192
    shape = RunShape(world_size=world_size, nvme_path=Path("/nvme"), largest_parameter=largest)
    config = build(get_preset("zero3_nvme"), shape)
    assert get_key(config or {}, "zero_optimization.offload_param.buffer_size") * world_size >= largest


def test_an_nvme_buffer_of_a_small_model_is_not_below_deepspeeds_own_default() -> None:
    shape = RunShape(world_size=4, nvme_path=Path("/nvme"), largest_parameter=1000)
    config = build(get_preset("zero3_nvme"), shape)
    assert get_key(config or {}, "zero_optimization.offload_param.buffer_size") == 100_000_000


def test_the_secondary_copy_of_hpz_spans_one_node() -> None:
    config = build(get_preset("zero3_hpz"), RunShape(world_size=16, gpus_per_node=8))
    assert get_key(config or {}, "zero_optimization.zero_hpz_partition_size") == 8


@pytest.mark.parametrize("shape", [{"world_size": 0}, {"gpus_per_node": 0}])
def test_a_run_shape_has_at_least_one_of_everything(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        RunShape(**shape)  # type: ignore[arg-type]


def test_dotted_keys_are_set_and_read() -> None:
    config: dict[str, Any] = {"a": {"b": 1}}
    set_key(config, "a.c.d", 2)
    assert config == {"a": {"b": 1, "c": {"d": 2}}}
    assert get_key(config, "a.c.d") == 2
    assert get_key(config, "a.b.x", "absent") == "absent"


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        (None, 0),
        ({}, 0),
        ({"zero_optimization": {"stage": 3}}, 3),
        ({"zero_optimization": {"stage": "auto"}}, 0),
        ({"zero_optimization": 3}, 0),
    ],
)
def test_the_stage_of_any_dictionary_can_be_asked_for(config: dict[str, Any] | None, stage: int) -> None:
    assert zero_stage(config) == stage
