"""DeepSpeed checkpoints without gathered weights become exports bit-equal to DeepSpeed's conversion, rounded once."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.make import export_model
from hf_dsvllm.tensors.zero_adapter import write_adapter
from hf_dsvllm.tensors.zero_checkpoint import ZeroCheckpoint
from tests.conftest import torchrun
from tests.tiny import write_tiny_model, write_tiny_tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "zero_checkpoints.py"
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
CASES = {
    "stage 1": {"stage": 1, "base": "base"},
    "stage 2": {"stage": 2, "base": "base"},
    "stage 3": {"stage": 3, "base": "base"},
    "mixture of experts, stage 3": {"stage": 3, "base": "mixture"},
    "adapter, stage 3": {"stage": 3, "base": "untied", "adapter": ADAPTER},
    "resized, stage 3": {
        "stage": 3,
        "base": "base",
        "adapter": {"r": 4, "target_modules": ["q_proj"]},
        "vocab_size": 336,
    },
}
FULL = [name for name, case in CASES.items() if "adapter" not in case]


def write_mixture(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=320, num_experts=4, num_experts_per_tok=2, pad_token_id=3,
        initializer_range=0.15,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return write_tiny_tokenizer(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bases and, for each case, a checkpoint of two ranks and what DeepSpeed makes of it."""
    root = tmp_path_factory.mktemp("zero")
    write_tiny_model(root / "base", dtype="bfloat16")
    write_tiny_model(root / "untied", dtype="bfloat16", tied=False)
    write_mixture(root / "mixture")
    spec = [case | {"name": name, "base": str(root / case["base"]), "out": str(root / name)}
            for name, case in CASES.items()]  # fmt: skip
    (root / "spec.json").write_text(json.dumps(spec))
    done = torchrun(SCRIPT, nproc=2, args=[str(root / "spec.json")], timeout=400, env={})
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.distributed
@pytest.mark.parametrize("name", FULL)
def test_a_partitioned_checkpoint_is_exported_bit_equal_to_deepspeeds_conversion(
    name: str, made: Path, tmp_path: Path
) -> None:
    base = made / CASES[name]["base"]
    report = export_model(made / name, tmp_path / "out", base=str(base), progress=False)
    assert (report.kind, report.step) == ("zero", 1)
    assert report.verification is not None
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    truth = load_file(made / name / "truth.safetensors")
    for parameter, master in truth.items():
        assert torch.equal(found[parameter], master.to(torch.bfloat16)), parameter
    assert set(found) - set(truth) <= {"lm_head.weight"}
    written, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert written.keys() == original.keys()
    assert not torch.equal(written["model.norm.weight"], original["model.norm.weight"])
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.distributed
def test_an_adapter_left_in_the_partitions_is_exported(made: Path, tmp_path: Path) -> None:
    case = made / "adapter, stage 3"
    saved = write_adapter(case / "checkpoint-1", tmp_path)
    found = load_file(saved / "adapter_model.safetensors")
    truth = load_file(case / "truth.safetensors")
    assert len(found) == 2 * 2 * 2 + 1
    for name in found:
        inside = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        inside = inside.replace("lm_head.", "lm_head.modules_to_save.default.")
        assert torch.equal(found[name], truth[inside]), name
    report = export_model(case, tmp_path / "out", progress=False)
    assert report.kind == "zero_adapter"
    assert report.verification is not None
    assert report.verification.adapter_share == pytest.approx(1, abs=0.05)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made / "untied", dtype=torch.float32), saved
    )
    merged = loaded.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor.float(), merged[name], rtol=2**-7, atol=1e-6)


@pytest.mark.distributed
def test_embeddings_that_were_resized_are_exported_or_missed(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "resized, stage 3" / "checkpoint-1", tmp_path / "checkpoint-1")
    report = export_model(tmp_path, tmp_path / "out", progress=False)
    assert report.verification is not None
    truth = load_file(made / "resized, stage 3" / "truth.safetensors")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.vocab_size == 336
    embeddings = truth["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(found.get_input_embeddings().weight, embeddings.to(torch.bfloat16))
    assert torch.equal(found.get_output_embeddings().weight, embeddings.to(torch.bfloat16))

    for file in (tmp_path / "checkpoint-1" / "global_step1").glob("*_model_states.pt"):  # as the Trainer saves them
        state = torch.load(file, weights_only=False)
        torch.save(state | {"frozen_param_shapes": None, "frozen_param_fragments": None}, file)
    with pytest.raises(ExportError, match=r"lm_head\.weight, are empty there and in no partition"):
        export_model(tmp_path, tmp_path / "lost", progress=False)
    assert not (tmp_path / "lost").exists()


@pytest.mark.distributed
def test_a_rank_without_its_model_states_is_noticed(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "resized, stage 3" / "checkpoint-1", tmp_path / "checkpoint-1")
    lost = sorted((tmp_path / "checkpoint-1" / "global_step1").glob("*_model_states.pt"))[1]
    lost.unlink()
    with pytest.raises(ExportError, match=f"saved by 2 ranks and lacks 1 of their 4 files, such as {lost.name}"):
        ZeroCheckpoint(tmp_path / "checkpoint-1")


@pytest.mark.distributed
def test_one_piece_of_a_partitioned_parameter_is_read_alone(made: Path) -> None:
    truth = load_file(made / "stage 3" / "truth.safetensors")
    with ZeroCheckpoint(made / "stage 3" / "checkpoint-1") as tensors:
        assert set(truth) - set(tensors.names) <= {"lm_head.weight"}  # tied: once is enough
        for name in tensors.names:
            master = truth[name]
            end = master.numel() * 2 // 3
            assert torch.equal(tensors.flat(name, 5, end), master.reshape(-1)[5:end]), name


@pytest.mark.distributed
def test_damaged_checkpoints_are_refused(made: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(made / "stage 2" / "checkpoint-1", checkpoint)
    parts = sorted((checkpoint / "global_step1").glob("*_optim_states.pt"))
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match="truncated"):
        ZeroCheckpoint(checkpoint)
    parts[1].unlink()
    with pytest.raises(ExportError, match=f"lacks 1 of their 3 files, such as {parts[1].name}: copy"):
        ZeroCheckpoint(checkpoint)
    (checkpoint / "config.json").unlink()
    parts[1].write_bytes(whole)
    with pytest.raises(ExportError, match=r"config\.json"):
        export_model(tmp_path, tmp_path / "out", progress=False)
    report = export_model(tmp_path, tmp_path / "out", base=str(made / "base"), progress=False)
    assert report.verification is not None


class Trap:
    """A pickle that would run code where it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the checkpoint ran code')",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    folder = tmp_path / "global_step1"
    folder.mkdir()
    states = {"optimizer_state_dict": Trap()}
    torch.save(states, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", pickle_module=pickle)
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ExportError, match="cannot be read as a ZeRO checkpoint"):
        ZeroCheckpoint(tmp_path)


def test_an_adapter_file_that_is_whole_is_read_before_any_partitions(tmp_path: Path) -> None:
    from hf_dsvllm.export.source import find_source

    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "global_step1").mkdir()
    assert find_source(tmp_path, "final").kind == "zero_adapter"
    save_file({"w": torch.empty(0)}, tmp_path / "adapter_model.safetensors")
    assert find_source(tmp_path, "final").kind == "zero_adapter"
    save_file({"w": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert find_source(tmp_path, "final").kind == "adapter"
