"""Layers gathered as one unit under ZeRO-3 train as those that DeepSpeed gathers matrix by matrix."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dsvllm import whole_layers
from hf_dsvllm.errors import WiringError
from hf_dsvllm.features import LAYERS_AT_ONCE, REDUCED_AT_ONCE
from tests.conftest import ROOT, torchrun
from tests.tiny import write_tiny_tokenizer

SCRIPT = ROOT / "tests" / "scripts" / "gathered.py"
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64 + 2 * 16  # queries, output, keys, values, MLP, norms


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("preset", "recompute"),
    [
        ("zero3", "no"),
        ("zero3", "reentrant"),
        ("zero3_offload", "yes"),
        ("zero3+lora", "yes"),
        ("zero3+lora", "no"),
    ],
)
def test_layers_gathered_whole_learn_the_same(preset: str, recompute: str, tmp_path: Path) -> None:
    words = write_tiny_tokenizer(tmp_path / "words")
    found = {}
    for how in ("whole", "as-it-comes"):
        env = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        args = [preset, str(tmp_path), how, recompute, str(words)]
        done = torchrun(SCRIPT, nproc=2, args=args, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [tmp_path / f"{preset}-{how}-{recompute}-{rank}.json" for rank in (0, 1)]
        found[how] = [json.loads(file.read_text()) for file in files]
    for whole, usual in zip(*found.values(), strict=True):
        assert whole["leaves"] == ["Qwen3DecoderLayer"] * 6
        assert usual["leaves"] == []
        assert len(whole["losses"]) == 4
        assert whole["losses"] == pytest.approx(usual["losses"], rel=1e-6)  # buckets add up in another order
        assert whole["norms"][0] == pytest.approx(usual["norms"][0], rel=1e-6)
        assert whole["norms"] == pytest.approx(usual["norms"], rel=2e-4)  # Adam makes little of a sign near zero a lot
        assert whole["weights"] == pytest.approx(usual["weights"], rel=1e-4)
        assert "6 layers are gathered whole" in whole["said"][0]
        adapters = (4 * (64 + 64) + 4 * (128 + 64)) if "lora" in preset else 0
        assert whole["prefetch"] == LAYER + adapters
        assert usual["prefetch"] < whole["prefetch"]
        for index in range(5):  # the next layer is on its way, and no more than some; the embedding was let go
            there = whole["gathered"][f"layer {index}"]
            assert {str(index), str(index + 1)} <= set(there), whole["gathered"]
            assert not any("embed_tokens" in each for each in there), whole["gathered"]
        for there in whole["gathered"].values():
            assert sum(each.isdigit() for each in there) <= LAYERS_AT_ONCE + 1, whole["gathered"]
    assert found["whole"][0]["weights"]


def test_only_settings_that_nobody_made_are_made() -> None:
    auto = {"stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": "auto"}
    whole_layers.settle(auto, layer=100, outside=400, trained=5_000)
    assert auto == {
        "stage3_prefetch_bucket_size": 100,
        "reduce_bucket_size": 5_000,
        "stage3_max_reuse_distance": 1,
        "stage3_max_live_parameters": 400 + LAYERS_AT_ONCE * 100,
    }
    large: dict[str, Any] = {"reduce_bucket_size": "auto"}
    whole_layers.settle(large, layer=100, outside=400, trained=10**12)
    assert large["reduce_bucket_size"] == REDUCED_AT_ONCE
    own = {"stage3_prefetch_bucket_size": 7, "reduce_bucket_size": 8, "max_reuse_distance": 9}
    own["stage3_max_live_parameters"] = 10
    before = dict(own)
    whole_layers.settle(own, layer=100, outside=400, trained=5_000)
    assert own == before


def sharded(zero: dict[str, Any], model: Any) -> Any:
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": zero})
    args = SimpleNamespace(torch_compile=False, ds_speed=None)
    return SimpleNamespace(
        model=model, args=args, accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    )


class Pairwise(SimpleNamespace):
    """A trainer whose loss asks the model twice."""

    def compute_loss(self, model: Any, inputs: Any) -> Any:
        return model(inputs) + model(inputs)


def test_where_layers_are_not_gathered_whole_is_said() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

    class Model(torch.nn.Module):
        _no_split_modules = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.embedding = Block()  # named as well, but no layer of a stack
            self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    assert whole_layers.why_not(sharded({}, Model())) is None
    assert len(whole_layers.layers_of(sharded({}, Model()))) == 2
    assert "on NVMe" in str(whole_layers.why_not(sharded({"offload_param": {"device": "nvme"}}, Model())))
    in_host_memory = sharded({"offload_param": {"device": "cpu"}}, Model())
    assert "lie in host memory" in str(whole_layers.why_not(in_host_memory))
    in_host_memory.args.ds_speed = ["whole_layers"]
    assert whole_layers.why_not(in_host_memory) is None
    compiled = sharded({}, Model())
    compiled.args.torch_compile = True
    assert "compiled" in str(whole_layers.why_not(compiled))
    assert "steps of its own" in str(whole_layers.why_not(Pairwise(**vars(sharded({}, Model())))))
    assert "says which modules" in str(whole_layers.why_not(sharded({"leaf_module": {"classes": ["X"]}}, Model())))
    assert "does not name" in str(whole_layers.why_not(sharded({}, torch.nn.Linear(2, 2))))
    nobody = SimpleNamespace(model=Model(), accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None)))
    assert "for ZeRO-3" in str(whole_layers.why_not(nobody))
    huge = Model()
    huge.blocks[0].inner.weight.ds_numel = 2_000_000_000  # type: ignore[attr-defined]
    assert "more than DeepSpeed gathers at once" in str(whole_layers.why_not(sharded({}, huge)))
    for shared in ("embedding", "blocks"):
        tied = Model()
        tied.blocks[0].inner = tied.embedding.inner if shared == "embedding" else tied.blocks[1].inner
        assert "share weights" in str(whole_layers.why_not(sharded({}, tied)))


class Layer(torch.nn.Module):
    """A layer whose forward returns what it is told to."""

    def __init__(self, returns: Any = None) -> None:
        super().__init__()
        self.inner, self.returns = torch.nn.Linear(4, 4), returns

    def forward(self, hidden_states: Any, scale: Any = None) -> Any:
        del scale
        return self.inner(hidden_states) if self.returns is None else self.returns


def hooked(layer: Layer) -> Layer:
    layer.register_forward_pre_hook(whole_layers.with_gradient, with_kwargs=True)
    layer.register_forward_hook(whole_layers.for_itself)
    return layer


@pytest.mark.parametrize(
    (
        "given",
        "learns",
    ),  # `hidden_state`: an older name, which transformers' decorator takes, not this layer
    [("hidden_states", True), ("hidden_state", True), ("args", True), ("hidden_states", False), ("args", False)],
)
def test_a_layers_input_has_a_gradient_and_a_place(given: str, learns: bool) -> None:
    """torch's backward hooks, by which DeepSpeed reduces a leaf's gradients, look at positional inputs."""
    layer, seen = hooked(Layer()), []
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    layer.requires_grad_(learns)
    tokens = torch.ones(2, 4)
    args, kwargs = ((tokens,), {}) if given == "args" else ((), {given: tokens})
    layer(*args, **kwargs, scale=1)
    (args, kwargs) = seen[0]
    if learns:
        assert args[0].requires_grad
        assert torch.equal(args[0], tokens)
        assert kwargs == {"scale": 1}
    else:
        assert not any(each.requires_grad for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
    with torch.no_grad():
        layer(tokens)
    assert not any(each.requires_grad for each in seen[1][0])


def test_a_layer_that_would_learn_nothing_is_refused() -> None:
    with pytest.raises(WiringError, match=r"no input that a gradient could pass.*--ds_speed no_whole_layers"):
        hooked(Layer())(hidden_states=torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(WiringError, match=r"returns a dict.*--ds_speed no_whole_layers"):
        hooked(Layer({"hidden_states": torch.ones(2, 4)}))(torch.ones(2, 4))
