"""`export_model` end to end on tiny random models: what it writes loads and equals the trained model."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from blake3 import blake3
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_dsvllm.ending import export_last
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export import make as make_module
from hf_dsvllm.export import merge as merge_module
from hf_dsvllm.export import verify as verify_module
from hf_dsvllm.export.adapter_format import why_merge_live
from hf_dsvllm.export.make import REPORT
from hf_dsvllm.export.manifest import MANIFEST, check_manifest
from hf_dsvllm.live.restore import restore
from hf_dsvllm.live.snapshot import Snapshot, publish
from hf_dsvllm.session import Session
from hf_dsvllm.tensors.fourbit import dequantised_base, quantised_weights
from tests.export_runs import NF4, export, logits, move, nothing_finished, run, write_run, write_wide_base
from tests.tiny import write_tiny_model

__all__ = ["run"]  # a fixture


def test_a_run_becomes_a_folder_that_transformers_loads(run: Path, tmp_path: Path) -> None:
    report = export(run, tmp_path / "out")
    assert report.kind == "adapter"
    assert report.step == 4
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.adapter_share == pytest.approx(1, abs=0.05)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run / "tokenizer").chat_template
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert json.loads((tmp_path / "out" / REPORT).read_text())["inputs"] == report.inputs


def test_an_adapter_on_the_hub_is_exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert {"*.json", "*.jinja"} <= set(allow_patterns)
        if name == "me/private":
            raise OSError("401 Client Error")
        return str(run / "snapshots" / "step-4")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    report = export("me/orders-lora", tmp_path / "out", base=str(tmp_path / "base"))
    assert (report.kind, report.verification.passed) == ("adapter", True)
    with pytest.raises(ExportError, match=r"me/private is neither a folder nor a repository .*401 Client Error"):
        export("me/private", tmp_path / "other")
    with pytest.raises(ExportError, match=r"run/snapshot is no folder"):  # a slip of the pen is not looked up
        export("run/snapshot", tmp_path / "other")
    assert asked == ["me/orders-lora", "me/orders-lora", "me/private"], "small files first, then the weights"


def test_every_file_of_the_tokenizer_reaches_the_export(run: Path, tmp_path: Path) -> None:
    (run / "tokenizer" / "additional_chat_templates").mkdir()
    more = ("additional_chat_templates/tool_use.jinja", "sentencepiece.bpe.model")
    for name in more:
        (run / "tokenizer" / name).write_text("{{ messages }}")
    export(run, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == "{{ messages }}" for name in more)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert set(more) <= set(manifest["result"])
    assert set(more) <= set(manifest["made_from"]["tokenizer"])
    check_manifest(tmp_path / "out")
    (tmp_path / "out" / more[0]).write_text("another")
    with pytest.raises(ExportError, match=more[0]):
        check_manifest(tmp_path / "out")


def record_training(run: Path, **tokens: int | None) -> None:
    """What a run writes when training begins, after TRL's `eos_token` and `align_special_tokens` changed the model."""
    model = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    model.generation_config.top_k = 7
    for key, value in tokens.items():
        setattr(model.config, key, value)
        setattr(model.generation_config, key, [value, 0] if key == "eos_token_id" else value)
    trainer = SimpleNamespace(
        model=get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])),
        train_dataset=Dataset.from_list([{"text": "a"}] * 1200),
        state=SimpleNamespace(global_step=1), processing_class=None,
    )  # fmt: skip
    names = SimpleNamespace(
        model_name_or_path=run.parent / "base", dtype="auto", use_peft=True, load_in_4bit=False, model_revision="main"
    )
    session = SimpleNamespace(
        run_dir=run, model_args=names, args=SimpleNamespace(ds_preset="lora"), device="cpu", forecast=None,
        ds_config=None, _predicted_gib=lambda: None,
    )  # fmt: skip
    wiring = SimpleNamespace(world_size=1, zero_stage=0, trainable_parameters=1)
    Session.start_record(session, trainer, wiring)


def test_an_export_stops_where_training_taught_it_to(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run, tmp_path / "before")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.pop("bos_token_id")  # Llama's own is 1
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    record_training(run, eos_token_id=1, pad_token_id=2, bos_token_id=None)
    export(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [getattr(model.config, f"{key}_token_id") for key in ("eos", "pad", "bos")] == [1, 2, None]
    assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([1, 0], 7)
    assert "| examples | 1,200 |" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ExportError, match=r"other inputs \(.*generation differ"):
        export(run, tmp_path / "before")
    monkeypatch.setattr(make_module, "with_special_tokens", lambda config, _: config)
    with pytest.raises(ExportError, match=r" eos_token_id=\d+ instead of 1"):
        export(run, tmp_path / "wrong")


def test_another_generation_config_of_the_base_is_another_input(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": 3}))
    with pytest.raises(ExportError, match=r"generation_config\.json differ"):
        export(run, tmp_path / "out")


def test_an_export_is_merged_and_proven_in_fp32_after_training_in_tf32(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    for module, name in ((merge_module.Adapter, "apply"), (verify_module, "_logits")):
        original = getattr(module, name)

        def noting(*words: object, original: Callable[..., object] = original) -> object:
            seen.add(torch.backends.cuda.matmul.fp32_precision)
            return original(*words)

        monkeypatch.setattr(module, name, noting)
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")  # what `--tf32 true` does in transformers 5.19
    assert export(run, tmp_path / "out").verification.passed
    assert seen == {"ieee"}


def test_vllm_starts_once_the_compared_models_are_gone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[object]] = []
    told: list[str] = []
    load = verify_module._load_export

    def loading(*words: object) -> object:
        model = load(*words)
        model.itself = [model]  # as wrappers do: freed by the collector alone
        models.append(weakref.ref(model))
        return model

    def start(*_: object, **__: object) -> None:
        told.append("gone" if models[0]() is None else "alive")

    monkeypatch.setattr(verify_module, "_load_export", loading)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("cache emptied"))
    monkeypatch.setattr(make_module, "find_vllm", lambda *_, **__: Path("python"))
    monkeypatch.setattr(make_module, "in_vllm", start)
    export(run, tmp_path / "out", prove_in_vllm=True)
    assert told == ["cache emptied", "gone"]


def test_shards_are_written_and_read_back(run: Path, tmp_path: Path) -> None:
    whole = export(run, tmp_path / "whole")
    parts = export(run, tmp_path / "parts", max_shard_size_bytes=64 << 10)
    assert whole.shards == 1
    assert parts.shards > 2
    again = export(run, tmp_path / "again", base=str(tmp_path / "base"), max_shard_size_bytes=64 << 10)
    assert again.inputs == parts.inputs
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_a_sharded_base_gives_the_same_export(run: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="64KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    export(run, tmp_path / "one")
    export(run, tmp_path / "two", base=str(tmp_path / "sharded"))
    assert (tmp_path / "one" / "model.safetensors").stat().st_size > 0
    one, two = load_file(tmp_path / "one" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_qlora_quantises_exactly_what_the_trainer_held(tmp_path: Path) -> None:
    base = write_wide_base(tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **NF4)
    )
    written = load_file(dequantised_base(base, NF4, tmp_path / "dequantised") / "model.safetensors")
    import bitsandbytes

    checked = set()
    for name, module in live.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            held = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(held, written[f"{name}.weight"]), name
            checked.add(f"{name}.weight")
    assert checked == quantised_weights(base, NF4)
    assert len(checked) == 3 * 7
    original = load_file(base / "model.safetensors")
    assert all(torch.equal(original[name], written[name]) for name in original.keys() - checked)


def test_a_qlora_export_is_ten_times_closer_than_a_merge_into_four_bits(tmp_path: Path) -> None:
    base = write_wide_base(tmp_path / "base")
    run = write_run(tmp_path / "run", base, quantization=NF4)
    adapter = run / "snapshots" / "step-4"
    settings = NF4 | {"bnb_4bit_compute_dtype": "float32"}  # so that the comparison sees weights, not activations

    def live() -> PeftModel:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings)
        )
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        return PeftModel.from_pretrained(model, adapter)

    trained = logits(live())
    merged_in_4bit = (logits(live().merge_and_unload()) - trained).abs().mean()
    export(run, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    error = (logits(exported) - trained).abs().mean()
    assert error * 10 <= merged_in_4bit


def test_a_full_snapshot_and_a_checkpoint_are_exported(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    checkpoint = write_tiny_model(tmp_path / "output" / "checkpoint-7", seed=1)
    (checkpoint / "trainer_state.json").write_text("{}")  # what the Trainer writes last
    report = export(tmp_path / "output", tmp_path / "out", base=str(base))
    assert (report.kind, report.step) == ("full", 7)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_the_best_snapshot_is_taken_when_asked_for(run: Path, tmp_path: Path) -> None:
    write_run(run, tmp_path / "base", std=0.01, step=2)
    best = {"path": "step-4", "step": 4, "kind": "adapter"}
    (run / "snapshots" / "best.json").write_text(json.dumps(best))
    assert export(run, tmp_path / "best", which="best").step == 4
    assert export(run, tmp_path / "latest").step == 2


def test_a_run_ends_with_exports_of_its_last_and_its_best_snapshot(run: Path, tmp_path: Path) -> None:
    write_run(run, tmp_path / "base", std=0.01, step=8)
    last = Snapshot(path=run / "snapshots" / "step-8", kind="adapter", step=8)
    export_last(run, None, last)
    assert not (run / "export-best").exists()  # no score pointed to a snapshot
    (run / "snapshots" / "best.json").write_text(json.dumps({"path": "step-4", "step": 4, "kind": "adapter"}))
    export_last(run, None, last)
    steps = {name: json.loads((run / name / REPORT).read_text())["step"] for name in ("export", "export-best")}
    assert steps == {"export": 8, "export-best": 4}


def test_an_untied_export_says_so_and_loads(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    move(get_peft_model(model, settings), std=0.05).save_pretrained(tmp_path / "adapter")
    report = export(tmp_path / "adapter", tmp_path / "out")
    assert report.untied == ("lm_head.weight", "model.embed_tokens.weight")
    assert any("untied" in note for note in report.notes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_the_same_inputs_reuse_the_export_and_others_need_overwrite(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = export(run, out)
    second = export(run, out)
    assert not first.reused
    assert second.reused
    assert second.verification == first.verification
    write_run(run, tmp_path / "base", std=0.03)
    with pytest.raises(ExportError, match="--overwrite"):
        export(run, out)
    replaced = export(run, out, overwrite=True)
    check_manifest(out)
    assert replaced.inputs != first.inputs
    assert nothing_finished(tmp_path / "none")
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


def test_the_manifest_and_the_card_say_what_was_made_from_what(run: Path, tmp_path: Path) -> None:
    (run / "evals").mkdir()
    scores = {"step": 4, "scores": {"eval_gen_test_exact": 0.75}, "standard_errors": {"eval_gen_test_exact": 0.02}}
    (run / "evals" / "scores.jsonl").write_text(json.dumps(scores))
    export(run, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert set(manifest["made_from"]) == {"base", "adapter", "tokenizer", "settings"}
    digest = blake3((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["made_from"]["base"]["model.safetensors"] == digest
    assert set(manifest["result"]) == {file.name for file in (tmp_path / "out").iterdir()} - {MANIFEST}
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert "| test_exact | 0.75 | 0.02 |" in card
    assert "| preset | lora |" in card
    assert str(tmp_path) not in card


def test_a_qlora_adapter_on_the_original_weights_says_how_far_it_is(tmp_path: Path) -> None:
    base = write_wide_base(tmp_path / "base")
    run = write_run(tmp_path / "run", base, quantization=NF4)
    faithful = export(run, tmp_path / "faithful").verification
    report = export(run, tmp_path / "original", base="original")
    assert report.verification.mean_abs_difference > 3 * faithful.mean_abs_difference
    assert any("merged onto the original weights" in note and "of their spread" in note for note in report.notes)
    settings = load_file(tmp_path / "original" / "model.safetensors")
    assert torch.equal(
        settings["model.embed_tokens.weight"], load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    )
    plain = write_run(tmp_path / "plain", base)
    with pytest.raises(ExportError, match="QLoRA"):
        export(plain, tmp_path / "out", base="original")


def test_an_adapter_is_written_so_that_one_scale_and_rank_hold_for_all_layers(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 7}, alpha_pattern={"q_proj": 3},
    )  # fmt: skip
    move(get_peft_model(model, settings), std=0.3).save_pretrained(tmp_path / "adapter")
    report = export(tmp_path / "adapter", tmp_path / "out", format="adapter")
    assert (report.format, report.dtype) == ("adapter", "float32")
    assert report.verification.adapter_share == pytest.approx(1, abs=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (7, 7, {}, {})
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {7}
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(logits(found), logits(PeftModel.from_pretrained(trained, tmp_path / "adapter")))
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_a_base_given_by_hand_that_holds_the_same_weights_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    report = export(run, tmp_path / "out", base=str(tmp_path / "moved"))
    assert report.base == str(tmp_path / "moved")
    assert any("nothing on this machine tells" in note for note in report.notes)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_whose_embeddings_are_frozen_reach_the_export(tied: bool, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.resize_token_embeddings(328, mean_resizing=False)
    model = move(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")), std=0.02)
    assert "resized" in why_merge_live(model, 16)
    snapshot = publish(model, tmp_path / "run", step=3, dtype=torch.bfloat16)
    report = export(snapshot.path, tmp_path / "out", base=str(base))
    assert report.verification.passed
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.vocab_size == 328
    assert torch.equal(exported.get_input_embeddings().weight, model.get_input_embeddings().weight)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    restore(model, snapshot.path, "adapter")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
