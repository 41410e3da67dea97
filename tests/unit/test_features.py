"""Speed features: how they are chosen, and that they change no number that training depends on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm.features import FEATURES, choose, feature_problems
from tests.tiny import write_tiny_model

DEFAULTS = frozenset(feature.name for feature in FEATURES if feature.default)


def test_the_features_that_are_on_by_default_are_reviewed_ones() -> None:
    assert {feature.name for feature in FEATURES if not feature.default} == {
        "bf16_adapters", "cudnn", "fp32_adapters", "gpu_gradients",
    }  # fmt: skip
    assert all(any(sign.isdigit() for sign in feature.why) for feature in FEATURES if feature.default), "measured"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, DEFAULTS),
        (["cudnn"], DEFAULTS | {"cudnn"}),
        (["no_keep_activations", "cudnn"], DEFAULTS - {"keep_activations"} | {"cudnn"}),
        (["none", "fused"], {"fused"}),
        (["none", "padding_free"], {"padding_free", "varlen"}),
        (["all", "no_fused"], {feature.name for feature in FEATURES} - {"fused"}),
    ],
)
def test_words_add_to_the_defaults_or_take_from_them(words: list[str] | None, expected: set[str]) -> None:
    assert choose(words) == expected


def test_a_misspelt_feature_is_answered_with_the_nearest() -> None:
    (problem,) = feature_problems(["no_cudn", "fused", "none"])
    assert "no_cudnn" in str(problem)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("features") / "model"))


def mixed(**changed: Any) -> Any:
    """What `speedups` reads of arguments that train in bf16 under autocast, on a CPU."""
    return SimpleNamespace(
        **{"use_cpu": True, "bf16": True, "fp16": False, "parallelism_config": None, "use_liger_kernel": False}
        | changed
    )


@pytest.mark.parametrize(
    ("kind", "changed", "engine", "why"),
    [
        ("4 bit", {}, False, "4-bit layers never do"),
        ("bf16 adapters", {}, False, "no layer has an fp32 adapter"),
        ("none", {}, False, "no layer has an fp32 adapter"),
        ("fp32", {"bf16": False}, False, "nothing is computed under autocast"),
        ("fp32", {}, True, "DeepSpeed holds adapters in the training dtype"),
    ],
)
def test_lean_adapters_say_why_there_is_nothing_to_change(
    kind: str, changed: dict[str, bool], engine: bool, why: str
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    from hf_dsvllm.speedups import apply

    linear = Linear4bit(64, 64) if kind == "4 bit" else torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    model: Any = torch.nn.Sequential(linear)
    model.is_loaded_in_4bit = kind == "4 bit"
    if kind != "none":
        model = get_peft_model(model, LoraConfig(target_modules=["0"]), autocast_adapter_dtype=kind != "bf16 adapters")
        assert (type(model.base_model.model[0]).__name__ == "Linear4bit") == (kind == "4 bit")
    trainer = SimpleNamespace(model=model, args=mixed(**changed), is_deepspeed_enabled=engine)
    (outcome,) = apply(trainer, {"lean_adapters"})
    assert str(outcome).startswith("speed: lean_adapters left out, because")
    assert why in str(outcome)


def test_what_a_machine_without_gpu_leaves_out_is_said_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from hf_dsvllm.speedups import apply, worth_saying

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen3", hidden_act="silu"))
    outcomes = apply(SimpleNamespace(args=mixed(), model=model), {"cudnn", "fused"})
    lines = [
        "speed: fused left out, because its kernels run on GPUs",
        "speed: cudnn left out, because there is no GPU",
    ]
    assert list(map(str, outcomes)) == lines
    assert worth_saying(outcomes, ["all"]) == lines
    assert worth_saying(outcomes, ["cudnn"]) == lines[1:]
    assert worth_saying(outcomes, []) == []


def test_lean_adapters_compute_the_same_under_autocast(model_path: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hf_dsvllm.adapter_features import lean_adapters

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config).train()
    tokens = torch.arange(4, 36)[None]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        gradient = next(p.grad.clone() for p in model.parameters() if p.requires_grad)
        return loss.detach(), gradient

    before = run()
    trainer = SimpleNamespace(model=model, args=mixed(), is_deepspeed_enabled=False)
    assert "speed: 14 adapted layers" in str(lean_adapters(trainer))
    loss, gradient = run()
    assert torch.equal(loss, before[0])
    assert torch.equal(gradient, before[1])
    model(input_ids=tokens)  # outside autocast inputs are cast as ever: no error


def test_sequence_parallelism_gets_the_attention_the_positions_and_the_lengths_it_asks_for() -> None:
    import torch
    from transformers import default_data_collator
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as CollatorOfSft

    from hf_dsvllm.speedups import apply

    def ready(collator: Any, implementation: str | None = None) -> tuple[Any, Any, list[str]]:
        handler = SimpleNamespace(sp_attn_implementation=implementation)
        parallel = SimpleNamespace(sp_size=4, sp_handler=handler)
        model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
        trainer = SimpleNamespace(args=mixed(parallelism_config=parallel), model=model, data_collator=collator)
        lines = apply(trainer, ())
        assert apply(trainer, ()) == []
        return handler, trainer.data_collator, lines

    handler, collator, (line,) = ready(default_data_collator)
    assert (handler.sp_attn_implementation, "position" in str(line)) == ("sdpa", True)
    batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 4]}])
    assert torch.equal(batch["position_ids"], torch.tensor([[0, 1, 2], [0, 1, 2]]))
    own = collator([{"input_ids": [5, 6], "position_ids": [3, 4]}])
    assert own["position_ids"].tolist() == [[3, 4]]
    of_sft = CollatorOfSft(pad_token_id=0)
    of_sft.return_position_ids = True
    handler, collator, lines = ready(of_sft, "flash_attention_2")
    assert (handler.sp_attn_implementation, collator, collator.pad_to_multiple_of, lines) == (
        "flash_attention_2", of_sft, 4, [],
    )  # fmt: skip


def test_adapters_in_bf16_learn_nearly_the_same_and_keep_what_is_no_adapter(model_path: str, tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from hf_dsvllm.speedups import apply

    def trained(features: set[str]) -> tuple[list[float], Any, list[str]]:
        rows = [[4 + (7 * i + 3 * j) % 300 for j in range(12)] for i in range(8)]
        args = SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, learning_rate=2e-3, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, bf16=True, disable_tqdm=True,
            model_init_kwargs={"dtype": "bfloat16"},
        )  # fmt: skip
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
        data = Dataset.from_dict({"input_ids": rows})
        trainer = SFTTrainer(model=model_path, args=args, train_dataset=data, peft_config=config)
        lines = apply(trainer, features)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer, lines

    plain, before, _ = trained(set())
    found, after, lines = trained({"bf16_adapters", "lean_adapters"})
    assert list(map(str, lines)) == ["speed: 8 adapter matrices and their optimizer states in bf16 (bf16_adapters)"]
    assert found == pytest.approx(plain, abs=0.02)
    kinds = {
        trainer: {parameter.dtype for name, parameter in trainer.model.named_parameters() if part in name}
        for trainer, part in ((before, "lora_A"), (after, "lora_A"))
    }
    assert kinds == {before: {torch.float32}, after: {torch.bfloat16}}
    states = [state["exp_avg"].dtype for p, state in after.optimizer.state.items() if p.dtype == torch.bfloat16]
    assert set(states) == {torch.bfloat16}
    heads = {p.dtype for name, p in after.model.named_parameters() if "modules_to_save" in name}
    assert heads == {p.dtype for name, p in before.model.named_parameters() if "modules_to_save" in name}
    after.model.save_pretrained(tmp_path / "checkpoint")
    after._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert {p.dtype for name, p in after.model.named_parameters() if "lora_A" in name} == {torch.bfloat16}, "resumed"
    (outcome,) = apply(after, {"bf16_adapters"})
    assert "left out, because the optimizer was made before" in str(outcome)


def test_adapters_of_a_quantised_base_in_fp32_learn_what_bf16_rounds_away(model_path: str, tmp_path: Path) -> None:
    """Steps of 1e-5 on matrices of 0.1 are below half a step of bf16 there: TRL's adapters A do not move at all."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from hf_dsvllm.speedups import apply

    def trained(features: set[str]) -> tuple[Any, float, list[str]]:
        args = SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-5, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, bf16=True, disable_tqdm=True, lr_scheduler_type="constant",
            model_init_kwargs={"dtype": "bfloat16", "quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        )  # fmt: skip
        torch.manual_seed(0)
        data = Dataset.from_dict({"input_ids": [[4 + (7 * i + 3 * j) % 300 for j in range(12)] for i in range(8)]})
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        trainer = SFTTrainer(model=model_path, args=args, train_dataset=data, peft_config=config)
        lines = list(map(str, apply(trainer, features)))
        (first, *_) = [p for name, p in trainer.model.named_parameters() if "lora_A" in name]
        before = first.detach().float().clone()
        trainer.train()
        return trainer, (first.detach().float() - before).abs().mean().item(), lines

    usual, rounded, _ = trained(set())
    usual.model.save_pretrained(tmp_path / "checkpoint")
    usual._load_from_checkpoint(str(tmp_path / "checkpoint"))
    kinds = {p.dtype for name, p in usual.model.named_parameters() if "lora_" in name}
    assert kinds == {torch.bfloat16}, "a resumed run trains them as before"
    trainer, moved, lines = trained({"fp32_adapters", "fused_adapters"})
    assert lines[0] == "speed: 8 adapter matrices and their optimizer states in fp32 (fp32_adapters)"
    assert {p.dtype for name, p in trainer.model.named_parameters() if "lora_" in name} == {torch.float32}
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}
    assert moved > 2 * rounded
    (outcome,) = apply(trainer, {"fp32_adapters"})
    assert "the optimizer was made before" in str(outcome)


def test_dora_takes_its_norm_in_fp32(model_path: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hf_dsvllm.adapter_features import casts_its_input

    base = AutoModelForCausalLM.from_pretrained(model_path)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], use_dora=True))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert layers
    assert not any(casts_its_input(layer) for layer in layers)
