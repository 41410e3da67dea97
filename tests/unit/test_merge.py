"""Every kind of LoRA adapter, merged from the files, equals PEFT's own fp32 merge to one bf16 step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.layout import Layout, merged_layout
from hf_dsvllm.export.merge import exact_products, read_adapter
from hf_dsvllm.export.naming import read_skeleton
from hf_dsvllm.tensors.weights import TensorFolder

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 120,
    "attention_bias": True,
    "initializer_range": 0.1,
}

KINDS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"down_proj": 32, "layers.0.self_attn.v_proj": 3},
    },
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "lora bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of adapted layers": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "saved output head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "embedding LoRA": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding DoRA": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "output head LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 50]},
}
UNTIED_BY_TRAINING = {
    "saved output head",
    "saved embedding",
    "embedding LoRA",
    "embedding DoRA",
    "output head LoRA",
    "both ends",
}


def write_base(folder: Path, *, tied: bool) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, *, vocab_size: int | None = None, **settings: object) -> Path:
    """An adapter whose every trainable tensor was moved, as training would."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, **settings))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.05 * parameter.detach().abs().mean() if "magnitude" in name else 0.05
            parameter.data += torch.randn_like(parameter) * scale
    model.save_pretrained(folder)
    return folder


def reference(base: Path, adapter: Path, vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    """PEFT's merge in fp32 on a base whose tied tensors were copied apart first, so that it cannot corrupt either."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    ties = read_adapter(adapter).config.get("trainable_token_indices")
    if not ties and hasattr(model, "lm_head"):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def merge(base: Path, adapter: Path) -> tuple[Layout, dict[str, torch.Tensor]]:
    with TensorFolder(base) as tensors:
        layout = merged_layout(
            base, tensors, read_adapter(adapter), base_dtype=None, dtype=torch.bfloat16, quantization=None
        )
        return layout, {planned.name: layout.produce(planned.name) for planned in layout.plan}


def bf16_steps(left: torch.Tensor, right: torch.Tensor) -> int:
    """Largest distance in representable bf16 numbers."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.to(torch.bfloat16).view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordered(left) - ordered(right)).abs().max())


def assert_equal_to_peft(base: Path, adapter: Path, vocab_size: int | None = None) -> Layout:
    layout, merged = merge(base, adapter)
    expected = reference(base, adapter, vocab_size)
    for name, tensor in merged.items():
        assert bf16_steps(tensor, expected[name]) <= 1, name
    for missing in expected.keys() - merged.keys():
        assert missing == "lm_head.weight"
        embedding = next(name for name in ("model.embed_tokens.weight", "transformer.wte.weight") if name in merged)
        assert bf16_steps(merged[embedding], expected[missing]) <= 1
    return layout


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_equals_pefts_fp32_merge(tmp_path: Path, kind: str, tied: bool) -> None:
    base = write_base(tmp_path / "base", tied=tied)
    adapter = write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    layout = assert_equal_to_peft(base, adapter)
    apart = tied and kind in UNTIED_BY_TRAINING
    assert layout.untied == (("lm_head.weight", "model.embed_tokens.weight") if apart else ())
    assert layout.config_changes == ({"tie_word_embeddings": False} if apart else {})


def test_embeddings_saved_together_stay_tied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    layout, merged = merge(base, write_adapter(base, tmp_path / "adapter", **settings))
    assert layout.untied == ()
    assert "lm_head.weight" not in merged
    assert "model.embed_tokens.weight" in layout.changed


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resized_embeddings_change_the_vocabulary(tmp_path: Path, tied: bool) -> None:
    base = write_base(tmp_path / "base", tied=tied)
    adapter = write_adapter(base, tmp_path / "adapter", vocab_size=128, target_modules=["q_proj"])
    layout = assert_equal_to_peft(base, adapter, vocab_size=128)
    assert layout.vocab_size == 128
    assert layout.untied == ()


def test_transposed_layers_are_merged_the_right_way_round(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=120, n_positions=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    for dora in (False, True):
        folder = tmp_path / f"adapter-{dora}"
        settings = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": dora}
        assert_equal_to_peft(tmp_path / "base", write_adapter(tmp_path / "base", folder, **settings))


MIXTURES = {
    "Qwen3": Qwen3MoeConfig(
        **LLAMA | {"attention_bias": False}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "Mixtral": MixtralConfig(**LLAMA | {"attention_bias": False}, num_local_experts=3, num_experts_per_tok=2),
}
BOTH = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
EXPERTS = {
    "both": BOTH,
    "one": {"target_parameters": ["mlp.experts.down_proj"]},
    "bare": {"target_parameters": ["gate_up_proj", "down_proj"]},  # what "all-linear" becomes
    "patterns": BOTH
    | {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"layers.0.mlp.experts.gate_up_proj": 5}},
}


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_adapters_on_the_experts_of_a_mixture_are_merged(tmp_path: Path, mixture: str, kind: str) -> None:
    torch.manual_seed(1)
    base, out = tmp_path / "base", tmp_path / "out"
    AutoModelForCausalLM.from_config(MIXTURES[mixture], dtype=torch.bfloat16).save_pretrained(base)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **EXPERTS[kind])
    layout, merged = merge(base, adapter)
    layout.check_applied()
    untouched = load_file(base / "model.safetensors")
    assert merged.keys() == untouched.keys()
    assert set(layout.changed) == {name for name in merged if not torch.equal(merged[name], untouched[name])}
    out.mkdir()
    save_file(merged, out / "model.safetensors")
    shutil.copyfile(base / "config.json", out / "config.json")
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, expected in reference(base, adapter).items():
        assert bf16_steps(found[name], expected) <= 1, name


def test_an_adapter_on_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    for name, experts in (("a", 4), ("b", 5)):
        torch.manual_seed(1)
        config = Qwen3MoeConfig(**LLAMA, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=24)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    adapter = write_adapter(tmp_path / "a", tmp_path / "adapter", target_modules=["q_proj"], **BOTH)
    with pytest.raises(ExportError, match="for each of 5 experts"):
        merge(tmp_path / "b", adapter)


def test_a_delta_that_was_left_out_or_applied_twice_is_noticed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    adapter = read_adapter(write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"]))
    with TensorFolder(base) as tensors:
        layout = merged_layout(base, tensors, adapter, base_dtype=None, dtype=torch.bfloat16, quantization=None)
        for name in layout.changed[1:]:
            layout.produce(name)
        with pytest.raises(ExportError, match=r"2 tensors of the adapter were not merged exactly once.*0 times"):
            layout.check_applied()
        layout.produce(layout.changed[0])
        layout.check_applied()
        layout.produce(layout.changed[0])
        with pytest.raises(ExportError, match="2 times instead of 1"):
            layout.check_applied()


@pytest.fixture
def tf32() -> Iterator[None]:
    """The process as `--tf32 true` and `torch_compile` leave it (transformers 5.19, `enable_tf32`)."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_products_are_exact_also_after_training_in_tf32() -> None:
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with exact_products():
        assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
    assert [place.fp32_precision for place in places] == ["tf32", "tf32"]


def test_products_are_exact_beside_torchs_older_switch() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_only_adapted_tensors_change(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    layout, merged = merge(base, write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"]))
    original = load_file(base / "model.safetensors")
    assert set(layout.changed) == {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(2)}
    for name, tensor in merged.items():
        assert torch.equal(tensor, original[name]) == (name not in layout.changed), name


def rewrite_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"megatron_config": {"some": 1}}, "megatron_config"),
        ({"r": 8}, "rank 4"),
    ],
)
def test_a_setting_that_cannot_be_reproduced_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    base = write_base(tmp_path / "base", tied=True)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    rewrite_config(adapter, **changes)
    with pytest.raises(ExportError, match=named):
        read_adapter(adapter)


def edit_tensors(adapter: Path, change: object) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_tensor_that_belongs_nowhere_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_tensors(adapter, lambda tensors: tensors.update({"base_model.model.model.lora_unknown": torch.ones(2)}))
    with pytest.raises(ExportError, match="lora_unknown"):
        read_adapter(adapter)


def test_half_a_low_rank_pair_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_tensors(adapter, lambda tensors: tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"))
    with pytest.raises(ExportError, match=r"lacks lora_A or lora_B for model\.layers\.0\.self_attn\.q_proj"):
        read_adapter(adapter)


def test_an_adapter_saved_from_partitioned_parameters_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_tensors(adapter, lambda tensors: tensors.update({name: torch.empty(0) for name in tensors}))
    with pytest.raises(ExportError, match="ZeRO-3"):
        read_adapter(adapter)


def test_an_adapter_for_a_module_the_base_lacks_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(write_base(tmp_path / "a", tied=True), tmp_path / "adapter", target_modules="all-linear")
    torch.manual_seed(1)
    smaller = LlamaConfig(**(LLAMA | {"num_hidden_layers": 1}))
    AutoModelForCausalLM.from_config(smaller, dtype=torch.bfloat16).save_pretrained(tmp_path / "b")
    with pytest.raises(ExportError, match=r"model\.layers\.1"):
        merge(tmp_path / "b", adapter)


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(write_base(tmp_path / "a", tied=True), tmp_path / "adapter", target_modules="all-linear")
    wider = LlamaConfig(**(LLAMA | {"intermediate_size": 128}))
    AutoModelForCausalLM.from_config(wider, dtype=torch.bfloat16).save_pretrained(tmp_path / "b")
    with pytest.raises(ExportError, match="another base"):
        merge(tmp_path / "b", adapter)


def test_a_model_with_code_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_config.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ExportError, match="Python code of its own, which is not run here"):
        read_skeleton(tmp_path)
