"""Our lists of DeepSpeed's key names equal what the installed DeepSpeed reads; a new release shows up here."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm import ds_keys


def field_names(model: Any) -> set[str]:
    """Names and aliases of a pydantic model's fields."""
    return {
        name
        for field, info in model.model_fields.items()
        for name in (field, info.alias if isinstance(info.alias, str) else field)
    }


def keys_read_from(module: Any) -> set[str]:
    """The keys a DeepSpeed module reads from its `param_dict`, with its constants resolved."""
    readers = ("get_scalar_param", "get_dict_param", "get_list_param")
    found: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        key: ast.expr | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in readers:
            key = node.args[1] if is_param_dict(node.args[0]) else None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_param_dict(node.func.value):
            key = node.args[0] if node.func.attr == "get" else None
        elif isinstance(node, ast.Compare) and is_param_dict(node.comparators[0]):
            key = node.left
        elif isinstance(node, ast.Subscript) and is_param_dict(node.value):
            key = node.slice
        value = key.value if isinstance(key, ast.Constant) else getattr(module, getattr(key, "id", ""), None)
        if isinstance(value, str):
            found.add(value)
    return found


def is_param_dict(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "param_dict"


def test_zero_keys_are_the_fields_of_deepspeeds_zero_configuration() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert field_names(DeepSpeedZeroConfig) == ds_keys.ZERO_KEYS


def test_offload_keys_are_the_fields_of_deepspeeds_offload_configurations() -> None:
    from deepspeed.runtime.zero import offload_config

    optimizer = field_names(offload_config.DeepSpeedZeroOffloadOptimizerConfig)
    assert optimizer | field_names(offload_config.DeepSpeedZeroOffloadParamConfig) == ds_keys.OFFLOAD_KEYS


def test_aio_keys_are_those_deepspeed_reads() -> None:
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert set(AIO_DEFAULT_DICT) == ds_keys.AIO_KEYS


def test_no_key_deepspeed_reads_at_the_top_level_is_unknown_to_us() -> None:
    from deepspeed.profiling import config as profiling_config
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.activation_checkpointing import config as activation_config

    read = set().union(*map(keys_read_from, (config, precision_config, profiling_config, activation_config)))
    assert len(read) > 30, "DeepSpeed no longer reads its configuration from param_dict"
    assert read - ds_keys.TOP_LEVEL_KEYS - set(ds_keys.REMOVED_TOP_LEVEL) == set()


@pytest.mark.parametrize("group", ["TOP_LEVEL_KEYS", "DATA_TYPE_KEYS"])
def test_every_key_we_know_is_written_somewhere_in_deepspeed(group: str) -> None:
    import deepspeed

    folder = Path(inspect.getfile(deepspeed)).parent
    source = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    missing = [key for key in getattr(ds_keys, group) if f'"{key}"' not in source and f"'{key}'" not in source]
    # Fields of pydantic models and attributes are not quoted.
    assert [key for key in missing if f"{key}:" not in source and f".{key}" not in source] == []


def test_removed_keys_are_those_the_installed_deepspeed_refuses() -> None:
    from deepspeed.runtime import config

    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) == set(ds_keys.REMOVED_TOP_LEVEL)
    assert set(config._REMOVED_ZERO_CONFIG_KEYS) == set(ds_keys.REMOVED_ZERO)


def test_removed_optimizers_are_not_in_deepspeeds_list() -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    assert {name.lower() for name in DEEPSPEED_OPTIMIZERS}.isdisjoint(ds_keys.REMOVED_OPTIMIZERS)


def test_the_autos_we_allow_are_those_the_trainer_fills_in() -> None:
    from transformers.integrations import deepspeed as integration

    source = inspect.getsource(integration.HfTrainerDeepSpeedConfig)
    filled = {key for key in ds_keys.FILLED_AUTO | ds_keys.FILLED_AUTO_STAGE3 if f'"{key}"' in source}
    assert filled == ds_keys.FILLED_AUTO | ds_keys.FILLED_AUTO_STAGE3
