"""Where the engine runs beside a trainer, and the size of its cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config

from hf_dsvllm import placement
from hf_dsvllm.placement import choose_gpu, kv_bytes_per_token, place_engine, visible_gpus
from hf_dsvllm.tasks import load_task, render_prompt
from tests.tiny import write_tiny_model

GIB = 1 << 30


@pytest.mark.parametrize(
    ("visible", "training", "chosen", "shared"),
    [
        (["0"], 1, "0", True),
        (["0", "1"], 1, "1", False),
        (["4", "7", "9"], 2, "9", False),
        (["2", "3"], 2, "2", True),
        (["GPU-aa", "GPU-bb"], 1, "GPU-bb", False),
    ],
)
def test_a_gpu_the_trainer_leaves_free_is_taken_first(
    visible: list[str], training: int, chosen: str, shared: bool
) -> None:
    device, reason = choose_gpu(visible, training)
    assert device == chosen
    assert ("shared with the trainer" in reason) == shared


def test_visible_gpus_are_named_as_the_user_named_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 3, GPU-ab ,")
    assert visible_gpus() == ["3", "GPU-ab"]


@pytest.mark.parametrize(
    ("config", "bytes_per_token"),
    [
        # 2 x 28 layers x 8 heads x 128 x 2 bytes: Qwen3-1.7B's published shape
        (Qwen3Config(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128), 114_688),
        # no head_dim of its own: 64 / 2 = 32
        (LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1), 256),
    ],
)
def test_the_cache_of_a_token_follows_the_models_shape(config: Any, bytes_per_token: int) -> None:
    assert kv_bytes_per_token(config, element_bytes=2) == bytes_per_token
    assert kv_bytes_per_token(config, element_bytes=4) == 2 * bytes_per_token


@pytest.fixture
def case(tmp_path: Path) -> tuple[Any, Any, Any, Any]:
    """Arguments, model arguments, one task and the tokenizer of a tiny model."""
    from transformers import AutoTokenizer

    folder = write_tiny_model(tmp_path / "model")
    file = tmp_path / "eval.jsonl"
    file.write_text('{"prompt": "short", "reference": "x"}\n{"prompt": "rather longer", "reference": "y"}\n')
    args = SimpleNamespace(gen_eval_max_new_tokens=50, gen_eval_lm_eval=None, gen_eval_expose=None)
    model_args = SimpleNamespace(model_name_or_path=str(folder), model_revision=None, use_peft=False)
    return args, model_args, load_task(file), AutoTokenizer.from_pretrained(folder)


def test_on_a_cpu_the_longest_prompt_and_answer_fit_and_the_cache_is_whole(case: tuple[Any, Any, Any, Any]) -> None:
    args, model_args, task, tokenizer = case
    placed = place_engine("cpu", args, model_args, [task], tokenizer)
    longest = max(len(render_prompt(sample, tokenizer)) for sample in task.samples)
    assert placed.max_model_len == longest + 50 + placement.TEMPLATE_SLACK_TOKENS
    assert placed.visible_devices is None
    assert placed.cpu_threads is not None
    assert placed.cpu_threads >= 1
    assert placed.kv_cache_bytes == GIB, "a small model's cache is the smallest one"
    assert "on the CPU" in placed.reason


def test_on_gpus_the_choice_and_the_size_are_explained(
    case: tuple[Any, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    placed = place_engine("cuda", case[0], case[1], [case[2]], case[3])
    assert placed.visible_devices == "1"
    assert placed.cpu_threads is None
    assert "GPU 1, which the trainer does not use" in placed.reason
    assert "1.0 GiB of KV cache" in placed.reason


def test_the_cache_of_a_large_model_is_bounded(
    case: tuple[Any, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "kv_bytes_per_token", lambda config, element_bytes: GIB)
    placed = place_engine("cpu", case[0], case[1], [case[2]], case[3])
    assert placed.kv_cache_bytes == placement.MAX_KV_CACHE_BYTES
