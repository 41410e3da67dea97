"""What is asked for: every mistake has an answer, and where nothing fits there is a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm import hardware
from hf_dsvllm.errors import ConfigError
from hf_dsvllm.hardware import Machine, parse_machine
from hf_dsvllm.planner import request as requests
from hf_dsvllm.planner.explain import command_line, sentences, suggestions
from hf_dsvllm.planner.request import Request, job_of, lacks_formulas
from hf_dsvllm.planner.search import make_plan
from hf_dsvllm.planner.view import show
from tests.unit.test_plan_rules import config, plan

GIB = 2**30


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "config.json").write_text(json.dumps(config("8b")), encoding="utf-8")
    return str(tmp_path)


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        job_of(Request(**fields))
    return str(caught.value)


def test_nothing_fits_on_a_machine_without_gpu_is_said_with_a_way_out(
    eight: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requests, "detect", lambda: Machine(gpus=(), cpu_count=2, ram_bytes=24 * GIB))
    asked = Request(model=eight, method="full")
    assert show(asked, job_of(asked)) is False
    text = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits on this machine (no GPU, 2 CPUs, 24.0 GiB RAM)" in text
    assert "of host RAM" in text
    assert "--gpus 4xH100-80GB plans for another machine" in text


@pytest.mark.parametrize("gpus", ["50000000xH100", "1025 x H100-80GB"])
def test_more_gpus_than_there_are_is_refused_at_once(eight: str, gpus: str) -> None:
    assert "more than 1,024 GPUs" in refusal(model=eight, gpus=gpus, global_batch=1)


def test_evaluations_that_cannot_be_are_refused(eight: str) -> None:
    text = refusal(model=eight, gpus="1xH100", eval_sequences=-4, host_ram="512")
    assert "--eval_sequences -4" in text
    assert "--host_ram 512 has no unit" in text
    assert "--host_ram 512GB" in text
    assert "--eval_length 0" in refusal(model=eight, gpus="1xH100", eval_sequences=4, eval_length=0)
    assert "--eval_length 99999" in refusal(model=eight, gpus="1xH100", eval_sequences=4, eval_length=99999)
    assert job_of(Request(model=eight, gpus="1xH100", eval_length=99999)).evaluation is None


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_planned(
    eight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Request(model=eight, gpus="1xH100")
    with pytest.raises(ConfigError, match="is a folder"):
        show(asked, job_of(asked), html_file=tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        show(asked, job_of(asked), html_file=tmp_path / "file" / "plan.html")
    assert capsys.readouterr().out == ""


def test_a_large_model_on_a_small_card_as_lora_is_answered_with_qlora_on_shorter_sequences() -> None:
    found = plan("32b", "1xRTX4090", method="lora", ram_gib=64, length=2048, global_batch=32)
    assert found.chosen is None
    assert "qlora on the same machine with 1,024 tokens" in suggestions(found.job)


def test_adapters_that_wait_for_the_host_are_not_suggested_while_others_fit() -> None:
    found = plan("32b", "1xH100-80GB", ram_gib=256)
    assert suggestions(found.job)[0].startswith(("lora", "qlora"))


def test_more_cards_come_with_the_host_memory_of_their_machines() -> None:
    job = plan("32b", "8xL4", ram_gib=256, length=2048).job
    (text,) = [text for text in suggestions(job) if "L4" in text]
    assert text == "zero3_offload_optimizer on 32 x L4-24GB (4 machines)"  # 1 TiB of RAM, not 256 GiB


def test_sixteen_gpus_are_two_machines_and_the_plan_and_its_command_say_so(eight: str) -> None:
    job = job_of(Request(model=eight, gpus="16xH100", method="full", host_ram="512G"))
    assert (job.nodes, job.host_bytes) == (2, 2 * 512 * 10**9)
    found = make_plan(job)
    assert "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --nproc_per_node 8" in command_line(found, eight)
    assert any("2 machines of 8" in sentence for sentence in sentences(found))
    assert job_of(Request(model=eight, gpus="8xH100")).nodes == 1


def test_a_machine_that_was_detected_is_one_however_many_gpus_it_has(
    eight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = parse_machine("16xV100-32GB").gpus
    monkeypatch.setattr(requests, "detect", lambda: Machine(gpus=gpus, cpu_count=64, ram_bytes=512 * GIB))
    assert (job_of(Request(model=eight)).nodes, hardware.MIB) == (1, 2**20)


def test_an_architecture_without_formulas_is_counted_on_the_model_itself(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hf_dsvllm.cli import app

    sizes = {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 512, "n_positions": 128}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}), encoding="utf-8")
    assert lacks_formulas(str(tmp_path)) == "gpt2"
    words = ["plan", str(tmp_path), "--gpus", "1xL4", "--seq_len", "64", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["counted_by"] == "trace"
    assert any("counted on the model itself" in sentence for sentence in found["why"])
    assert found["chosen"]["step_seconds"]["forward"] > 0


def test_what_formulas_count_says_so(eight: str) -> None:
    from hf_dsvllm.planner.explain import record

    assert lacks_formulas(eight) is None
    assert lacks_formulas("/nowhere/at/all") is None
    assert record(make_plan(job_of(Request(model=eight, gpus="1xH200"))), eight)["counted_by"] == "formulas"
