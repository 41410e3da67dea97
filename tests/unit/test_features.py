"""Speed features: how they are chosen, and that they change no number that training depends on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm.attention import TYPES
from hf_dsvllm.features import FEATURES, choose, feature_problems
from tests.tiny import write_tiny_model

DEFAULTS = frozenset(feature.name for feature in FEATURES if feature.default)
TOLERANCE = 2e-6  # of a loss in float32: another order of additions


def test_the_features_that_are_on_by_default_are_reviewed_ones() -> None:
    assert {feature.name for feature in FEATURES if not feature.default} == {"bf16_adapters", "cudnn"}
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


LENGTHS = (5, 17, 9, 12, 3, 20, 8, 11)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("features") / "model"))


def losses(model_path: str, folder: Path, *, features: set[str], **arguments: Any) -> list[float]:
    """Losses of three steps of SFT in float32 on sequences of different lengths."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from hf_dsvllm.speedups import apply

    rows = [[4 + (7 * i + 3 * j) % 300 for j in range(length)] for i, length in enumerate(LENGTHS * 2)]
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_length=32,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        seed=0,
        **arguments,
    )
    torch.manual_seed(0)
    trainer = SFTTrainer(model=model_path, args=args, train_dataset=Dataset.from_dict({"input_ids": rows}))
    apply(trainer, features)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def plain(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(model_path, tmp_path_factory.mktemp("plain"), features=set())


def test_a_batch_padded_on_the_right_needs_no_mask(model_path: str, plain: list[float], tmp_path: Path) -> None:
    assert losses(model_path, tmp_path, features={"unmasked"}) == pytest.approx(plain, abs=TOLERANCE)


def test_sequences_laid_end_to_end_learn_what_padded_ones_learn(
    model_path: str, plain: list[float], tmp_path: Path
) -> None:
    assert losses(model_path, tmp_path, features={"padding_free"}) == pytest.approx(plain, abs=TOLERANCE)


def test_packed_sequences_attend_to_themselves_only(model_path: str, tmp_path: Path) -> None:
    masked = losses(model_path, tmp_path / "masked", features=set(), packing=True)
    free = losses(model_path, tmp_path / "free", features={"varlen"}, packing=True)
    assert free == pytest.approx(masked, abs=TOLERANCE)


def test_the_losses_move_far_more_than_the_tolerance(plain: list[float]) -> None:
    assert max(plain) - min(plain) > 1000 * TOLERANCE


def test_packed_sequences_without_boundaries_are_refused_not_mixed() -> None:
    import torch

    from hf_dsvllm.attention import varlen_forward

    part = torch.zeros(1, 2, 6, 32)
    with pytest.raises(ValueError, match="boundaries"):
        varlen_forward(None, part, part, part, torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_padding_on_the_left_keeps_its_mask(model_path: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from hf_dsvllm.attention import without_mask

    decoder = AutoModelForCausalLM.from_pretrained(model_path).get_decoder().train()
    left, right = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 0, 0]])
    assert without_mask(decoder, (), {"attention_mask": left})[1]["attention_mask"] is left
    assert without_mask(decoder, (), {"attention_mask": right})[1]["attention_mask"] is None
    decoder.eval()
    assert without_mask(decoder, (), {"attention_mask": right})[1]["attention_mask"] is right


def test_packed_sequences_are_evaluated_without_a_mask_too(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from hf_dsvllm import attention

    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="sdpa").eval()
    packed = {"input_ids": torch.arange(4, 16)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 4, *range(7)]])}
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    with torch.no_grad():
        expected = model(**packed, use_cache=False).logits
        attention.use_varlen(model)
        attention.drop_masks(model)
        seen = []
        real = attention.one_by_one
        monkeypatch.setattr(attention, "one_by_one", lambda *given: (seen.append(1), real(*given))[1])
        found = model(**packed, **bounds, use_cache=False).logits
    assert len(seen) == model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 64},
        {"num_experts": 8},
        {"attn_logit_softcapping": 50.0},
        {"_attn_implementation": "eager"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_kinds_of_attention_keep_their_masks(changed: dict[str, Any]) -> None:
    from hf_dsvllm.attention import why_not

    config = SimpleNamespace(_attn_implementation="sdpa", model_type="qwen3")
    config.get_text_config = lambda: config
    model = type("Qwen3ForCausalLM", (), {"config": config})()
    assert why_not(model) is None
    vars(config).update(changed)
    assert why_not(model) is not None


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "FalconForCausalLM", "StableLmForCausalLM"])
def test_models_that_attend_otherwise_or_lose_the_boundaries_are_left_alone(kind: str) -> None:
    import transformers

    from hf_dsvllm.attention import why_not

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, kind.partition("For")[0] + "Config")(vocab_size=64, **sizes)
    assert f"not tried on {kind}" in str(why_not(getattr(transformers, kind)(config)))
    assert why_not(SimpleNamespace()) is not None


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("lengths", [(5, 9, 3), (6, 6, 6)], ids=["mixed", "alike"])
def test_every_kind_of_model_learns_the_same_padded_and_end_to_end(kind: str, lengths: tuple[int, ...]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_dsvllm.attention import drop_masks, use_varlen, why_not

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, sliding_window=None, attention_dropout=0.0, hidden_dropout=0.0),
        attn_implementation="sdpa",
    ).train()
    assert why_not(model) is None
    rows = [torch.randint(1, 64, (length,)) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(lengths)}
    laid = {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}

    def learnt(**given: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(**given, use_cache=False).logits
        flat = logits[0] if "cu_seq_lens_q" in given else torch.cat([logits[i, :n] for i, n in enumerate(lengths)])
        flat.float().square().sum().backward()
        return flat.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = learnt(input_ids=padded, attention_mask=mask)
    assert use_varlen(model)
    drop_masks(model)
    for again in (learnt(input_ids=padded, attention_mask=mask), learnt(**laid, **bounds)):
        torch.testing.assert_close(again, before, rtol=1e-4, atol=1e-4)


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

    from hf_dsvllm.speedups import lean_adapters

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
    (outcome,) = apply(after, {"bf16_adapters"})
    assert "left out, because the optimizer was made before" in str(outcome)


def sft(model_path: str, folder: Path, **changed: Any) -> Any:
    """TRL's SFT trainer on sequences of several lengths, on a CPU."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = {"output_dir": str(folder), "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3,
                 "max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
                 "save_strategy": "no", "model_init_kwargs": {"dtype": "float32"}}  # fmt: skip
    args = SFTConfig(**(arguments | changed))
    rows = Dataset.from_dict({"input_ids": [list(range(4, 4 + length)) for length in LENGTHS]})
    return SFTTrainer(model=model_path, args=args, train_dataset=rows, eval_dataset=rows)


def test_evaluation_and_prediction_keep_their_rows(model_path: str, tmp_path: Path) -> None:
    from hf_dsvllm.speedups import apply

    trainer = sft(model_path, tmp_path)
    before = trainer.predict(trainer.eval_dataset).predictions.shape
    (outcome,) = apply(trainer, {"padding_free", "varlen", "unmasked"})[:1]
    assert outcome.reason is None
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[0] == 1
    trainer.train()
    assert trainer.predict(trainer.eval_dataset).predictions.shape == before
    assert next(iter(trainer.get_eval_dataloader()))["input_ids"].shape[0] == 3


def test_what_reads_rows_of_a_batch_keeps_them(model_path: str, tmp_path: Path) -> None:
    from transformers import default_data_collator

    from hf_dsvllm.speedups import apply

    def reason(trainer: Any, feature: str = "padding_free") -> str | None:
        return next(each.reason for each in apply(trainer, {feature}) if feature in each.features)

    assert "neftune" in str(reason(sft(model_path, tmp_path, neftune_noise_alpha=5.0)))
    own = sft(model_path, tmp_path)
    own.compute_loss_func = lambda *_: None
    assert "compute_loss_func" in str(reason(own))
    own = sft(model_path, tmp_path)
    assert reason(own, "varlen") == "no sequences are packed"
    own.data_collator = default_data_collator
    assert "cannot lay" in str(reason(own))
    assert "no labels" in str(reason(own, "unmasked"))
    own.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(sp_size=2, cp_size=1))
    assert "spread over processes" in str(reason(own, "unmasked"))
    mine = sft(model_path, tmp_path)
    mine.__class__ = type("Mine", (type(mine),), {"compute_loss": lambda *_: None, "__module__": "mine"})
    mine.__class__.compute_loss.__module__ = "mine"
    assert "Mine has steps of its own" in str(reason(mine))


def test_dora_takes_its_norm_in_fp32(model_path: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hf_dsvllm.speedups import casts_its_input

    base = AutoModelForCausalLM.from_pretrained(model_path)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], use_dora=True))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert layers
    assert not any(casts_its_input(layer) for layer in layers)
