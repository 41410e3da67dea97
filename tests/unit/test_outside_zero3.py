"""Models made beside a ZeRO-3 run are whole, and the run stays a ZeRO-3 run."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_dsvllm._compat import outside_zero3


@pytest.fixture
def zero3() -> Iterator[HfDeepSpeedConfig]:
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    yield config
    del config
    gc.collect()  # transformers holds the configuration by a weak reference: nothing of it may reach other tests


def test_zero3_is_hidden_inside_and_back_afterwards(zero3: HfDeepSpeedConfig) -> None:
    assert is_deepspeed_zero3_enabled()
    with outside_zero3():
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()


def test_zero3_is_back_after_an_error(zero3: HfDeepSpeedConfig) -> None:
    @outside_zero3()
    def fail() -> None:
        assert not is_deepspeed_zero3_enabled()
        raise RuntimeError("export failed")

    with pytest.raises(RuntimeError, match="export failed"):
        fail()
    assert is_deepspeed_zero3_enabled()


def test_nothing_happens_without_zero3() -> None:
    with outside_zero3():
        assert not is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()
