"""`hf-dsvllm run` puts each model on the GPU of its process, and on no other."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers

from hf_dsvllm.run.command import AdapterOptions, Command, Given
from hf_dsvllm.run.for_arguments import ForArguments
from hf_dsvllm.run.for_models import ForModels
from hf_dsvllm.run.for_trainers import _load_on_one_gpu
from hf_dsvllm.run.state import Run
from hf_dsvllm.run.target import Target


def a_run(preset: str) -> Run:
    given = {"ds_preset": Given(preset, "the command line")}
    target = Target(name="x", path=None, file=None)
    return Run(Command(target=target, script_args=(), given=given, adapter=AdapterOptions(), words=()))


@pytest.fixture(autouse=True)
def _with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("hf_dsvllm.session")  # which brings in what asks for GPUs when it is imported
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_a_4_bit_model_before_the_arguments_goes_to_a_gpu_that_its_rank_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for visible, gpu in ((1, 0), (8, 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=visible: count)
        run = a_run("qlora")
        kwargs = ForModels(run, ForArguments(run)).before_load(transformers.BertForMaskedLM, "m", {})
        assert kwargs["device_map"] == {"": gpu}


def test_a_model_given_by_name_to_trl_stays_on_the_one_gpu_of_its_process() -> None:
    args = SimpleNamespace(ds_preset="lora", deepspeed=None, use_cpu=False, model_init_kwargs={"dtype": "bfloat16"})
    _load_on_one_gpu(args)
    assert args.model_init_kwargs == {"dtype": "bfloat16", "device_map": {"": 0}}
    args.model_init_kwargs = {"device_map": "auto"}
    _load_on_one_gpu(args)
    assert args.model_init_kwargs == {"device_map": "auto"}, "the script's own choice"
