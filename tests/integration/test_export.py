"""`export_model` end to end on tiny random models: what it writes loads, equals the trained model, and fails hard."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from hf_dsvllm import export as export_module
from hf_dsvllm import layout as layout_module
from hf_dsvllm import shards as shards_module
from hf_dsvllm import weights as weights_module
from hf_dsvllm.claim import claimed
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export import REPORT, export_model
from hf_dsvllm.fingerprint import fingerprint
from hf_dsvllm.fourbit import dequantised_base, quantised_weights
from hf_dsvllm.manifest import MANIFEST, check_manifest
from tests.tiny import write_tiny_model

NF4 = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def write_wide_base(folder: Path) -> Path:
    """Hidden 256, so that a weight has many 4-bit blocks; with a tokenizer."""
    write_tiny_model(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def move(model: PeftModel, *, std: float) -> PeftModel:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def write_run(
    folder: Path, base: Path, *, quantization: dict[str, object] | None = None, std: float = 0.02, step: int = 4
) -> Path:
    """A run folder as the training callback leaves it, with one adapter snapshot."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    move(get_peft_model(model, settings), std=std).save_pretrained(folder / "snapshots" / f"step-{step}")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "tokenizer")
    pointer = {"path": f"step-{step}", "step": step, "kind": "adapter"}
    (folder / "snapshots" / "latest.json").write_text(json.dumps(pointer))
    record = {"base_model": str(base), "preset": "lora", "adapter": "qlora" if quantization else "lora"}
    record |= {"quantization": quantization, "dtype": "bfloat16", "versions": {}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", write_tiny_model(tmp_path / "base", dtype="bfloat16"))


def export(source: Path, out: Path, **settings: object) -> object:
    return export_model(source, out, progress=False, **settings)


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits.float()


def nothing_finished(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}.*"))


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


def test_the_manifest_and_the_card_say_what_was_made_from_what(run: Path, tmp_path: Path) -> None:
    (run / "evals").mkdir()
    scores = {"step": 4, "scores": {"eval_gen_test_exact": 0.75}, "standard_errors": {"eval_gen_test_exact": 0.02}}
    (run / "evals" / "scores.jsonl").write_text(json.dumps(scores))
    export(run, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert set(manifest["made_from"]) == {"base", "adapter", "tokenizer", "settings"}
    digest = hashlib.sha256((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["made_from"]["base"]["model.safetensors"] == digest
    assert set(manifest["result"]) == {file.name for file in (tmp_path / "out").iterdir()} - {MANIFEST}
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert "| test_exact | 0.75 | 0.02 |" in card
    assert "| preset | lora |" in card
    assert str(tmp_path) not in card


def test_two_exports_to_one_folder_at_a_time_are_refused(run: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "out"), pytest.raises(ExportError, match="Another process is exporting"):
        export(run, tmp_path / "out")
    assert not export(run, tmp_path / "out").reused


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


def test_a_base_given_by_hand_that_holds_the_same_weights_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    report = export(run, tmp_path / "out", base=str(tmp_path / "moved"))
    assert report.base == str(tmp_path / "moved")
    assert any("nothing on this machine tells" in note for note in report.notes)


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

    monkeypatch.setattr(shards_module, "_write_exactly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out")
    assert nothing_finished(tmp_path / "out")


def test_an_export_killed_at_any_moment_never_looks_finished(run: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "kill_exports.py"
    command = [sys.executable, str(script), str(run), str(tmp_path / "out"), "20", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
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

    monkeypatch.setattr(shards_module, "_write_exactly", interrupted)
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


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="Nothing to export"):
        export(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ExportError, match="is no folder"):
        export(tmp_path / "typo", tmp_path / "out")
