"""What the presets are, how they are found by name, and which ones can be joined."""

from __future__ import annotations

import dataclasses

import pytest

from hf_dsvllm.errors import PresetError
from hf_dsvllm.presets import Preset, available_presets, every_preset, get_preset, preset_names, select

NAMES = (
    *("none", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload_optimizer", "zero3_offload"),
    *("zero3_nvme", "lora", "qlora", "lora_zero2", "qlora_zero2", "qlora_zero3"),
    *("zero2_lowmem", "long_context", "zero3_hpz", "onebit_adam", "onebit_lamb", "zero_one_adam"),
)
EXPERIMENTAL = {"zero2_lowmem", "long_context", "zero3_hpz", "onebit_adam", "onebit_lamb", "zero_one_adam"}


def test_the_list_of_presets_is_a_reviewed_one() -> None:
    assert preset_names() == NAMES
    assert {preset.name for preset in every_preset() if preset.experimental} == EXPERIMENTAL


@pytest.mark.parametrize("preset", every_preset(), ids=lambda preset: preset.name)
def test_a_preset_is_frozen_named_as_it_is_listed_and_says_why_of_every_value(preset: Preset) -> None:
    assert preset.name in NAMES
    assert preset.summary
    assert preset.shards
    assert preset.lives
    assert all(len(setting.why) > 10 for setting in (*preset.deepspeed, *preset.arguments))
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.name = "other"  # type: ignore[misc]


def test_a_preset_is_the_same_value_each_time() -> None:
    assert get_preset("zero3") == get_preset("zero3")


@pytest.mark.parametrize("written", ["zero3_offload", "zero3-offload", " ZeRO3_Offload "])
def test_dashes_capitals_and_spaces_do_not_matter(written: str) -> None:
    assert get_preset(written).name == "zero3_offload"


@pytest.mark.parametrize(("wrong", "near"), [("zero4", "zero3"), ("zero3_ofload", "zero3_offload"), ("qlor", "qlora")])
def test_an_unknown_preset_is_answered_with_the_nearest_names(wrong: str, near: str) -> None:
    with pytest.raises(PresetError, match=rf"unknown preset '{wrong}'; did you mean .*{near}"):
        get_preset(wrong)


def test_a_name_like_no_preset_is_answered_with_all_of_them() -> None:
    with pytest.raises(PresetError, match=r"presets: none, ddp, .*List them with: hf-dsvllm presets"):
        get_preset("%%%")


def test_fp32_accumulation_is_the_default_of_zero2_with_and_without_adapters() -> None:
    def accumulation(name: str) -> str | None:
        found = [setting.value for setting in get_preset(name).deepspeed if "grad_accum_dtype" in setting.key]
        return found[0] if found else None

    with_it = ("zero2", "lora_zero2", "qlora_zero2", "zero2+lora")
    without = ("zero1", "zero2_offload", "zero3", "zero2_offload+lora", "qlora_zero3")
    assert [accumulation(name) for name in with_it] == ["fp32"] * 4
    assert [accumulation(name) for name in without] == [None] * 5


def test_joining_does_not_depend_on_the_order() -> None:
    assert get_preset("lora+zero3") == get_preset("zero3+lora")
    assert get_preset("zero3+lora").adapter == "lora"
    assert get_preset("zero3+lora").zero_stage == 3


@pytest.mark.parametrize(("joined", "named"), [("zero2+lora", "lora_zero2"), ("zero3+qlora", "qlora_zero3")])
def test_a_joined_preset_equals_the_named_one(joined: str, named: str) -> None:
    assert dataclasses.replace(get_preset(joined), name=named) == get_preset(named)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("base", ["ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload_optimizer"])
def test_adapters_go_on_top_of_every_ordinary_preset(base: str, adapter: str) -> None:
    joined = get_preset(f"{base}+{adapter}")
    assert joined.adapter == adapter
    assert joined.zero_stage == get_preset(base).zero_stage
    assert joined.offload_optimizer == get_preset(base).offload_optimizer


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("zero2+zero3", "join one full preset with lora or qlora"),
        ("lora+qlora", "join one full preset with lora or qlora"),
        ("lora_zero2+lora", "join one full preset with lora or qlora"),
        ("zero2+lora_zero2", "join one full preset with lora or qlora"),
        ("zero2+zero3+lora", "joins 3 presets"),
        ("zero3_offload+qlora", r"4-bit weights cannot be offloaded to cpu.*zero3_offload_optimizer\+qlora"),
        ("zero3_nvme+qlora", "4-bit weights cannot be offloaded to nvme"),
        ("zero2_lowmem+lora", r"for full fine-tuning.*zero2\+lora"),
        ("onebit_adam+lora", "for full fine-tuning"),
    ],
)
def test_a_join_that_makes_no_sense_is_refused_with_one_that_does(name: str, reason: str) -> None:
    with pytest.raises(PresetError, match=reason):
        get_preset(name)


@pytest.mark.parametrize("name", ["onebit_adam", "onebit_lamb", "zero_one_adam"])
def test_a_removed_optimizer_is_answered_with_the_last_release_that_has_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "deepspeed_has_onebit", lambda: False)
    with pytest.raises(PresetError, match=r'pip install "deepspeed<=0\.19\.6", or use zero2'):
        get_preset(name)
    assert name not in {preset.name for preset in available_presets()}


def test_an_older_deepspeed_offers_the_one_bit_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "deepspeed_has_onebit", lambda: True)
    assert [preset.name for preset in available_presets()] == list(NAMES)
    assert get_preset("onebit_adam").needs_onebit


def test_whether_deepspeed_has_the_one_bit_optimizers_is_read_from_its_files() -> None:
    import importlib.util

    try:
        has_them = importlib.util.find_spec("deepspeed.runtime.fp16.onebit") is not None
    except ModuleNotFoundError:
        has_them = False
    assert select.deepspeed_has_onebit() == has_them
