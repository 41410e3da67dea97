"""The recipes as a user starts them: end to end with the export, under each launcher, and with mistakes at the door."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, RunDistributed
from tests.scripts.launch import Launched, launch
from tests.tiny import write_tiny_model
from tests.waiting import wait_for

RECIPES = ROOT / "recipes"
SHORT = ("--max_steps", "4", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_strategy", "no")
QUIET = ("--report_to", "none", "--learning_rate", "1e-2", "--lora_r", "4", "--lora_dropout", "0")


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(number: int, answer: str | None = None) -> dict[str, Any]:
    turns = [("user", f"count from {number}"), ("assistant", answer or f"{number + 1} {number + 2}")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and data for every recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    write_tiny_model(folder / "model")
    write_jsonl(folder / "chats.jsonl", [chat(number) for number in range(16)])
    write_jsonl(folder / "questions.jsonl", [chat(number) for number in range(20, 26)])
    pairs = [{"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(16)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(
        folder / "texts.jsonl", [{"text": f"The number {n} comes before the number {n + 1}. " * 4} for n in range(40)]
    )
    return folder


def flags(place: Path, out: Path, preset: str, data: str, *more: str) -> list[str]:
    named = ["--ds_preset", preset, "--model_name_or_path", str(place / "model"), "--train_file", str(place / data)]
    return [*named, "--output_dir", str(out), *SHORT, *QUIET, *more]


def assert_exported(out: Path, *, preset: str, adapter: bool) -> None:
    """The run folder is complete and its export is what was trained: proven equal, loadable, moved from the start."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["preset"] == preset
    latest = json.loads((out / "snapshots" / "latest.json").read_text(encoding="utf-8"))
    kind = "adapter" if adapter else "full"
    assert latest == {"path": "step-4", "step": 4, "kind": kind, "trained_to": 4}
    report = json.loads((out / "export" / "export_report.json").read_text(encoding="utf-8"))
    assert report["verification"] is not None, report["verification_skipped"]
    assert report["step"] == 4
    model = AutoModelForCausalLM.from_pretrained(out / "export", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out / "export").chat_template
    if not adapter:
        for key, tensor in load_file(out / "snapshots" / "step-4" / "model.safetensors").items():
            assert torch.equal(model.state_dict()[key], tensor.to(torch.bfloat16)), key
    start = AutoModelForCausalLM.from_pretrained(record["base_model"]).state_dict()
    moved = [
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start[key].to(torch.bfloat16))
    ]
    assert any("proj" in key for key in moved)


# -- end to end


@pytest.mark.distributed
def test_sft_under_zero2_by_torchrun(place: Path, tmp_path: Path, run_distributed: RunDistributed) -> None:
    evaluating = ("--test_file", str(place / "questions.jsonl"), "--eval_strategy", "steps", "--eval_steps", "2")
    given = flags(place, tmp_path / "run", "zero2", "chats.jsonl", "--max_length", "128", *evaluating)
    done = run_distributed(RECIPES / "sft.py", args=given)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "running: DeepSpeedEngine, ZeRO stage 2, 2 processes" in done.stderr
    assert "'eval_loss'" in done.stdout
    assert_exported(tmp_path / "run", preset="zero2", adapter=False)


@pytest.mark.slow
@pytest.mark.distributed
def test_dpo_with_adapters_under_zero2_by_torchrun(
    place: Path, tmp_path: Path, run_distributed: RunDistributed
) -> None:
    done = run_distributed(RECIPES / "dpo.py", args=flags(place, tmp_path / "run", "lora_zero2", "pairs.jsonl"))
    assert done.returncode == 0, done.stderr[-6000:]
    assert "running: DeepSpeedEngine, ZeRO stage 2, 2 processes" in done.stderr
    assert_exported(tmp_path / "run", preset="lora_zero2", adapter=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_continued_pretraining_under_zero3_by_accelerate(place: Path, tmp_path: Path, free_port: int) -> None:
    given = flags(place, tmp_path / "run", "zero3", "texts.jsonl", "--block_size", "64")
    two = ("--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port))
    done = launch(tmp_path, accelerate(*two, script="continued_pretraining.py", given=given))
    assert done.wait(300) == 0, done.output()[-6000:]
    assert "running: DeepSpeedEngine, ZeRO stage 3, 2 processes" in done.output()
    assert_exported(tmp_path / "run", preset="zero3", adapter=False)


@pytest.mark.slow
def test_qlora_in_one_process_by_accelerate(place: Path, tmp_path: Path) -> None:
    given = flags(place, tmp_path / "run", "qlora", "chats.jsonl", "--max_length", "128")
    done = launch(tmp_path, accelerate("--num_processes", "1", script="sft.py", given=given))
    assert done.wait(300) == 0, done.output()[-6000:]
    assert_exported(tmp_path / "run", preset="qlora", adapter=True)


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs accelerate starts what it is asked for")
def test_accelerate_that_starts_fewer_processes_than_asked_for_is_one_clear_error(place: Path, tmp_path: Path) -> None:
    given = flags(place, tmp_path / "run", "zero2", "chats.jsonl")
    done = launch(tmp_path, accelerate("--cpu", "--num_processes", "2", script="sft.py", given=given))
    assert done.wait(120) != 0
    assert done.output().count("the launcher was asked for 2 processes and started 1") == 1
    assert "torchrun --nproc_per_node 2" in done.output()
    assert not (tmp_path / "run").exists()


def accelerate(*options: str, script: str, given: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *options, str(RECIPES / script), *given]


# -- mistakes at the door

Door = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Door]:
    """`refused(recipe, *flags)` runs a recipe that must end with exit code 2 before any model is loaded; its stderr."""
    from transformers import PreTrainedModel

    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded before the mistake was found")

    def run(recipe: str, *given: str) -> str:
        monkeypatch.setattr(sys, "argv", [recipe, "--output_dir", str(tmp_path / "run"), "--report_to", "none", *given])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(RECIPES / recipe), run_name="__main__")
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        assert "Traceback" not in said
        assert said.count("hf-dsvllm: error:") == 1
        assert not (tmp_path / "run").exists()
        return said

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    monkeypatch.chdir(tmp_path)
    yield run
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_missing_train_file_is_named_with_what_lies_beside_it(refused: Door, place: Path) -> None:
    model = ("--model_name_or_path", str(place / "model"))
    said = refused("sft.py", *model, "--train_file", str(place / "chat.jsonl"))
    assert f"{place / 'chat.jsonl'} does not exist" in said
    assert "chats.jsonl" in said


def test_a_broken_line_of_training_data_is_named(refused: Door, place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(chat(1)) + "\n" + '{"messages": [\n' + json.dumps(chat(2)) + "\n", encoding="utf-8")
    said = refused("sft.py", "--model_name_or_path", str(place / "model"), "--train_file", str(broken))
    assert "broken.jsonl" in said
    assert "line 2" in said
    assert "one JSON object a line" in said


def test_columns_no_recipe_can_use_are_named(refused: Door, place: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": "?", "answer": "!"}])
    said = refused("dpo.py", "--model_name_or_path", str(place / "model"), "--train_file", str(data))
    assert "question, answer" in said
    assert "chosen, rejected" in said


def test_a_missing_model_folder_is_named_with_the_nearest(refused: Door, place: Path) -> None:
    model = ("--model_name_or_path", str(place / "modle"))
    said = refused("continued_pretraining.py", *model, "--train_file", str(place / "texts.jsonl"))
    assert f"model folder {place / 'modle'} does not exist" in said
    assert f"did you mean {place / 'model'}?" in said


def test_an_unknown_preset_is_answered_with_the_nearest(refused: Door, place: Path) -> None:
    said = refused("sft.py", "--ds_preset", "zeros2", *training(place))
    assert "zeros2" in said
    assert "zero2" in said


def test_a_missing_chat_template_is_found_before_an_evaluation_needs_it(
    refused: Door, place: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(place / "model", bare)
    (bare / "chat_template.jinja").unlink()
    given = ("--model_name_or_path", str(bare), "--train_file", str(place / "chats.jsonl"))
    said = refused("sft.py", *given, "--gen_eval_file", str(place / "questions.jsonl"), "--ds_preset", "lora")
    assert "chat template" in said
    assert "--chat_template_path" in said


def test_a_broken_evaluation_file_is_named_with_its_line(refused: Door, place: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(chat(1)) + '\n{"prompt": "no reference"}\n', encoding="utf-8")
    said = refused("sft.py", *training(place), "--gen_eval_file", str(questions))
    assert "questions.jsonl: 1 line cannot be used" in said
    assert "line 2" in said


def test_two_deepspeed_configurations_are_one_too_many(refused: Door, place: Path, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}', encoding="utf-8")
    said = refused("sft.py", *training(place), "--ds_preset", "zero2", "--deepspeed", str(config))
    assert "--deepspeed and --ds_preset zero2 both bring a DeepSpeed configuration" in said


def training(place: Path) -> tuple[str, ...]:
    return ("--model_name_or_path", str(place / "model"), "--train_file", str(place / "chats.jsonl"))


# -- with vLLM

with_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
READY_S = 400
# vLLM serves adapters slowly on CPUs, so there they are merged into a copy of the base.
ADAPTERS_GO_BY = "hot-load" if torch.cuda.is_available() else "merge + reload"


def evaluated(place: Path, out: Path, preset: str, *more: str) -> Launched:
    """The SFT recipe in two processes, evaluating by generation before, at step 2 and at the end."""
    asking = ("--gen_eval_file", str(place / "questions.jsonl"), "--gen_eval_steps", "2")
    given = flags(place, out, preset, "chats.jsonl", "--max_length", "128", *asking, "--gen_eval_max_new_tokens", "8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return launch(out.parent, [*command, str(RECIPES / "sft.py"), *given, *more])


@pytest.mark.parametrize(
    ("preset", "paths"),
    [
        pytest.param("zero2", ["start", "reload", "reload"], marks=with_vllm),
        pytest.param("lora_zero2", ["start", ADAPTERS_GO_BY, ADAPTERS_GO_BY], marks=with_vllm),
    ],
)
def test_sft_with_vllm_scores_before_between_and_after(
    preset: str, paths: list[str], place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    late = preset == "lora_zero2"  # training goes on while vLLM starts and answers
    saving = ("--save_strategy", "steps", "--save_steps", "4")
    run = evaluated(place, out, preset, *saving, "--gen_eval_late", str(late).lower())
    assert run.wait(READY_S + 120) == 0, run.output()[-6000:]
    assert run.left() == []
    rows = [json.loads(line) for line in (out / "evals" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert [row["weights_path"] for row in rows] == paths
    for row in rows:
        assert row["scores"].keys() == {"eval_gen_questions_exact_match"}
        assert row["samples"] == 6
        assert row["proof"].startswith("weights proven: mean |log-probability difference|"), row["proof"]
        samples = (out / "evals" / f"step-{row['step']:06d}.questions.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(samples) == 6
        assert json.loads(samples[0])["reference"] == "21 22"
    history = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [row["step"] for row in history if "eval_gen_questions_exact_match" in row] == [0, 2, 4]
    assert not (out / "engine" / "vllm-2.log").exists(), "the engine was started more than once"
    assert_exported(out, preset=preset, adapter=preset != "zero2")


@pytest.mark.parametrize("preset", [pytest.param("lora_zero2", marks=with_vllm)])
def test_no_engine_outlives_a_killed_run(preset: str, place: Path, tmp_path: Path) -> None:
    """With a real vLLM; what else can be killed is in test_faults.py and test_run_command_line.py."""
    out = tmp_path / "run"
    run = evaluated(place, out, preset, "--max_steps", "100000", "--gen_eval_steps", "100000")
    try:
        wait_for((out / "evals" / "scores.jsonl").exists, run.ended, timeout_s=READY_S)
        assert len([process for process in run.left() if "VLLM" in name_of(process)]) >= 1
        rank_zero(run.left()).kill()
        assert run.wait(90) != 0
        # The supervisor gives vLLM ten seconds to leave by itself before it kills.
        _, alive = psutil.wait_procs(run.left(), timeout=40)
        assert alive == []
    finally:
        run.kill()


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


def rank_zero(processes: Sequence[psutil.Process]) -> psutil.Process:
    """The trainer of rank 0 among the processes of a run."""
    for process in processes:
        if "sft.py" in name_of(process) and process.environ().get("RANK") == "0":
            return process
    raise AssertionError("rank 0 is not running")
