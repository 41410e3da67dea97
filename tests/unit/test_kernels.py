"""What liger-kernel patches stays in the model it was meant for; a stand-in patches as the real one does."""

from __future__ import annotations

import importlib.util
import sys
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dsvllm.features import FUSED_TYPES, choose, planned
from hf_dsvllm.kernels import INSTALL, use_kernels, why_no_kernels


def small_model() -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, vocab_size=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A `liger_kernel` that patches names of the module and instances, and refuses to compute on the CPU."""
    from transformers.models.qwen3 import modeling_qwen3

    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))  # put back after the test
    calls: list[dict[str, Any]] = []

    class OnGpu(torch.nn.Module):
        def forward(self, *_: Any) -> Any:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    def rotate(*_: Any) -> Any:
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    def apply(model: Any, **settings: Any) -> None:
        calls.append(settings)
        modeling_qwen3.apply_rotary_pos_emb = rotate
        modeling_qwen3.Qwen3RMSNorm = modeling_qwen3.Qwen3MLP = OnGpu
        model.model.norm.forward = MethodType(OnGpu.forward, model.model.norm)

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    return calls


def test_other_models_of_the_process_compute_as_before_also_on_the_cpu(liger: list[dict[str, Any]]) -> None:
    other, tokens = small_model(), torch.arange(8)[None]
    before = other(input_ids=tokens).logits
    patched = small_model()
    use_kernels(patched)
    assert liger == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert torch.equal(other(input_ids=tokens).logits, before)
    assert torch.equal(small_model()(input_ids=tokens).logits, before)  # made afterwards
    with pytest.raises(ValueError, match="cpu tensor"):
        patched(input_ids=tokens)


def test_functions_take_the_kernel_where_their_tensors_are_on_a_gpu(liger: list[dict[str, Any]]) -> None:
    from transformers.models.qwen3 import modeling_qwen3

    use_kernels(small_model())
    use_kernels(small_model())  # a second training in the same process
    with pytest.raises(ValueError, match="Triton"):
        modeling_qwen3.apply_rotary_pos_emb(SimpleNamespace(is_cuda=True), None, None, None)


def test_why_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen3", hidden_act="silu"))
    assert why_no_kernels(model, on_gpu=False) == "its kernels run on GPUs"
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else real(name))
    assert why_no_kernels(model, on_gpu=True) == INSTALL
    assert planned(None) == choose(None) - {"fused"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "liger_kernel" else real(name))
    assert why_no_kernels(model, on_gpu=True) is None
    assert planned(["no_varlen"]) == choose(["no_varlen"])
    relu = SimpleNamespace(config=SimpleNamespace(model_type="llama", hidden_act="relu"))
    assert "relu" in str(why_no_kernels(relu, on_gpu=True))
    assert "this is SimpleNamespace" in str(why_no_kernels(SimpleNamespace(), on_gpu=True))
    other = SimpleNamespace(config=SimpleNamespace(model_type="gemma2"))
    assert "this is gemma2" in str(why_no_kernels(other, on_gpu=True))
    assert all(kind in str(why_no_kernels(other, on_gpu=True)) for kind in FUSED_TYPES)


def test_a_plan_counts_kernels_only_where_the_model_has_them() -> None:
    from hf_dsvllm.model_shape import shape_from_config
    from hf_dsvllm.planner.setup import Setup
    from hf_dsvllm.presets import get_preset

    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}

    def kept(**changed: Any) -> int:
        shape = shape_from_config(config | changed)
        settings = {"world": 1, "micro": 1, "length": 8, "recompute": False, "features": frozenset({"fused"})}
        return Setup(shape=shape, preset=get_preset("zero2"), **settings).layer_bytes  # type: ignore[arg-type]

    assert kept() == kept(hidden_act="silu") < kept(hidden_act="relu")
    assert kept(hidden_act="relu") == kept(model_type="gemma", hidden_act="gelu", head_dim=32)
