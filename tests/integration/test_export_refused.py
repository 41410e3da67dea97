"""What must not become an export (damage, wrong bases, lost deltas, kills): one clear error, and nothing is left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export import layout as layout_module
from hf_dsvllm.export import make as export_module
from hf_dsvllm.export.claim import claimed
from hf_dsvllm.export.fingerprint import fingerprint
from hf_dsvllm.export.make import REPORT
from hf_dsvllm.export.manifest import MANIFEST
from hf_dsvllm.tensors import shard_file
from hf_dsvllm.tensors import weights as weights_module
from tests.export_runs import NF4, export, move, nothing_finished, run, write_run, write_wide_base
from tests.tiny import write_tiny_model

__all__ = ["run"]  # a fixture


def test_an_export_that_was_changed_afterwards_is_not_reused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, out)
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ExportError, match=r"other contents \['model.safetensors'\]"):
        export(run, out)
    weights.write_bytes(whole)
    (out / "chat_template.jinja").unlink()
    with pytest.raises(ExportError, match=r"missing \['chat_template.jinja'\]"):
        export(run, out)
    (out / MANIFEST).unlink()
    with pytest.raises(ExportError, match="no finished export"):
        export(run, out)
    assert not export(run, out, overwrite=True).reused


def test_two_exports_to_one_folder_at_a_time_are_refused(run: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "out"), pytest.raises(ExportError, match="Another process is exporting"):
        export(run, tmp_path / "out")
    assert not export(run, tmp_path / "out").reused


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "saved modules"), ({"bias": "all"}, "biases")],
)
def test_an_adapter_that_vllm_cannot_serve_is_not_written_as_one(
    tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    if "bias" in settings:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **settings)
    move(get_peft_model(model, adapted), std=0.05).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=named):
        export(tmp_path / "adapter", tmp_path / "out", format="adapter")


def test_a_qlora_adapter_alone_needs_the_users_word(tmp_path: Path) -> None:
    base = write_wide_base(tmp_path / "base")
    run = write_run(tmp_path / "run", base, quantization=NF4)
    with pytest.raises(ExportError, match="--base original"):
        export(run, tmp_path / "out", format="adapter")
    with pytest.raises(ExportError, match="needs an adapter"):
        export(base, tmp_path / "out", format="adapter")


def swap(tensors: dict[str, torch.Tensor]) -> None:
    one, other = "model.embed_tokens.weight", "lm_head.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def lose_a_delta(tensors: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"] = base["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize("what", ["swapped tied weights", "a dropped delta"])
def test_tensors_that_are_wrong_on_disk_are_caught_by_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj", "lm_head"])
    move(get_peft_model(model, settings), std=0.2).save_pretrained(tmp_path / "adapter")

    def written(folder: Path, *_: object) -> None:
        tensors = load_file(folder / "model.safetensors")
        if what == "a dropped delta":
            lose_a_delta(tensors, load_file(base / "model.safetensors"))
        else:
            swap(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "_check_written", written)
    with pytest.raises(ExportError, match="differs from the trained one"):
        export(tmp_path / "adapter", tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


def test_a_full_model_that_was_saved_empty_is_one_clear_error(tmp_path: Path) -> None:
    checkpoint = write_tiny_model(tmp_path / "checkpoint-3")
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor[:0] for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
    with pytest.raises(ExportError, match=r"empty tensors such as .*without gathering"):
        export(checkpoint, tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


def test_a_folder_that_is_no_export_is_never_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="no export of hf-dsvllm"):
        export(run, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def truncate_base(run: Path, base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_shard(run: Path, base: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base / "new", max_shard_size="64KB")
    (base / "model.safetensors").unlink()
    for file in (base / "new").glob("model*"):
        shutil.move(file, base)
    sorted(base.glob("model-*.safetensors"))[1].unlink()


def widen_base(run: Path, base: Path) -> None:
    config = LlamaConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config.vocab_size = 320
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)


def lose_the_chat_template(run: Path, base: Path) -> None:
    (run / "tokenizer" / "chat_template.jinja").unlink()


def poison_the_adapter(run: Path, base: Path) -> None:
    path = run / "snapshots" / "step-4" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)


def remove_the_base(run: Path, base: Path) -> None:
    shutil.rmtree(base)


def quantise_the_base(run: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_base, "truncated"),
        (lose_a_shard, "absent from that folder"),
        (widen_base, "another base"),
        (lose_the_chat_template, "chat template"),
        (poison_the_adapter, "NaN"),
        (remove_the_base, "--base"),
        (quantise_the_base, "stored quantised"),
    ],
)
def test_damage_is_one_clear_error_and_leaves_nothing(
    run: Path, tmp_path: Path, damage: Callable[[Path, Path], None], message: str
) -> None:
    damage(run, tmp_path / "base")
    with pytest.raises(ExportError, match=message):
        export(run, tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


@pytest.mark.parametrize("times", [0, 2], ids=["dropped", "applied twice"])
def test_a_delta_dropped_or_applied_twice_is_caught_by_the_logits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    apply = layout_module.Adapter.apply

    def wrong(
        self: layout_module.Adapter, update: layout_module.Update, base: torch.Tensor, *more: object
    ) -> torch.Tensor:
        return base.float() + times * (apply(self, update, base, *more) - base.float())

    monkeypatch.setattr(layout_module.Adapter, "apply", wrong)
    with pytest.raises(ExportError, match="differs from the trained one"):
        export(run, tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


def test_another_base_of_the_same_shape_is_caught(run: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=9, dtype="bfloat16")
    with pytest.raises(ExportError, match="is not the base that was trained"):
        export(run, tmp_path / "out", base=str(other))
    record_fingerprint(run, tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ExportError, match="its weights differ from those on record"):
        export(run, tmp_path / "out", base=str(other))
    shutil.copytree(other, tmp_path / "base")
    with pytest.raises(ExportError, match="overwritten since"):
        export(run, tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


def record_fingerprint(run: Path, base: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"base_fingerprint": fingerprint(base)}))


def test_an_adapter_that_was_trained_on_another_base_is_caught(run: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=9, dtype="bfloat16")
    stranger = write_run(tmp_path / "stranger", other)
    shutil.rmtree(run / "snapshots" / "step-4")
    shutil.copytree(stranger / "snapshots" / "step-4", run / "snapshots" / "step-4")
    with pytest.raises(ExportError, match="was trained on another base"):
        export(run, tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


def test_an_interrupted_write_leaves_nothing_finished(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_file, "_write_exactly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


def test_an_export_killed_at_any_moment_never_looks_finished(run: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "kill_exports.py"
    command = [sys.executable, str(script), str(run), str(tmp_path / "out"), "20", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["before"] + told["after"] == 20
    assert told["before"] >= 1  # all but surely most of the ten that began with nothing at their target
    assert (told["left"], told["reused"]) == ([], False)


def test_an_interrupted_overwrite_keeps_the_old_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run, tmp_path / "out")
    before = (tmp_path / "out" / REPORT).read_text()
    write_run(run, tmp_path / "base", std=0.03)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_file, "_write_exactly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / REPORT).read_text() == before


def test_a_full_disk_is_said_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weights_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ExportError, match="free"):
        export(run, tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


def test_too_little_memory_skips_the_comparison_and_the_report_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    report = export(run, tmp_path / "out")
    assert report.verification is None
    assert "memory" in report.verification_skipped
    assert any(remark.startswith("not compared with what was trained: ") for remark in report.remarks)
    assert export(run, tmp_path / "out").reused, "there is no better proof to be had yet"
    monkeypatch.setattr(export_module, "find_vllm", lambda *_, **__: Path("python"))
    with pytest.raises(ExportError, match="--prove_in_vllm compares vLLM with the trained model"):
        export(run, tmp_path / "other", prove_in_vllm=True)
    assert nothing_finished(tmp_path / "other")
    monkeypatch.undo()
    proven = export(run, tmp_path / "out")
    assert not proven.reused, "it can be proven now, so it is made again"
    assert proven.verification.passed
    assert export(run, tmp_path / "out").reused


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="Nothing to export"):
        export(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ExportError, match="is no folder"):
        export(tmp_path / "typo", tmp_path / "out")
