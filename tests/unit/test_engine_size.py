"""How much the engine needs: the length of its sequences, the size of its cache, its GPUs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MambaConfig, Qwen3Config

from hf_dsvllm import engine_size, engine_start
from hf_dsvllm.engine.client import PROMPTS_IN_FLIGHT
from hf_dsvllm.engine_size import (
    copies,
    decode_steps,
    gpus_needed,
    kv_bytes_per_token,
    model_length,
    room_bytes,
    size_engine,
)
from hf_dsvllm.engine_start import engine_spec, transfer_backend, with_transfer
from hf_dsvllm.errors import ConfigError
from hf_dsvllm.placement import Place
from hf_dsvllm.task_settings import TaskSettings
from hf_dsvllm.tasks import load_task, render_prompt
from tests.tiny import write_tiny_model

GIB = 1 << 30
ON_CPU = Place(kind="cpu", cpu_threads=2, reason="the CPU")


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
    args = SimpleNamespace(
        gen_eval_max_new_tokens=50,
        gen_eval_samples=1,
        gen_eval_lm_eval=None,
        gen_eval_expose=None,
        gen_eval_steps=10,
        gen_eval_on_start=True,
        max_steps=100,
        num_train_epochs=1.0,
        eval_strategy="no",
        eval_steps=None,
    )
    model_args = SimpleNamespace(model_name_or_path=str(folder), model_revision=None, use_peft=False)
    return args, model_args, load_task(file), AutoTokenizer.from_pretrained(folder)


def test_on_a_cpu_the_longest_prompt_and_answer_fit_and_the_cache_is_whole(case: tuple[Any, Any, Any, Any]) -> None:
    args, model_args, task, tokenizer = case
    size = size_engine(ON_CPU, args, model_args, [task], tokenizer)
    longest = max(len(render_prompt(sample, tokenizer)) for sample in task.samples)
    assert size.max_model_len == longest + 50 + engine_size.TEMPLATE_SLACK_TOKENS
    assert size.kv_cache_bytes == GIB, "a small model's cache is the smallest one"
    assert "1.0 GiB of KV cache" in size.reason


def test_a_task_of_longer_answers_and_prompts_of_others_have_room_too(case: tuple[Any, Any, Any, Any]) -> None:
    args, model_args, task, tokenizer = case
    longer = dataclasses.replace(task, settings=TaskSettings(max_new_tokens=90))
    sizes = [size_engine(ON_CPU, args, model_args, tasks, tokenizer) for tasks in ([task], [task, longer])]
    assert sizes[1].max_model_len == sizes[0].max_model_len + 40
    args.gen_eval_lm_eval = ["gsm8k"]
    assert size_engine(ON_CPU, args, model_args, [], tokenizer).max_model_len == 1024  # all the tiny model takes


@pytest.mark.parametrize(("left", "length"), [(0, 1024), (10, 1024), (100, 988)])
def test_room_for_a_changed_template_ends_where_the_model_does(
    left: int, length: int, case: tuple[Any, Any, Any, Any]
) -> None:
    args, model_args, task, tokenizer = case
    longest = max(len(render_prompt(sample, tokenizer)) for sample in task.samples)
    args.gen_eval_max_new_tokens = 1024 - longest - left
    assert size_engine(ON_CPU, args, model_args, [task], tokenizer).max_model_len == length


def test_prompts_that_do_not_fit_with_their_answers_are_named_by_task_and_line(
    case: tuple[Any, Any, Any, Any], tmp_path: Path
) -> None:
    args, model_args, task, tokenizer = case
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": "x" * length, "reference": "y"} for length in (10, 980, *[2000] * 11)]
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        size_engine(ON_CPU, args, model_args, [task, load_task(file)], tokenizer)
    (problem,) = raised.value.problems
    assert problem.what.startswith("task long: prompt and answer take more than the 1024 tokens that the model takes")
    assert ": line 3 (980 + 50), line 5 (2000 + 50)," in problem.what
    assert problem.what.endswith(" and 2 more")
    assert "--gen_eval_max_new_tokens" in problem.fix


def rotary(**parameters: Any) -> Any:
    return LlamaConfig(max_position_embeddings=1000, rope_parameters={"rope_theta": 1e4, **parameters})


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(max_position_embeddings=1000), 1000),
        (rotary(rope_type="linear", factor=4.0), 4000),
        (rotary(rope_type="dynamic", factor=2.0), 2000),
        (rotary(rope_type="yarn", factor=4.0, original_max_position_embeddings=250), 1000),
        (
            rotary(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=125,
            ),
            1000,
        ),
        (Gemma3TextConfig(max_position_embeddings=1000), 1000),
        (GPT2Config(n_positions=512), 512),
        (MambaConfig(), None),
    ],
)
def test_the_longest_sequence_is_what_vllm_would_start_with(config: Any, length: int | None) -> None:
    assert model_length(config) == length


def test_the_cache_of_a_large_model_is_bounded(
    case: tuple[Any, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_size, "kv_bytes_per_token", lambda config, element_bytes: GIB)
    size = size_engine(ON_CPU, case[0], case[1], [case[2]], case[3])
    assert size.kv_cache_bytes == engine_size.MAX_KV_CACHE_BYTES


SPARE = Place(kind="spare", gpus=("1",), reason="")


def test_an_engines_own_gpu_holds_all_that_is_asked_at_a_time(
    case: tuple[Any, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 prompts, or as many of them as its room takes; on two GPUs half of each."""
    monkeypatch.setattr(engine_size, "kv_bytes_per_token", lambda config, element_bytes: GIB // 1024)
    many = dataclasses.replace(case[2], samples=case[2].samples * 150)
    size = size_engine(SPARE, case[0], case[1], [many], case[3], room=200 * GIB)
    assert size.kv_cache_bytes == 300 * size.max_model_len * GIB // 1024
    halves = size_engine(SPARE, case[0], case[1], [many], case[3], gpus=2, room=200 * GIB)
    assert halves.kv_cache_bytes == 300 * -(-size.max_model_len * GIB // 1024 // 2)
    assert size_engine(SPARE, case[0], case[1], [many], case[3], room=9 * GIB).kv_cache_bytes == 9 * GIB
    one = size_engine(SPARE, case[0], case[1], [case[2]], case[3], room=200 * GIB)
    beside = size_engine(SPARE, case[0], case[1], [case[2]], case[3])
    assert one.kv_cache_bytes == beside.kv_cache_bytes, "little is asked: as beside a trainer"


def test_clients_of_others_may_ask_as_many_as_are_ever_in_flight(
    case: tuple[Any, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_size, "kv_bytes_per_token", lambda config, element_bytes: 1024)
    case[0].gen_eval_expose = 8100
    size = size_engine(SPARE, case[0], case[1], [case[2]], case[3], room=10**15)
    assert size.kv_cache_bytes == PROMPTS_IN_FLIGHT * size.max_model_len * 1024


@pytest.mark.parametrize(
    ("weights", "held", "share", "room"),
    [(16, 0, 1.0, 52.0), (32, 20, 0.5, 8.0), (32, 21, 0.5, None), (62, 0, 1.0, None)],
)
def test_the_cache_has_what_weights_workspace_and_others_leave_of_a_gpu(
    weights: int, held: int, share: float, room: float | None
) -> None:
    found = room_bytes(80 * GIB, weights * GIB, held * GIB, share=share)
    assert found == (None if room is None else room * GIB)


@pytest.mark.parametrize(
    ("kind", "stream", "known", "room"),
    [
        ("spare", False, True, 80 * 0.9 - 16 - 4 - 2),
        ("shared", True, True, (80 * 0.9 - 16 - 4 - 20 - 2) / 2),
        ("shared", True, False, None),
        ("shared", False, True, None),
        ("cpu", False, True, None),
    ],
)
def test_an_engine_that_sleeps_beside_a_trainer_has_half_of_what_that_leaves(
    kind: Any, stream: bool, known: bool, room: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_start, "tensor_parallel_size", lambda *_: 1)
    monkeypatch.setattr(engine_start, "weights_bytes", lambda _: 16 * GIB)
    monkeypatch.setattr(engine_start, "smallest_card", lambda _: (80 * GIB, 78 * GIB))  # somebody has 2 of it
    place = Place(kind=kind, gpus=("0",), stream=stream, reason="")
    found = engine_start.cache_room(place, None, None, 20 * GIB if known else None)
    assert found == (1, None if room is None else int(room * GIB))


@pytest.mark.parametrize(
    ("more", "evaluations"),
    [
        ({}, 12),  # before, 10 between, after
        ({"gen_eval_steps": None}, 2),
        ({"gen_eval_on_start": False}, 11),
        ({"gen_eval_steps": None, "eval_strategy": "steps", "eval_steps": 0.25}, 6),
        ({"max_steps": -1, "num_train_epochs": 2.5}, 5),
    ],
)
def test_the_decoding_steps_of_a_run_are_counted(
    more: dict[str, Any], evaluations: int, case: tuple[Any, Any, Any, Any]
) -> None:
    args = SimpleNamespace(**vars(case[0]) | more)
    many = dataclasses.replace(case[2], samples=case[2].samples * 65, settings=TaskSettings(max_new_tokens=7))
    assert decode_steps(args, [case[2], many]) == evaluations * (50 + 3 * 7)  # 130 answers, 64 at a time
    assert decode_steps(args, [case[2], many], 130) == evaluations * (50 + 7)


@pytest.mark.parametrize(
    ("kind", "steps", "compiled"), [("spare", 1, False), ("spare", 10**5, True), ("shared", 10**5, False)]
)
def test_an_engine_is_compiled_where_the_run_is_long_enough_to_pay_for_it(
    kind: Any, steps: int, compiled: bool, case: tuple[Any, Any, Any, Any]
) -> None:
    case[0].max_steps = 10 * steps
    size = size_engine(Place(kind=kind, gpus=("0",), reason=""), case[0], case[1], [case[2]], case[3])
    assert size.compiled == compiled
    assert ("decoding steps" in size.reason) == (kind == "spare"), "the choice is told where there is one"


@pytest.mark.parametrize("trusted", [True, False])
def test_the_engine_trusts_the_models_code_as_the_trainer_does(
    trusted: bool, case: tuple[Any, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_start, "find_vllm", lambda _: Path("python"))
    more = {"gen_eval_tensor_parallel": None, "gen_eval_data_parallel": None, "vllm_python": None, "vllm_args": None}
    args = SimpleNamespace(**vars(case[0]), **more, fp16=False, seed=0, trust_remote_code=trusted)
    size = size_engine(ON_CPU, args, case[1], [case[2]], case[3])
    assert engine_spec("model", ON_CPU, size, args, case[1]).trust_remote_code == trusted


@pytest.mark.parametrize(("fp16", "kind", "dtype"), [(True, "spare", "float16"), (False, "spare", "bfloat16"),
                                                     (True, "cpu", "float32")])  # fmt: skip
def test_the_engine_computes_in_the_half_the_trainer_does(
    fp16: bool, kind: Any, dtype: str, case: tuple[Any, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_start, "find_vllm", lambda _: Path("python"))
    monkeypatch.setattr(engine_start, "tensor_parallel_size", lambda *_: 1)
    more = {"gen_eval_tensor_parallel": 1, "gen_eval_data_parallel": 1, "vllm_python": None, "vllm_args": None}
    args = SimpleNamespace(**vars(case[0]), **more, fp16=fp16, seed=0, trust_remote_code=False)
    place = ON_CPU if kind == "cpu" else Place(kind=kind, gpus=("1",), reason="")
    size = size_engine(place, args, case[1], [case[2]], case[3])
    assert engine_spec("model", place, size, args, case[1]).dtype == dtype


CONFIG = Qwen3Config(num_attention_heads=32)


@pytest.mark.parametrize(
    ("kind", "gpus", "asked", "weights_gib", "expected"),
    [
        ("spare", 4, None, 16, 1),
        ("spare", 4, None, 61, 1),  # 0.8 x 80 GiB
        ("spare", 4, None, 65, 2),
        ("spare", 3, None, 140, None),  # 3 does not divide 32 heads
        ("spare", 4, None, 140, 4),
        ("shared", 4, None, 33, 2),  # 0.4 x 80 GiB
        ("spare", 2, 2, 1, 2),
        ("spare", 2, 4, 1, None),
        ("spare", 3, 3, 1, None),
        ("spare", 1, None, None, 1),
    ],
)
def test_an_engine_spreads_over_as_many_gpus_as_its_weights_need(
    kind: Any, gpus: int, asked: int | None, weights_gib: int | None, expected: int | None
) -> None:
    place = Place(kind=kind, gpus=tuple(map(str, range(gpus))), reason="")
    weights_bytes = None if weights_gib is None else weights_gib * GIB
    if expected is None:
        with pytest.raises(ConfigError, match="fix: "):
            gpus_needed(place, asked, weights_bytes, 80 * GIB, CONFIG)
    else:
        assert gpus_needed(place, asked, weights_bytes, 80 * GIB, CONFIG) == expected


@pytest.mark.parametrize(
    ("kind", "gpus", "asked", "of_one", "expected"),
    [
        ("spare", 1, None, 1, 1),
        ("spare", 4, None, 1, 4),
        ("spare", 4, None, 2, 2),
        ("spare", 3, None, 2, 1),
        ("spare", 4, 3, 1, 3),
        ("spare", 4, 3, 2, None),
        ("shared", 4, None, 1, 1),  # its GPUs are the trainer's
        ("shared", 4, 4, 1, 4),
        ("shared", 4, 5, 1, None),
        ("cpu", 0, None, 1, 1),
        ("cpu", 0, 2, 1, 2),
    ],
)
def test_copies_fill_spare_gpus_and_no_others_unless_asked(
    kind: Any, gpus: int, asked: int | None, of_one: int, expected: int | None
) -> None:
    place = Place(kind=kind, gpus=tuple(map(str, range(gpus))), reason="")
    if expected is None:
        with pytest.raises(ConfigError, match=r"--gen_eval_data_parallel \d or less"):
            copies(place, asked, of_one)
    else:
        assert copies(place, asked, of_one) == expected


@pytest.mark.parametrize(
    ("kind", "version", "transfer"),
    [("shared", "0.26.0", None), ("shared", "0.27.1", "ipc"), ("spare", "0.26.0", "nccl")],
)
def test_a_vllm_that_would_not_start_for_a_stream_is_started_for_the_disk(
    kind: Any, version: str, transfer: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho \'{{"version": "{version}", "ray": false}}\'\n')
    python.chmod(0o755)
    place = Place(kind=kind, gpus=("0",), stream=True, reason="a test")
    assert transfer_backend(place, python) == transfer
    assert ("weights go to vLLM by disk: vLLM 0.26.0 imports ray" in capsys.readouterr().err) == (transfer is None)


@pytest.mark.parametrize(
    ("stream", "backend", "asked", "found"),
    [
        (True, "ipc", "auto", (True, "ipc")),
        (True, None, "auto", (False, None)),
        (True, None, "stream", (True, None)),  # by disk, and asleep between evaluations all the same
        (False, "ipc", "disk", (False, None)),
    ],
)
def test_a_vllm_that_takes_no_stream_is_served_by_disk_as_if_there_were_none(
    stream: bool, backend: Any, asked: str, found: tuple[bool, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_start, "find_vllm", lambda _: Path("python"))
    monkeypatch.setattr(engine_start, "transfer_backend", lambda *_: backend)
    place = Place(kind="shared", gpus=("0",), stream=stream, reason="")
    served, way = with_transfer(place, SimpleNamespace(gen_eval_weights=asked, vllm_python=None))
    assert (served.stream, way) == found
