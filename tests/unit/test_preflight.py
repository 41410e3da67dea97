"""What a preset or an evaluation needs and this run or machine lacks is said before anything is loaded."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from transformers import TrainingArguments

from hf_dsvllm import arguments, metrics, preflight
from hf_dsvllm.errors import Problem
from hf_dsvllm.launch import Launch
from hf_dsvllm.presets import get_preset
from tests.door import leave, problems_of


@pytest.fixture(autouse=True)
def _left_behind() -> Iterator[None]:
    yield
    leave()


@pytest.mark.parametrize(
    ("kwargs", "what", "fix"),
    [
        ({"ds_preset": "zero3_nvme"}, "needs a folder on an NVMe disk", "--nvme_path FOLDER"),
        ({"ds_preset": "zero3_nvme", "nvme_path": "none"}, "needs a folder on an NVMe disk", "--nvme_path FOLDER"),
        ({"ds_preset": "zero3_nvme", "nvme_path": "absent/folder"}, "is not a folder", "mkdir -p absent/folder"),
        ({"ds_preset": "long_context"}, "needs 2 processes or more, 1 was started", "torchrun --nproc_per_node 2"),
        ({"ds_preset": "zero2_lowmem", "fp16": True}, "exists in bf16 only", "drop --fp16"),
        ({"ds_preset": "zero2_lowmem", "optim": "adafactor"}, "rounds small updates away", "drop --optim"),
        ({"ds_preset": "zero2", "fsdp": "full_shard"}, "--fsdp full_shard: its shards can be neither", "drop --fsdp"),
        (
            {"ds_preset": "ddp", "fsdp": "full_shard"},
            "--fsdp full_shard: its shards can be neither",
            "--ds_preset zero3",
        ),
        ({"export_to": "out", "fsdp": "full_shard"}, "--fsdp full_shard: its shards can be neither", "drop --fsdp"),
    ],
)
def test_a_preset_that_lacks_what_it_needs_is_one_problem(
    kwargs: dict[str, Any], what: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "links_libaio", lambda: True)
    (problem,) = problems_of(tmp_path, **kwargs)
    assert what in problem.what
    assert fix in problem.fix


def test_everything_an_nvme_preset_lacks_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "links_libaio", lambda: False)
    text = " ".join(map(str, problems_of(tmp_path, ds_preset="zero3_nvme", optim="adafactor")))
    assert "an NVMe disk" in text
    assert "libaio-dev" in text
    assert "optim=adafactor would silently become Adam with L2" in text


@pytest.mark.parametrize(("preset", "package"), [("zero2", "deepspeed"), ("qlora", "bitsandbytes")])
def test_a_missing_package_is_named_with_its_install_line(
    preset: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = preflight.importlib.util.find_spec
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    (problem,) = problems_of(tmp_path, ds_preset=preset)
    assert problem.fix == f"pip install {package}"


def test_an_offloading_preset_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "cxx_compiler", lambda: None)
    (problem,) = problems_of(tmp_path, ds_preset="zero3_offload")
    assert "no C++ compiler" in problem.what


def test_the_plain_preset_is_for_one_process(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    launch = Launch(rank=0, local_rank=0, world_size=2, local_world_size=2, launched=True, asked_processes=None)
    (problem,) = preflight.preset_problems(args, get_preset("none"), launch, "cpu", None)
    assert "for one process and 2 were started" in problem.what


def test_a_launcher_that_started_too_few_is_met_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hf_dsvllm.launch._parent_command", lambda: ["accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"]
    )
    (problem,) = problems_of(tmp_path, ds_preset="zero2")
    assert "asked for 2 processes and started 1" in problem.what


def test_a_preset_for_gpus_is_given_the_cpu_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert arguments._accelerator_problems("cuda") == []
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    (problem,) = arguments._accelerator_problems("cpu")
    assert "export DS_ACCELERATOR=cpu" in problem.fix
    monkeypatch.delitem(sys.modules, "deepspeed")
    assert arguments._accelerator_problems("cpu") == []
    assert os.environ["DS_ACCELERATOR"] == "cpu", "DeepSpeed is told before it is imported"


@pytest.mark.parametrize(
    ("cls", "preset", "given", "refused"),
    [
        ("DPOConfig", "zero2_lowmem", {}, True),
        ("KTOConfig", "zero2_lowmem", {}, True),
        ("RLOOConfig", "zero2_lowmem", {}, True),
        ("GRPOConfig", "zero2_lowmem", {"beta": 0.04}, True),
        ("GRPOConfig", "zero2_lowmem", {}, False),
        ("SFTConfig", "zero2_lowmem", {}, False),
        ("DPOConfig", "zero2", {}, False),
    ],
)
def test_bf16_master_weights_are_refused_where_trl_holds_a_second_model(
    cls: str, preset: str, given: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    problems = problems_of(tmp_path, getattr(trl, cls), ds_preset=preset, **given)
    assert [f"preset zero2_lowmem and {cls}" in problem.what for problem in problems] == [True] * refused
    assert all("--ds_preset zero2, or lora_zero2" in problem.fix for problem in problems)


# -- generation evaluation, as far as the arguments go


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"gen_eval_steps": 0}, "gen_eval_steps=0 is out of range"),
        ({"gen_eval_max_new_tokens": 0}, "gen_eval_max_new_tokens=0"),
        ({"gen_eval_temperature": -1.0}, "gen_eval_temperature=-1.0"),
        ({"gen_eval_samples": 0}, "gen_eval_samples=0 is out of range"),
        ({"gen_eval_samples": 4}, "asks for 4 answers to each prompt at temperature 0"),
        ({"gen_eval_expose": 70000}, "gen_eval_expose=70000: port 70000 of 127.0.0.1 cannot be had"),
        ({"gen_eval_timeout": 0.0}, "gen_eval_timeout=0.0"),
        ({"gen_eval_limit": 0}, "limit=0 would leave no sample"),
        ({"gen_eval_metrics": ["exakt_match"]}, "exakt_match"),
    ],
)
def test_a_number_or_metric_that_cannot_be_is_refused(
    kwargs: dict[str, Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_vllm", lambda python, device: python)
    file = tmp_path / "eval.jsonl"
    file.write_text('{"prompt": "2 + 2 =", "reference": "4"}\n', encoding="utf-8")
    (problem,) = problems_of(tmp_path, gen_eval_file=[str(file)], use_cpu=True, **kwargs)
    assert what in problem.what


def test_broken_evaluation_files_are_named_with_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_vllm", lambda python, device: python)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"prompt": "x", "reference": "y"}\n{"prompt"\n', encoding="utf-8")
    problems = problems_of(tmp_path, gen_eval_file=[str(first), str(second)], use_cpu=True)
    assert "a.jsonl" in problems[0].what
    assert "line 2" in problems[0].what or ":2" in problems[0].what
    assert "b.jsonl" in problems[1].what


def test_a_missing_vllm_is_found_before_training(tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    file.write_text('{"prompt": "2 + 2 =", "reference": "4"}\n', encoding="utf-8")
    (problem,) = problems_of(tmp_path, gen_eval_file=[str(file)], use_cpu=True, vllm_python=str(tmp_path / "python"))
    assert "cannot be run" in problem.what
    assert "drop --gen_eval_file" in problem.fix


def test_evaluation_options_without_prompts_are_refused(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, gen_eval_metrics=["contains"], use_cpu=True)
    assert problem.fix == "--gen_eval_file prompts.jsonl"


def test_a_port_that_is_taken_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_vllm", lambda python, device: python)
    file = tmp_path / "eval.jsonl"
    file.write_text('{"prompt": "a", "reference": "b"}\n')
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (problem,) = problems_of(tmp_path, gen_eval_file=[str(file)], gen_eval_expose=port, use_cpu=True)
    assert f"gen_eval_expose={port}" in problem.what


def test_tasks_of_lm_eval_need_no_file_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def check(names: tuple[str, ...]) -> list[Problem]:
        asked.append(names)
        return [Problem("gen_eval_lm_eval: there is no task 'gsm8kk'", "did you mean gsm8k?")]

    monkeypatch.setattr(preflight.harness, "check_tasks", check)
    monkeypatch.setattr(preflight, "find_vllm", lambda python, device: python)
    file = tmp_path / "gsm8kk.jsonl"
    file.write_text('{"prompt": "a", "reference": "b"}\n')
    (problem,) = problems_of(tmp_path, gen_eval_lm_eval=["gsm8kk,arc_easy"], use_cpu=True)
    assert "there is no task" in problem.what
    assert asked == [("gsm8kk", "arc_easy")]
    problems = problems_of(tmp_path, gen_eval_lm_eval=["gsm8kk"], gen_eval_file=[str(file)], use_cpu=True)
    assert "gen_eval_lm_eval and gen_eval_file both have a task gsm8kk" in problems[0].what


def test_a_port_without_anything_to_evaluate_is_said(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, gen_eval_expose=0, use_cpu=True)
    assert problem.what == "gen_eval options without prompts do nothing"


# -- the metric that steers


def steering_problems(folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, **kwargs: Any) -> tuple[Problem, ...]:
    """Of a run with the task orders (if there are metrics) whose references every built-in metric can use."""
    monkeypatch.setattr(preflight, "find_vllm", lambda python, device: python)
    monkeypatch.setattr(preflight.harness, "check_tasks", lambda names: [])
    monkeypatch.setattr(preflight.harness, "logged_tasks", lambda names: ("arc_easy", "wikitext", "mmlu"))
    file = folder / "orders.jsonl"
    file.write_text('{"prompt": "2 + 2 =", "reference": "4"}\n', encoding="utf-8")
    if "gen_eval_metrics" in kwargs:
        kwargs["gen_eval_file"] = [str(file)]
    return problems_of(folder, use_cpu=True, metric_for_best_model=wanted, **kwargs)


OWN = """
def total(completion: str, reference: str) -> bool:
    return completion == reference


def distance(completion: str, reference: str) -> float:
    return 1.0
"""


@pytest.mark.parametrize("prefix", ["eval_gen_", "gen_"])
@pytest.mark.parametrize("name", list(metrics.BUILT_IN))
def test_every_built_in_metric_may_steer(
    name: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = f"{prefix}orders_{name}"
    assert steering_problems(tmp_path, monkeypatch, wanted, gen_eval_metrics=[name]) == ()


@pytest.mark.parametrize(
    ("wanted", "kwargs"),
    [
        ("gen_orders_exact_match_pass_at_4", {"gen_eval_metrics": ["exact_match"]}),
        ("gen_orders_exact_match", {"gen_eval_metrics": ["exact_match"]}),
        ("gen_orders_total_pass_at_4", {"gen_eval_metrics": ["{own}:total"]}),
        ("gen_orders_distance", {"gen_eval_metrics": ["{own}:distance"], "greater_is_better": False}),
        ("gen_orders_distance", {"gen_eval_metrics": ["{own}:distance"], "greater_is_better": True}),
        ("gen_orders_judge", {"gen_eval_metrics": ["judge:http://127.0.0.1:1/v1?model=m"]}),
        ("gen_orders_second", {"gen_eval_metrics": ["judge:http://127.0.0.1:1/v1?model=m&name=second"]}),
        ("gen_arc_easy_acc_norm", {"gen_eval_lm_eval": ["ai2_arc"]}),
        ("eval_gen_mmlu_acc", {"gen_eval_lm_eval": ["ai2_arc"]}),
        ("gen_wikitext_word_perplexity", {"gen_eval_lm_eval": ["wikitext"], "greater_is_better": False}),
        ("eval_loss", {"gen_eval_metrics": ["exact_match"]}),
        ("eval_loss", {}),
    ],
)
def test_whatever_a_task_will_log_may_steer(
    wanted: str, kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN, encoding="utf-8")
    if "gen_eval_metrics" in kwargs:
        chosen = [name.replace("{own}", str(own)) for name in kwargs["gen_eval_metrics"]]
        kwargs = kwargs | {"gen_eval_metrics": chosen, "gen_eval_samples": 4, "gen_eval_temperature": 1.0}
    assert steering_problems(tmp_path, monkeypatch, wanted, **kwargs) == ()


@pytest.mark.parametrize(
    ("wanted", "kwargs", "fix"),
    [
        ("eval_gen_orders_exact_macth", {"gen_eval_metrics": ["exact_match"]}, "eval_gen_orders_exact_match?"),
        ("gen_order_exact_match", {"gen_eval_metrics": ["exact_match"]}, "eval_gen_orders_exact_match?"),
        ("gen_orders_exact_match_pass_at_8", {"gen_eval_metrics": ["exact_match"]}, "eval_gen_orders_exact_match?"),
        ("gen_arceasy_acc", {"gen_eval_lm_eval": ["ai2_arc"]}, "eval_gen_arc_easy_METRIC"),
        ("gen_x", {"gen_eval_metrics": ["rouge_l"]}, "there are: eval_gen_orders_rouge_l"),
    ],
)
def test_a_metric_that_no_task_logs_is_refused_with_the_nearest(
    wanted: str, kwargs: dict[str, Any], fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (problem,) = steering_problems(tmp_path, monkeypatch, wanted, **kwargs)
    assert problem.what == f"metric_for_best_model={wanted} is a score that no task of this run has"
    assert fix in problem.fix


def test_where_lm_evals_tasks_are_not_known_a_name_of_theirs_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ranks other than 0, or where lm-eval could not load them, which is a problem of its own."""
    monkeypatch.setattr(preflight, "find_vllm", lambda python, device: python)
    monkeypatch.setattr(preflight.harness, "check_tasks", lambda names: [])
    monkeypatch.setattr(preflight.harness, "logged_tasks", lambda names: None)
    given = {"gen_eval_lm_eval": ["ai2_arc"], "metric_for_best_model": "gen_arc_easy_acc"}
    assert problems_of(tmp_path, use_cpu=True, **given) == ()


def test_a_score_that_steers_without_prompts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = steering_problems(tmp_path, monkeypatch, "gen_orders_exact_match")
    assert "there are no prompts" in problem.what
    assert "--gen_eval_file" in problem.fix
    args = SimpleNamespace(metric_for_best_model="gen_len", predict_with_generate=True)
    assert preflight._unasked_problems(args) == [], "Seq2SeqTrainer's own"


@pytest.mark.parametrize(
    ("wanted", "greater", "kwargs"),
    [
        ("gen_wikitext_word_perplexity", None, {"gen_eval_lm_eval": ["wikitext"]}),
        ("eval_gen_wikitext_bits_per_byte", True, {"gen_eval_lm_eval": ["wikitext"]}),
        ("gen_orders_distance", None, {"gen_eval_metrics": ["{own}:distance"]}),
    ],
)
def test_a_metric_of_which_less_is_better_is_not_taken_for_its_opposite(
    wanted: str, greater: bool | None, kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN, encoding="utf-8")
    kwargs = {key: [value.replace("{own}", str(own)) for value in values] for key, values in kwargs.items()}
    (problem,) = steering_problems(tmp_path, monkeypatch, wanted, greater_is_better=greater, **kwargs)
    assert f"metric_for_best_model={wanted} is better the lower it is" in problem.what
    assert "--greater_is_better false" in problem.fix
    assert ("or true" in problem.fix) == ("own" in str(kwargs))


def test_a_name_that_only_looks_like_a_perplexity_is_none() -> None:
    assert metrics.less_is_better("byte_perplexity")
    assert metrics.less_is_better("ter_strict_match")
    assert not any(metrics.less_is_better(name) for name in (*metrics.BUILT_IN, "lossless", "filter", "acc_terse"))


# -- arguments for vLLM


@pytest.mark.parametrize(
    ("given", "what", "fix"),
    [
        ("--foo 'x", "cannot be taken apart into words: No closing quotation", "close its quotes"),
        ("--tensor-parallel-size 2", "vllm_args has --tensor-parallel-size", "--gen_eval_tensor_parallel N"),
        ("--x y -tp=2", "vllm_args has -tp", "--gen_eval_tensor_parallel N"),
        ("--data_parallel_size=2", "vllm_args has --data-parallel-size", "--gen_eval_data_parallel N"),
        ("-dp 2", "vllm_args has -dp", "--gen_eval_data_parallel N"),
    ],
)
def test_arguments_for_vllm_that_would_fail_later_are_refused(given: str, what: str, fix: str) -> None:
    (problem,) = preflight._vllm_args_problems(given)
    assert what in problem.what
    assert problem.fix == fix


@pytest.mark.parametrize("given", [None, "", '--max-num-seqs 8 --hf-overrides \'{"a": "-tp"}\'', "--dtype float32"])
def test_other_arguments_for_vllm_are_vllms_affair(given: str | None) -> None:
    assert preflight._vllm_args_problems(given) == []


def test_arguments_for_vllm_are_looked_at_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_vllm", lambda python, device: python)
    file = tmp_path / "eval.jsonl"
    file.write_text('{"prompt": "a", "reference": "b"}\n')
    (problem,) = problems_of(tmp_path, gen_eval_file=[str(file)], vllm_args="--foo 'x", use_cpu=True)
    assert "No closing quotation" in problem.what
