"""What is read off a live Trainer, and what its uploads leave out."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer  # noqa: F401
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer

from hf_dsvllm import ranks
from hf_dsvllm import wiring as wiring_module
from hf_dsvllm._compat import keep_out_of_uploads
from hf_dsvllm.errors import ConfigError, WiringError
from hf_dsvllm.presets import get_preset
from hf_dsvllm.wiring import Wiring, check_ranks_agree, check_wiring, read_wiring

KEPT = ("config.json", "model.safetensors", "README.md", "adapter_model.safetensors", "runs/events", "tokenizer.json")
LEFT_OUT = (
    *("export/model.safetensors", "export-best/config.json", "export-2/config.json", "final/model.safetensors"),
    *("snapshots/step-1/model.safetensors", "snapshots/best.json", "evals/step-000001.private.jsonl"),
    *("snapshots-before-1/step-1/model.safetensors", "export-before-1/config.json"),
    *("evals-before-1/scores.jsonl", "engine/base/model.safetensors", "engine/vllm-1.log", "tokenizer/tokenizer.json"),
    *("run.json", "plan.json", "measured.json", "ds_config.json", "report.html", ".running", ".run.json.abcdefgh.tmp"),
    *(".export.abcdefgh.tmp/model.safetensors", "_private", "checkpoint-1/optimizer.pt"),
)


class DistributedDataParallel(torch.nn.Module):
    """The name is what counts."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model


def test_the_engine_is_read_inside_what_accelerate_compiled_last() -> None:
    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(DistributedDataParallel(model), backend="eager")
    accelerator = SimpleNamespace(num_processes=2)
    wiring = read_wiring(SimpleNamespace(model=model, model_wrapped=compiled, accelerator=accelerator))
    assert wiring.engine == "DistributedDataParallel"


@pytest.mark.parametrize(("engine", "stage"), [("DistributedDataParallel", None), ("DeepSpeedEngine", 2)])
def test_processes_that_average_their_gradients_pass(
    engine: str, stage: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    wiring = Wiring(
        engine=engine, zero_stage=stage, world_size=2, adapter_modules=0, four_bit_modules=0, trainable_parameters=1
    )
    check_wiring(wiring, get_preset("ddp"), None)
    check_wiring(wiring, None, None)


@pytest.mark.parametrize("engine", ["FullyShardedDataParallel", "FSDPLlamaForCausalLM"])
def test_fsdp_is_refused_by_its_name(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    wiring = Wiring(
        engine=engine, zero_stage=None, world_size=2, adapter_modules=0, four_bit_modules=0, trainable_parameters=1
    )
    with pytest.raises(WiringError, match=rf"FSDP shards the model \({engine}\)"):
        check_wiring(wiring, None, None)


def planned(**changes: Any) -> SimpleNamespace:
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    settings = {"ds_preset": "zero3", "deepspeed": config, "per_device_train_batch_size": 8}
    settings |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": True}
    return SimpleNamespace(**settings | changes)


def on_ranks(monkeypatch: pytest.MonkeyPatch, *others: SimpleNamespace) -> None:
    """A group of this rank and `others`."""
    monkeypatch.setattr(ranks, "is_distributed", lambda: True)
    monkeypatch.setattr(ranks, "from_all", lambda own: [own, *map(wiring_module.settings_of, others)])


def test_ranks_that_are_set_up_alike_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(monkeypatch, planned(), planned())
    check_ranks_agree(planned())


def test_ranks_that_planned_differently_are_named_with_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {"ds_preset": "zero2", "deepspeed": {"zero_optimization": {"stage": 2}}, "gradient_checkpointing": False}
    on_ranks(monkeypatch, planned(), planned(**changed), planned(**changed), planned())
    with pytest.raises(ConfigError) as caught:
        check_ranks_agree(planned())
    (problem,) = caught.value.problems
    for part in (
        "ds_preset is zero3 on ranks 0-1, 4 and zero2 on ranks 2-3",
        "ZeRO stage is 3 on ranks 0-1, 4 and 2 on ranks 2-3",
        "offload of the optimizer is cpu on ranks 0-1, 4 and none on ranks 2-3",
        "gradient_checkpointing is True on ranks 0-1, 4 and False on ranks 2-3",
    ):
        assert part in problem.what
    assert "per_device_train_batch_size" not in problem.what
    assert "--ds_preset NAME instead of auto" in problem.fix


def test_a_micro_batch_of_one_rank_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(monkeypatch, planned(per_device_train_batch_size=4, deepspeed=None, ds_preset=None))
    with pytest.raises(ConfigError, match="per_device_train_batch_size is 8 on rank 0 and 4 on rank 1"):
        check_ranks_agree(planned(deepspeed=None, ds_preset=None))


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "from_all", lambda _own: pytest.fail("there is no other rank"))
    check_ranks_agree(planned())


class Hub:
    """What transformers calls of the hub's client."""

    def __init__(self) -> None:
        self.uploads: list[dict[str, Any]] = []

    def upload_folder(self, **given: Any) -> None:
        self.uploads.append(given)

    def uploaded(self) -> set[str]:
        given = self.uploads[-1]
        return set(filter_repo_objects([*KEPT, *LEFT_OUT], ignore_patterns=given["ignore_patterns"]))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(sys.modules["transformers.trainer"], "hf_api", lambda: hub)
    return hub


def uploading(folder: Path) -> Any:
    """A Trainer about to upload `folder`, with nothing in it but what the upload asks for."""
    trainer = object.__new__(Trainer)
    args = SimpleNamespace(
        output_dir=str(folder), export_to=str(folder / "final"), hub_token=None, hub_revision=None, hub_model_id="a/b",
        hub_strategy="every_save", hub_always_push=True, should_save=True, save_strategy="steps",
    )  # fmt: skip
    trainer.__dict__.update(
        args=args, hub_model_id="a/b", model=torch.nn.Linear(1, 1), push_in_progress=None, processing_class=None,
        state=SimpleNamespace(global_step=1), control=None, callback_handler=SimpleNamespace(
            on_push_begin=lambda *_: None
        ),
    )  # fmt: skip
    nothing: Any = lambda *_, **__: None  # noqa: E731
    for name in ("save_model", "create_model_card"):
        trainer.__dict__[name] = nothing
    trainer.__dict__["is_world_process_zero"] = lambda: True
    return trainer


@pytest.mark.parametrize("moment", ["at the end", "at a checkpoint"])
def test_uploads_of_the_trainer_leave_out_what_a_run_writes(moment: str, tmp_path: Path, hub: Hub) -> None:
    trainer = uploading(tmp_path)
    keep_out_of_uploads(trainer)
    keep_out_of_uploads(trainer)
    if moment == "at the end":
        trainer.push_to_hub()
    else:
        trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert hub.uploaded() == set(KEPT)


def test_uploads_of_other_folders_stay_as_they_are(tmp_path: Path, hub: Hub) -> None:
    keep_out_of_uploads(uploading(tmp_path / "ours"))
    uploading(tmp_path / "another").push_to_hub()
    assert hub.uploads[-1]["ignore_patterns"] == ["_*", "checkpoint-*"]
