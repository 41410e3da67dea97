"""An adapted layer as one operation computes what PEFT's own computes, and steps aside where it cannot."""

from __future__ import annotations

import copy
import io
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_dsvllm.low_rank import FusedLinear, fuse, why_not_fused
from hf_dsvllm.speedups import apply

SIZES = (24, 40)  # in, out


class Net(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, SIZES[0])
        self.one = nn.Linear(*SIZES, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.one(x)
        return made


def adapted(seed: int = 0, *, with_bias: bool = False, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(seed)
    net = Net(with_bias).to(dtype)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["one"], "lora_dropout": 0.0, **settings})
    model = get_peft_model(net, config, autocast_adapter_dtype=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B is zero at first: then nothing would be told apart
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def layer_of(model: Any) -> Any:
    return model.base_model.model.one


def fused(model: Any) -> Any:
    assert why_not_fused(layer_of(model)) is None
    fuse(layer_of(model))
    return model


def quantised(model: Any) -> Any:
    """The layer's base in NF4, as bitsandbytes has it; PEFT's own layer for it."""
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit

    old = layer_of(model)
    base = bnb.nn.Linear4bit(*SIZES, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(old.base_layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
    base = base.to("cpu")  # quantises
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["one"], lora_dropout=0.0)
    made = Linear4bit(base, "default", config, r=4, lora_alpha=12)
    made.lora_A, made.lora_B = old.lora_A, old.lora_B
    model.base_model.model.one = made
    return model


def results(model: Any, x: torch.Tensor, *, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Output, and the gradients of the input and of the adapter, for a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = model(x)
    weights = torch.linspace(-1, 1, made.numel()).view(made.shape)
    (made.float() * weights).sum().backward()
    layer = layer_of(model)
    return {
        "output": made.detach(),
        "x": x.grad,
        "A": layer.lora_A["default"].weight.grad,
        "B": layer.lora_B["default"].weight.grad,
    }


@pytest.mark.parametrize("shape", [(7, SIZES[0]), (2, 5, SIZES[0])])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...], bias: bool, rslora: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape)
    plain = results(adapted(with_bias=bias, use_rslora=rslora), x)
    found = results(fused(adapted(with_bias=bias, use_rslora=rslora)), x)
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-5)
        assert value.abs().max() > 0.1


@pytest.mark.parametrize("training", [False, True])
def test_dropout_drops_what_it_drops_in_pefts_own_layer(training: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(7, SIZES[0])
    found = []
    for make in (lambda model: model, fused):
        model = make(adapted(lora_dropout=0.5)).train(training)
        torch.manual_seed(2)
        found.append(results(model, x))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-5)
    without = results(adapted(), x)
    assert torch.allclose(found[1]["output"], without["output"], atol=1e-5) != training


@pytest.mark.parametrize("four_bit", [False, True])
def test_under_autocast_it_is_closer_to_fp32_than_peft(four_bit: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(6, SIZES[0]).bfloat16()

    def model() -> Any:
        made = adapted(dtype=torch.bfloat16)
        return quantised(made) if four_bit else made

    exact = results(model().float(), x.float()) if not four_bit else None
    plain, found = results(model(), x, autocast=True), results(fused(model()), x, autocast=True)
    for name, value in found.items():
        assert value.dtype == plain[name].dtype
        torch.testing.assert_close(value.float(), plain[name].float(), rtol=0.02, atol=0.25)
    if exact is not None:
        off = [(some["output"].float() - exact["output"]).abs().mean() for some in (found, plain)]
        assert off[0] < off[1]
    assert found["A"].dtype == torch.float32


def test_the_input_needs_no_gradient_and_frozen_adapters_get_none() -> None:
    model = fused(adapted())
    layer_of(model).lora_A["default"].weight.requires_grad_(False)
    model(torch.randn(3, SIZES[0])).sum().backward()
    assert layer_of(model).lora_A["default"].weight.grad is None
    assert layer_of(model).lora_B["default"].weight.grad is not None


def test_recomputed_layers_have_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(1)
    x = torch.randn(5, SIZES[0])
    plain = results(fused(adapted()), x)
    model = fused(adapted())
    inner = model.base_model.model.forward
    model.base_model.model.forward = lambda *given: checkpoint(inner, *given, use_reentrant=False)
    for name, found in results(model, x).items():
        assert torch.equal(found, plain[name])


def test_without_adapters_merged_or_with_two_of_them_it_is_peft_that_answers() -> None:
    model, x = fused(adapted()), torch.randn(3, SIZES[0])
    adapted_to = model(x)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(base, layer_of(model).base_layer(x))
    assert not torch.allclose(base, adapted_to)
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted_to, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), adapted_to, rtol=1e-4, atol=1e-4)
    layer = layer_of(model)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["one"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    torch.testing.assert_close(both, super(type(layer), layer).forward(x))
    assert not torch.allclose(both, adapted_to)


def test_fp32_adapters_on_16_bit_weights_without_autocast_are_computed_in_fp32_as_peft_does() -> None:
    x = torch.randn(3, SIZES[0]).bfloat16()
    plain, found = adapted(dtype=torch.bfloat16), fused(adapted(dtype=torch.bfloat16))
    assert torch.equal(plain(x), found(x))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "an adapter with a bias"),
        ({"bias": "all"}, "a layer that is trained itself"),
    ],
)
def test_layers_that_need_more_are_left_to_peft(settings: dict[str, Any], why: str) -> None:
    assert why in str(why_not_fused(layer_of(adapted(with_bias=True, **settings))))


def test_an_adapted_embedding_is_left_to_peft() -> None:
    model = adapted(target_modules=["embed", "one"])
    assert why_not_fused(model.base_model.model.embed) == "an adapter on Embedding"
    assert why_not_fused(layer_of(model)) is None


def said(model: Any) -> str:
    [outcome] = apply(SimpleNamespace(model=model, args=arguments()), {"fused_adapters"})
    return str(outcome)


def arguments(**changed: Any) -> Any:
    """What `speedups` reads of a Trainer's arguments."""
    return SimpleNamespace(**{"parallelism_config": None, "torch_compile": False} | changed)


def test_the_run_says_which_layers_are_one_operation_and_why_others_are_not() -> None:
    model = adapted(target_modules=["embed", "one"])
    assert said(model) == (
        "speed: 1 adapted layers are one operation each, 1 are not because of an adapter on Embedding (fused_adapters)"
    )
    assert isinstance(layer_of(model), FusedLinear)
    assert said(adapted(use_dora=True)) == ("speed: fused_adapters left out, because of a variant of LoRA such as DoRA")
    assert said(Net()) == "speed: fused_adapters left out, because there are no LoRA layers"


def test_sharded_adapters_are_left_to_their_own_modules() -> None:
    model = adapted()
    layer_of(model).lora_A["default"].weight.ds_id = 1
    assert said(model).startswith("speed: fused_adapters left out, because ZeRO-3 gathers adapters only")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_it_learns_what_training_without_it_learns(tmp_path: Any, checkpointing: bool) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from tests.tiny import write_tiny_model

    path = str(write_tiny_model(tmp_path / "model"))
    rows = [{"input_ids": [4 + (7 * i + 3 * j) % 300 for j in range(24)]} for i in range(16)]

    def losses(features: set[str]) -> list[float]:
        args = SFTConfig(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
            gradient_checkpointing=checkpointing, max_length=32, seed=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), peft_config=config)
        outcomes = apply(trainer, features)
        assert all("14 adapted layers are one operation each" in outcome.said for outcome in outcomes)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    plain, found = losses(set()), losses({"fused_adapters"})
    assert found == pytest.approx(plain, abs=2e-5)
    assert plain[-1] < plain[0] - 0.01


def test_what_comes_after_may_change_the_output_in_place() -> None:
    x = torch.randn(3, SIZES[0])
    plain, found = adapted()(x).clamp_(-0.5, 0.5), fused(adapted())(x).clamp_(-0.5, 0.5)  # as OLMo does
    torch.testing.assert_close(found, plain)
    found.sum().backward()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_an_adapter_that_is_added_and_chosen_later_is_computed_as_peft_does(settings: dict[str, Any]) -> None:
    model, x = fused(adapted(with_bias=True)), torch.randn(3, SIZES[0])
    before = model(x)
    model.add_adapter("two", LoraConfig(r=4, target_modules=["one"], init_lora_weights=False, **settings))
    model.set_adapter("two")
    layer = layer_of(model)
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(found, super(type(layer), layer).forward(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before)


def test_an_active_adapter_that_a_layer_does_not_have_is_no_error() -> None:
    model = adapted()
    model.add_adapter("two", LoraConfig(r=4, target_modules=["embed"]))
    model.set_adapter("two")
    x = torch.randn(3, SIZES[0])
    torch.testing.assert_close(fused(model)(x), layer_of(model).base_layer(x))


def test_a_copy_reads_its_own_weight_and_a_model_can_be_saved_whole() -> None:
    model = fused(adapted())
    copied, written = copy.deepcopy(model), io.BytesIO()
    with torch.no_grad():
        layer_of(copied).base_layer.weight.zero_()
    x = torch.randn(3, SIZES[0])
    plain = adapted()
    with torch.no_grad():
        layer_of(plain).base_layer.weight.zero_()
    torch.testing.assert_close(results(copied, x)["x"], results(plain, x)["x"])
    torch.save(model, written)
    again = torch.load(io.BytesIO(written.getvalue()), weights_only=False)
    assert isinstance(layer_of(again), FusedLinear)
    assert torch.equal(again(x), model(x))


def test_a_model_that_is_deleted_is_gone_at_once() -> None:
    model = fused(adapted())
    layer = weakref.ref(layer_of(model))
    results(model, torch.randn(3, SIZES[0]))
    del model
    assert layer() is None


def test_a_base_with_hooks_is_left_to_peft_which_shows_them_what_they_expect() -> None:
    model, x, seen = fused(adapted()), torch.randn(2, 5, SIZES[0]), []
    layer_of(model).base_layer.register_forward_hook(lambda module, given, made: seen.append(made))
    torch.testing.assert_close(model(x), adapted()(x))
    assert seen[0].shape == (2, 5, SIZES[1])
    torch.testing.assert_close(seen[0], layer_of(model).base_layer(x))


def test_another_tuners_layer_below_is_left_alone() -> None:
    layer = layer_of(adapted())
    layer.base_layer = type("Linear", (nn.Linear,), {})(*SIZES)  # as IA3's, which has that name
    assert why_not_fused(layer) == "an adapter on Linear"


def test_gradients_of_gradients_are_refused_instead_of_wrong() -> None:
    x = torch.randn(3, SIZES[0], requires_grad=True)
    (gradient,) = torch.autograd.grad(fused(adapted())(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_4_bit_layer_with_an_fp32_input_under_autocast_returns_fp32_as_pefts_does() -> None:
    x = torch.randn(3, SIZES[0])
    with torch.autocast("cpu", torch.bfloat16):
        plain = quantised(adapted(dtype=torch.bfloat16))(x)
        found = fused(quantised(adapted(dtype=torch.bfloat16)))(x)
    assert found.dtype == plain.dtype
    assert torch.equal(found, plain)


@pytest.mark.parametrize("trains", [True, False])
def test_a_4_bit_base_computes_as_it_trains(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes takes another kernel where no gradient is asked for, as inside of an autograd function."""
    from bitsandbytes.autograd import _functions

    calls, real = [], _functions.MatMul4Bit.apply
    monkeypatch.setattr(_functions.MatMul4Bit, "apply", lambda *given: calls.append(1) or real(*given))
    x = torch.randn(3, SIZES[0], dtype=torch.bfloat16, requires_grad=trains)
    plain, found = quantised(adapted(dtype=torch.bfloat16)), fused(quantised(adapted(dtype=torch.bfloat16)))
    for model in (plain, found):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    with torch.set_grad_enabled(trains), torch.inference_mode(not trains):
        made = [model(x) for model in (plain, found)]
    assert len(calls) == (2 if trains else 0)
    torch.testing.assert_close(made[0], made[1], rtol=0.02, atol=0.05)


def test_zero3_that_will_shard_later_is_known_by_its_stage() -> None:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config={}))
    trainer = SimpleNamespace(model=adapted(), args=arguments(), accelerator=SimpleNamespace(state=state))
    (outcome,) = apply(trainer, {"fused_adapters"})
    assert outcome.reason == "ZeRO-3 gathers adapters only where their own modules are called"


def test_what_is_compiled_is_left_to_the_compiler() -> None:
    dynamo = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value="INDUCTOR")))
    for changed in ({"args": arguments(torch_compile=True)}, {"accelerator": SimpleNamespace(state=dynamo)}):
        trainer = SimpleNamespace(**{"model": adapted(), "args": arguments()} | changed)
        (outcome,) = apply(trainer, {"fused_adapters"})
        assert "torch.compile" in str(outcome.reason)
