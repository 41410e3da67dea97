"""A snapshot holds the live weights exactly, whatever shards them, and loads with transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_dsvllm.errors import ExportError
from hf_dsvllm.live import full_model
from hf_dsvllm.live.snapshot import prune, publish
from tests.scripts.runs import Runs, train_all
from tests.tiny import write_tiny_model

STAGE0 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 0},
}
FULL = ("zero3", "zero3 untied", "zero2", "zero1", "stage 0")
ADAPTERS = ("zero3+lora", "lora_zero2")
RESTORED = ("zero3", "zero3+lora", "zero2", "lora_zero2")
SENDING = ("zero3", "lora_zero2")
PUBLISHING = ("zero3", "zero3 untied", "zero2")
STEPS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("snapshots")
    untied = write_tiny_model(folder / "untied", tied=False)
    saving = {"save_strategy": "steps", "save_steps": STEPS, "max_steps": STEPS}
    wanted: list[dict[str, Any]] = [
        {"name": "zero3", "preset": "zero3"},
        {"name": "zero3 untied", "preset": "zero3", "model": str(untied)},
        {"name": "zero3+lora", "preset": "zero3+lora"},
        {"name": "zero2", "preset": "zero2"},
        {"name": "zero1", "preset": "zero1"},
        {"name": "lora_zero2", "preset": "lora_zero2"},
        {"name": "stage 0", "preset": None, "args": {"deepspeed": STAGE0}},
    ]
    for name in RESTORED:
        snapshot = folder / name / "snapshots" / f"step-{STEPS}"
        wanted.append({"name": f"{name} restored", "preset": name, "restore": str(snapshot), "args": {"max_steps": 1}})
    wanted.sort(key=lambda run: not str(run["preset"]).startswith("zero3"))
    for run in wanted:
        run |= {"weights": True, "stream": True, "args": saving | run.get("args", {})}
        run["sends"], run["publishes"] = run["name"] in SENDING, run["name"] in PUBLISHING
    return train_all(folder, wanted)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize("name", RESTORED)
def test_a_snapshot_comes_back_into_a_live_model_bit_for_bit(name: str, runs: Runs) -> None:
    wanted, restored = runs.weights(name), runs.weights(f"{name} restored")
    trained = [key for key in wanted if ("lora" not in name) or "lora_" in key]
    assert trained
    assert [key for key in trained if not torch.equal(wanted[key], restored[key])] == []


@pytest.mark.distributed
@pytest.mark.parametrize("name", FULL)
def test_a_full_snapshot_is_the_gathered_weights_bit_for_bit(name: str, runs: Runs) -> None:
    live = runs.weights(name)
    written = tensors_of(runs.folder(name) / "snapshots" / f"step-{STEPS}")
    tied = {"lm_head.weight"} if "untied" not in name else set()
    assert written.keys() == live.keys() - tied
    for key, tensor in written.items():
        assert tensor.numel() > 0
        assert torch.equal(tensor, live[key]), key


@pytest.mark.distributed
@pytest.mark.parametrize("name", FULL)
def test_a_full_snapshot_is_what_the_trainer_saves_itself(name: str, runs: Runs) -> None:
    snapshot = tensors_of(runs.folder(name) / "snapshots" / f"step-{STEPS}")
    checkpoint = tensors_of(runs.folder(name) / f"checkpoint-{STEPS}")
    for key, tensor in snapshot.items():
        assert torch.equal(tensor, checkpoint[key]), key


@pytest.mark.distributed
@pytest.mark.parametrize("name", FULL)
def test_a_full_snapshot_loads_and_tied_weights_stay_tied(name: str, runs: Runs) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs.folder(name) / "snapshots" / f"step-{STEPS}")
    shared = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert shared == ("untied" not in name)
    for key, tensor in runs.weights(name).items():
        assert torch.equal(model.state_dict()[key], tensor), key


@pytest.mark.distributed
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_snapshot_is_the_trained_adapter_and_nothing_else(name: str, runs: Runs) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = runs.folder(name) / "snapshots" / f"step-{STEPS}"
    written = load_file(folder / "adapter_model.safetensors")
    live = {key: tensor for key, tensor in runs.weights(name).items() if "lora_" in key}
    assert len(written) == len(live) == 28
    assert all(tensor.numel() for tensor in written.values())
    assert any(tensor.abs().max() > 0 for key, tensor in written.items() if "lora_B" in key), "nothing was learnt"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs.model), str(folder)).state_dict()
    for key, tensor in live.items():
        assert torch.equal(loaded[key], tensor), key


@pytest.mark.distributed
@pytest.mark.parametrize("name", ADAPTERS)
def test_training_adapters_leaves_the_base_alone(name: str, runs: Runs) -> None:
    base = tensors_of(runs.model)
    for key, tensor in runs.weights(name).items():
        plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" not in key and plain in base:
            assert torch.equal(tensor, base[plain]), key


@pytest.mark.distributed
@pytest.mark.parametrize("name", FULL)
def test_the_stream_of_every_rank_is_the_snapshot_bit_for_bit(name: str, runs: Runs) -> None:
    written = tensors_of(runs.folder(name) / "snapshots" / f"step-{STEPS}")
    for streamed in runs.streamed(name):
        assert streamed.keys() == written.keys()
        for key, tensor in written.items():
            assert torch.equal(streamed[key], tensor), key


@pytest.mark.distributed
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_stream_of_an_adapted_model_is_what_peft_merges(name: str, runs: Runs) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = runs.folder(name) / "snapshots" / f"step-{STEPS}"
    base = tensors_of(runs.model)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs.model), str(folder)).merge_and_unload()
    wanted = {key: tensor for key, tensor in merged.state_dict().items() if key != "lm_head.weight"}
    for streamed in runs.streamed(name):
        assert streamed.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(streamed[key], tensor), key
    assert sum(not torch.equal(streamed[key], base[key]) for key in wanted) == 14, "the adapters are in it"


@pytest.mark.distributed
@pytest.mark.parametrize("name", SENDING)
def test_a_send_brings_all_weights_or_fails_on_every_rank_with_the_same_words(name: str, runs: Runs) -> None:
    main, other = runs.sends(name)
    assert main.keys() == other.keys()
    for case in ("ipc", "nccl", "two GPUs"):
        assert main[case] == {"path": case if case != "two GPUs" else "ipc", "whole": True, "marked": False,
                              "arrived": True}, case  # fmt: skip
        assert other[case] == {"path": main[case]["path"]}
    failures = [case for case in main if case not in ("ipc", "nccl", "two GPUs")]
    assert len(failures) == 13
    said = {"rank 1 fails": "no handle for this memory", "elsewhere": "no trainer's process is on GPU-7"}
    for case in failures:
        reason = said.get(case) or f"{case.split()[-1]} was told to fail"
        assert "step 3: the weights could not be streamed to vLLM: " in main[case]["error"]
        assert reason in main[case]["error"], case
        assert other[case]["error"] == main[case]["error"]
        assert main[case]["marked"] == ("/init" not in case and case != "elsewhere"), case


@pytest.mark.distributed
@pytest.mark.parametrize("name", SENDING)
def test_no_rank_exports_memory_that_nobody_will_open(name: str, runs: Runs) -> None:
    for found in runs.sends(name):
        assert found["two GPUs: /update_weights"]["exports"] == 1, "the bucket that was refused, and none after it"
        assert found["elsewhere"]["exports"] == 0


@pytest.mark.distributed
@pytest.mark.parametrize("name", PUBLISHING)
def test_what_is_streamed_to_files_is_what_transformers_writes_from_the_whole_model(name: str, runs: Runs) -> None:
    folder = runs.folder(name) / "published"
    whole, streamed = folder / "whole" / "snapshots" / "step-1", folder / "streamed" / "snapshots" / "step-1"
    wanted, found = tensors_of(whole), tensors_of(streamed)
    live = runs.weights(name)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], tensor), key
        assert torch.equal(found[key], live[key].bfloat16()), key
    assert {file.name: file.read_bytes() for file in whole.glob("*.json")} == {
        file.name: file.read_bytes() for file in streamed.glob("*.json")
    }


@pytest.mark.distributed
@pytest.mark.parametrize("name", PUBLISHING)
def test_a_snapshot_that_fails_is_told_by_main_and_leaves_no_rank_waiting(name: str, runs: Runs) -> None:
    main, other = runs.published(name)
    said = {
        "folder": "OSError: [Errno 28] No space left on device",
        "config": "OSError: [Errno 28] No space left on device",
        "first write": r"model.safetensors cannot be written: No space left on device; free some space on its disk.",
        "later write": r"model.safetensors cannot be written: No space left on device; free some space on its disk.",
        "not cast": "RuntimeError: this was not expected",
        "renamed": "OSError: [Errno 28] No space left on device",
    }
    folder = runs.folder(name) / "published"
    for case, words in said.items():
        assert words in main[case], case
        assert other[case] is None, case
        assert not list(folder.glob(f"{case}/snapshots/*step*")), case
    for case in ("whole", "streamed", "after all"):
        assert main[case] is other[case] is None, case
    assert main["sharded"] == other["sharded"] == [], "everything that was gathered was let go"
    after = tensors_of(folder / "after all" / "snapshots" / "step-1")
    assert all(torch.equal(after[key], tensor.bfloat16()) for key, tensor in runs.weights(name).items() if key in after)


@pytest.mark.distributed
def test_no_more_than_a_bucket_is_whole_while_a_snapshot_is_written(runs: Runs) -> None:
    sizes = runs.published("zero3 untied")[0]["buckets"]
    live = runs.weights("zero3 untied")
    total = sum(tensor.numel() * tensor.element_size() for tensor in live.values())
    layer = sum(tensor.numel() * tensor.element_size() for name, tensor in live.items() if ".layers.0." in name)
    assert len(sizes) >= 4
    assert 0 < max(sizes) <= 1.5 * layer < total / 2


def load_tiny(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(write_tiny_model(folder))


def test_a_snapshot_in_16_bit_says_so_in_its_configuration(tmp_path: Path) -> None:
    model = load_tiny(tmp_path / "model")
    snapshot = publish(model, tmp_path / "run", step=3, dtype=torch.bfloat16)
    written = tensors_of(snapshot.path)
    assert json.loads((snapshot.path / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    for key, tensor in model.state_dict().items():
        if key in written:
            assert torch.equal(written[key], tensor.to(torch.bfloat16)), key


def test_the_newest_snapshot_is_pointed_to_and_the_same_step_is_replaced(tmp_path: Path) -> None:
    model = load_tiny(tmp_path / "model")
    publish(model, tmp_path / "run", step=3, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(7.0)
    snapshot = publish(model, tmp_path / "run", step=3, dtype=torch.float32)
    assert tensors_of(snapshot.path)["model.norm.weight"].unique().tolist() == [7.0]
    latest = json.loads((tmp_path / "run" / "snapshots" / "latest.json").read_text(encoding="utf-8"))
    assert latest == {"path": "step-3", "step": 3, "kind": "full", "trained_to": 3}
    assert [folder.name for folder in (tmp_path / "run" / "snapshots").glob("*step*")] == ["step-3"]


def test_empty_tensors_are_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny(tmp_path / "model")
    model.model.norm.weight = torch.nn.Parameter(torch.empty(0))
    for alone in (True, False):
        monkeypatch.setattr(full_model, "changes_names_alone", lambda *_, alone=alone: alone)
        with pytest.raises(ExportError, match=r"1 tensors are empty after gathering.*'model\.norm\.weight'"):
            publish(model, tmp_path / "run", step=3, dtype=torch.float32)
        assert not list((tmp_path / "run").rglob("*step*"))


def test_prune_keeps_what_is_named_the_newest_and_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    for step in (1, 2, 3, 4, 5):
        (folder / f"step-{step}").mkdir(parents=True)
    (folder / "latest.json").write_text('{"path": "step-5", "step": 5, "kind": "full"}', encoding="utf-8")
    (folder / "best.json").write_text('{"path": "step-2", "step": 2, "kind": "full"}', encoding="utf-8")
    prune(tmp_path, keep=[Path("step-4")])
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-2", "step-4", "step-5"]


def test_prune_without_pointers_or_folder_does_no_harm(tmp_path: Path) -> None:
    prune(tmp_path, keep=[])
    (tmp_path / "snapshots" / "step-1").mkdir(parents=True)
    (tmp_path / "snapshots" / "best.json").write_text("{ half", encoding="utf-8")
    prune(tmp_path, keep=[Path("step-1")])
    assert (tmp_path / "snapshots" / "step-1").is_dir()


def test_prune_deletes_nothing_and_raises_nothing_where_a_pointer_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "snapshots"
    for step in (1, 2):
        (folder / f"step-{step}").mkdir(parents=True)
    (folder / "best.json").write_text('{"path": "step-1"}', encoding="utf-8")
    (folder / "latest.json").write_text('{"path": "step-2"}', encoding="utf-8")
    read = Path.read_text

    def stale(path: Path, **how: Any) -> str:
        if path.name == "best.json":
            raise OSError(116, "Stale file handle")
        return read(path, **how)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", stale)
        prune(tmp_path, keep=[])
        patched.setattr(Path, "glob", lambda *_: stale(folder / "best.json"))
        prune(tmp_path, keep=[])
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-1", "step-2"]
    assert "no older snapshot is deleted" in capsys.readouterr().err
    (folder / "best.json").write_text("{ half", encoding="utf-8")
    prune(tmp_path, keep=[])
    assert (folder / "step-1").is_dir()
    (folder / "best.json").unlink()
    prune(tmp_path, keep=[])
    assert [path.name for path in folder.glob("step-*")] == ["step-2"]
