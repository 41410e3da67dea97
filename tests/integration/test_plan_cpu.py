"""On CPUs, real runs take the host memory that the planner said, and plan.json keeps both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_tokenizer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "continued_pretraining.py"
LENGTH, MICRO = 128, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 million random parameters: enough to stand out beside the libraries' half gigabyte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = write_tiny_tokenizer(tmp_path_factory.mktemp("model"))
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("preset", "processes"), [("none", 1), ("zero2", 2)])
def test_host_memory_is_predicted_within_a_tenth(
    preset: str, processes: int, model: Path, tmp_path: Path, run_distributed: Callable[..., Any]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        json.dumps({"text": "one two three four five six seven eight nine ten " * 60}) + "\n", encoding="utf-8"
    )
    done = run_distributed(
        RECIPE,
        nproc=processes,
        args=(
            *("--ds_preset", preset, "--model_name_or_path", str(model), "--train_file", str(text)),
            *("--block_size", str(LENGTH), "--per_device_train_batch_size", str(MICRO), "--max_steps", "2"),
            *("--output_dir", str(tmp_path / "run"), "--export_to", "none", "--save_strategy", "no"),
            *("--report_to", "none"),
        ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    predicted = plan["predicted"]["host_bytes"] / 2**30
    measured = plan["measured"]["host_peak_all_gib"]
    assert plan["predicted"]["processes"] == processes
    assert 0.9 < predicted / measured < 1.1, (predicted, measured, plan["measured"]["phases"])
    assert f"host RAM: predicted {predicted:.2f} GiB, measured {measured:.2f} GiB" in done.stderr
    assert {"before training", "steps", "end"} <= set(plan["measured"]["phases"])
