"""Every kind of export says in the real vLLM what the trained model says in transformers.

One server is shared by the module (a start takes most of a minute on two cores): what each proof would start, it gets
with the new weights reloaded instead.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec, WeightSync
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export import verify_engine
from hf_dsvllm.export.make import ExportReport, export_model
from tests.export_runs import NF4, move, write_run
from tests.tiny import write_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

KINDS = {
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 30}},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 40, 41]},
}


class Shared:
    """Stands for EngineServer: starts vLLM once, afterwards reloads the weights of whatever is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: EngineServer | None = None
        self.sync: WeightSync | None = None

    def start(self, spec: EngineSpec, _: Path) -> Shared:
        if self.server is None or self.sync is None:
            spec = dataclasses.replace(spec, max_lora_rank=8, max_model_len=256, cpu_threads=1)
            self.server = EngineServer.start(spec, self.folder)
            self.server.wait_ready(420)
            self.sync = WeightSync(self.server, EngineClient(self.server.uds))
        else:
            self.sync.push(Path(spec.model), "full", 1)
        return self

    @property
    def uds(self) -> Path:
        assert self.server is not None
        return self.server.uds

    def wait_ready(self, _: float) -> None:
        pass

    def stop(self) -> None:
        pass


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    server = Shared(tmp_path_factory.mktemp("engine"))
    yield server
    if server.server is not None:
        server.server.stop()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "base", dtype="bfloat16")


@pytest.fixture(autouse=True)
def _one_server(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_engine, "EngineServer", shared)


def prove(source: Path, out: Path, **settings: object) -> ExportReport:
    return export_model(source, out, prove_in_vllm=True, vllm_python=Path(sys.executable), progress=False, **settings)


def check(report: ExportReport) -> None:
    found = report.verification_in_vllm
    assert found is not None
    assert found.passed
    assert found.tokens > 200
    assert found.answer_tokens > 8
    assert found.answer_agreement == 1
    assert found.mean_logprob_difference < report.verification.mean_limit


def test_a_run_and_a_qlora_run(base: Path, tmp_path: Path) -> None:
    check(prove(write_run(tmp_path / "lora", base), tmp_path / "out"))
    check(prove(write_run(tmp_path / "qlora", base, quantization=NF4), tmp_path / "out2"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_every_kind(kind: str, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **KINDS[kind]))
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    move(adapted, std=0.05).save_pretrained(tmp_path / "adapter")
    check(prove(tmp_path / "adapter", tmp_path / "out"))


def test_a_full_model(tmp_path: Path) -> None:
    check(prove(write_tiny_model(tmp_path / "output" / "checkpoint-3", seed=5), tmp_path / "out"))


def test_an_adapter_that_stays_one(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **KINDS["patterns"]))
    move(adapted, std=0.05).save_pretrained(tmp_path / "adapter")
    check(prove(tmp_path / "adapter", tmp_path / "out", format="adapter"))


def test_a_model_that_vllm_reads_otherwise_is_refused(
    base: Path, tmp_path: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tiny_model(tmp_path / "other", seed=8, dtype="bfloat16")
    start = shared.start
    monkeypatch.setattr(shared, "start", lambda spec, folder: start(dataclasses.replace(spec, model=other), folder))
    with pytest.raises(ExportError, match=r"In vLLM .* the export differs from the trained model"):
        prove(write_run(tmp_path / "run", base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
