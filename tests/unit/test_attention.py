"""Batches without masks and without padding learn what padded ones with masks learn, where that is sure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_dsvllm.attention import TYPES
from tests.tiny import write_tiny_model

TOLERANCE = 2e-6  # of a loss in float32: another order of additions
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
        {"is_causal": False},
        {"use_bidirectional_attention": True},
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
    kind = type(own.data_collator)
    own.data_collator = type("Mine", (kind,), {"__module__": "mine"})(pad_token_id=0)
    assert reason(own) == "Mine cannot lay sequences end to end"
    own.data_collator = default_data_collator
    assert "cannot lay" in str(reason(own))
    assert "no labels" in str(reason(own, "unmasked"))
    own.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(sp_size=2, cp_size=1))
    assert "spread over processes" in str(reason(own, "unmasked"))
    divided = sft(model_path, tmp_path)
    divided.train_dataset = divided.train_dataset.add_column("seq_lengths", [[2, 3]] * len(divided.train_dataset))
    assert "seq_lengths" in str(reason(divided))
    patched = sft(model_path, tmp_path)
    patched._prepare_inputs = lambda inputs: inputs  # of the instance, by a script
    assert "steps of its own" in str(reason(patched))
    mine = sft(model_path, tmp_path)
    mine.__class__ = type("Mine", (type(mine),), {"compute_loss": lambda *_: None, "__module__": "mine"})
    mine.__class__.compute_loss.__module__ = "mine"
    assert "Mine has steps of its own" in str(reason(mine))


@pytest.mark.parametrize(("kind", "why"), [("prefix", "prompt learning"), ("alora", "aLoRA looks for its invocation")])
def test_adapters_that_count_on_whole_rows_keep_them(model_path: str, tmp_path: Path, kind: str, why: str) -> None:
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    from hf_dsvllm.speedups import apply

    trainer = sft(model_path, tmp_path)
    config = (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        if kind == "prefix"
        else LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    )
    trainer.model = get_peft_model(trainer.model, config)
    assert why in str([str(each) for each in apply(trainer, {"padding_free", "varlen"})])


def test_a_mask_of_one_token_is_no_mark_of_packed_sequences(model_path: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from hf_dsvllm.attention import drop_masks, use_varlen

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa")
    one = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    before = model(**one).logits
    assert use_varlen(model)
    drop_masks(model)
    assert torch.equal(model(**one).logits, before)


def test_a_model_that_was_pickled_whole_brings_its_attention(model_path: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    import torch
    from transformers import AutoModelForCausalLM

    from hf_dsvllm.attention import drop_masks, use_varlen

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa")
    use_varlen(model)
    drop_masks(model)
    torch.save(model, tmp_path / "whole.pt")
    script = (
        f"import torch; print(torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False)(torch.tensor([[5, 6]])))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("features", [{"unmasked"}, {"padding_free", "varlen"}], ids=["unmasked", "end to end"])
def test_a_model_has_its_own_attention_again_after_training(
    model_path: str, tmp_path: Path, features: set[str]
) -> None:
    from hf_dsvllm.speedups import apply, only_while_training

    trainer = sft(model_path, tmp_path)
    decoder, before = trainer.model.get_decoder(), trainer.model.config._attn_implementation
    apply(trainer, features)
    train = only_while_training(trainer)
    for _ in range(2):
        seen: list[bool] = []
        inner = trainer.compute_loss

        def watched(*args: Any, inner: Any = inner, seen: list[bool] = seen, **kwargs: Any) -> Any:
            seen.append(bool(decoder._forward_pre_hooks))
            return inner(*args, **kwargs)

        trainer.compute_loss = watched
        train()
        assert seen
        assert all(seen)
        assert not decoder._forward_pre_hooks
        assert trainer.model.config._attn_implementation == before
        trainer.compute_loss = inner
