"""The list of added arguments is short and reviewed, and each explains itself."""

from __future__ import annotations

import dataclasses

import pytest

from hf_dsvllm.fields import PresetFields, added_fields

FROZEN = (
    "ds_preset",
    "ds_speed",
    "nvme_path",
    "gen_eval_file",
    "gen_eval_metrics",
    "gen_eval_steps",
    "gen_eval_on_start",
    "gen_eval_max_new_tokens",
    "gen_eval_limit",
    "gen_eval_temperature",
    "gen_eval_timeout",
    "gen_eval_samples",
    "gen_eval_lm_eval",
    "gen_eval_expose",
    "gen_eval_placement",
    "gen_eval_late",
    "gen_eval_server",
    "gen_eval_tensor_parallel",
    "gen_eval_data_parallel",
    "gen_eval_weights",
    "vllm_python",
    "vllm_args",
    "export_to",
)


def test_the_added_arguments_are_exactly_these() -> None:
    assert added_fields() == FROZEN


@pytest.mark.parametrize("field", dataclasses.fields(PresetFields), ids=lambda field: field.name)
def test_an_added_argument_has_a_default_and_a_help_sentence(field: dataclasses.Field) -> None:
    assert field.default is not dataclasses.MISSING
    assert field.metadata["help"].endswith(".")


def test_the_mixin_adds_nothing_unless_asked() -> None:
    fields = PresetFields()
    assert {name for name in FROZEN if getattr(fields, name)} == {
        "gen_eval_on_start",
        "gen_eval_max_new_tokens",
        "gen_eval_timeout",
        "gen_eval_samples",
        "gen_eval_placement",
        "gen_eval_weights",
    }
