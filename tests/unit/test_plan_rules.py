"""The field's rules of thumb come out of the planner's arithmetic, and bad requests are answered in one message."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dsvllm.errors import ConfigError
from hf_dsvllm.hardware import parse_machine
from hf_dsvllm.model_shape import ModelShape, shape_from_config
from hf_dsvllm.planner.cards import CARDS, rates_of
from hf_dsvllm.planner.explain import command_line, sentences, suggestions
from hf_dsvllm.planner.request import Request, job_of, parse_bytes
from hf_dsvllm.planner.search import Job, Plan, make_plan, usable_bytes
from hf_dsvllm.planner.view import show

GIB = 2**30
QWEN3 = {  # hidden, intermediate, layers, heads, key-value heads, tied
    "1.7b": (2048, 6144, 28, 16, 8, True),
    "8b": (4096, 12288, 36, 32, 8, False),
    "14b": (5120, 17408, 40, 40, 8, False),
    "32b": (5120, 25600, 64, 64, 8, False),
}


def config(name: str) -> dict[str, object]:
    hidden, inner, layers, heads, kv_heads, tied = QWEN3[name]
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
    }


LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def shape(name: str) -> ModelShape:
    return shape_from_config(LLAMA_70B if name == "70b" else config(name))


def plan(model: str, gpus: str, *, method: str = "full", ram_gib: int | None = 2048, **more: object) -> Plan:
    machine = parse_machine(gpus)
    options: dict[str, object] = {"length": 4096, "global_batch": 64, **more}
    return make_plan(
        Job(
            shape=shape(model),
            machine=machine,
            rates=rates_of(machine.gpus[0].name),
            method=method,  # type: ignore[arg-type]
            host_bytes=ram_gib and ram_gib * GIB,
            **options,  # type: ignore[arg-type]
        )
    )


def chosen_preset(found: Plan) -> str:
    assert found.chosen is not None
    return found.chosen.setup.preset.name


@pytest.mark.parametrize("model", ["8b", "14b"])
def test_models_of_8_and_14_billion_take_zero2_on_enough_80_gb_cards_and_more_sharding_or_offload_on_fewer(model):
    chosen = {count: chosen_preset(plan(model, f"{count}xH100-80GB")) for count in (1, 2, 4, 8)}
    assert chosen[8] == "zero2"
    assert "offload" in chosen[1]
    assert chosen[2].startswith("zero3") or "offload" in chosen[2]


def test_zero1_and_zero2_on_one_gpu_save_nothing_and_the_plan_says_so():
    found = plan("1.7b", "1xH100-80GB")
    assert any("on one GPU they save nothing" in sentence for sentence in sentences(found))
    states = {
        candidate.setup.preset.name: candidate.footprint.parts["optimizer"]["optimizer"]
        for candidate in found.candidates
        if candidate.setup.preset.name in ("zero1", "zero2")
    }
    assert states["zero1"] == states["zero2"] == 12 * shape("1.7b").parameters


def test_32b_on_one_80_gb_card_is_zero3_with_offload_and_much_host_ram_and_qlora_is_recommended_instead():
    found = plan("32b", "1xH100-80GB", ram_gib=1024)
    assert chosen_preset(found) == "zero3_offload"
    assert found.chosen is not None
    assert found.chosen.host.peak > 16 * shape("32b").parameters
    assert any("Recommended instead: qlora" in sentence for sentence in sentences(found))


def test_32b_on_one_80_gb_card_with_little_host_ram_fits_only_as_adapters_and_the_plan_says_what_would():
    found = plan("32b", "1xH100-80GB", ram_gib=256)
    assert found.chosen is None
    text = " ".join(suggestions(found.job))
    assert "lora" in text
    assert "of host RAM" in text


def test_a_32b_model_trains_on_a_40_gb_card_with_offload():
    assert chosen_preset(plan("32b", "1xA100-40GB", length=2048, global_batch=16)) == "zero3_offload"


def test_a_70b_model_trains_on_eight_80_gb_cards():
    found = plan("70b", "8xH100-80GB", length=2048)
    assert chosen_preset(found).startswith("zero3")


def test_going_from_one_card_to_four_changes_the_number_of_processes_and_nothing_of_the_preset():
    one, four = (plan("8b", f"{count}xH100-80GB", method="qlora", global_batch=4 * count) for count in (1, 4))
    first, second = (command_line(found, "MODEL").split() for found in (one, four))
    changed = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert changed == [("1", "4")]
    assert first[1] == second[1] == "--nproc_per_node"


def test_nothing_chosen_needs_more_than_the_card_has():
    for gpus in ("1xL4", "2xRTX4090", "4xA100-40GB", "8xB200"):
        found = plan("8b", gpus, method="any")
        if found.chosen is not None:
            assert found.chosen.gpu_bytes <= usable_bytes(found.job.gpu.memory_bytes, found.chosen.setup)


def test_every_candidate_keeps_the_global_batch():
    found = plan("8b", "4xH100-80GB", method="any", global_batch=24)
    for candidate in found.candidates:
        setup = candidate.setup
        assert setup.world * setup.micro * setup.accumulation == 24


def test_the_choice_is_the_same_every_time():
    first, second = (plan("14b", "4xH100-80GB", method="any") for _ in range(2))
    assert first.chosen == second.chosen
    assert [c.setup for c in first.candidates] == [c.setup for c in second.candidates]


def test_every_card_with_a_size_has_a_speed():
    from hf_dsvllm.hardware import CARDS_MIB

    assert set(CARDS) == set(CARDS_MIB)
    assert "measured" in rates_of("H200").source
    assert "data sheet" in rates_of("A100-80GB").source


def test_all_problems_of_a_request_come_in_one_message(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config("8b")), encoding="utf-8")
    request = Request(
        model=str(tmp_path), gpus="3xH100-80GB", seq_len=50000, global_batch=32, method="fulll", host_ram="much"
    )
    with pytest.raises(ConfigError) as caught:
        job_of(request)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "max_position_embeddings=40960" in text
    assert "--global_batch 30 or 33" in text
    assert "did you mean full?" in text
    assert "--host_ram much is not a size" in text


def test_a_batch_is_held_against_the_number_of_cards_that_nobody_knows(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config("8b")), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"(?s)'H1000' is not known.*--global_batch 60 or 64"):
        job_of(Request(model=str(tmp_path), gpus="4xH1000", global_batch=63))


def test_the_table_keeps_its_words_whole_in_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "config.json").write_text(json.dumps(config("8b")), encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "80")
    request = Request(model=str(tmp_path), gpus="1xA10-24GB", seq_len=4096, host_ram="64GB", eval_sequences=64)
    show(request, job_of(request))
    words = capsys.readouterr().out.split()
    assert {"recompute", "tokens/s", "verdict", "zero3_offload_optimizer", "zero3_offload+lora", "shared)"} <= set(
        words
    )


def test_an_unknown_model_and_an_unknown_card_are_named_with_the_nearest_cards(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        job_of(Request(model=str(tmp_path / "missing"), gpus="4xH300-80GB"))
    text = str(caught.value)
    assert "there is no model folder" in text
    assert "H100-80GB" in text


def test_a_config_without_a_needed_field_is_refused_by_name(tmp_path: Path):
    incomplete = {key: value for key, value in config("8b").items() if key != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(incomplete), encoding="utf-8")
    with pytest.raises(ConfigError, match="hidden_size"):
        job_of(Request(model=str(tmp_path), gpus="1xH100-80GB"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("512GB", 512 * 10**9), ("2 TB", 2 * 10**12), ("1.5GiB", 3 * 2**29), ("512G", 512 * 10**9), ("512Gi", 2**39)],
)
def test_sizes_are_read_as_written(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "0GB", "512", "12 parsecs"])
def test_what_is_no_size_is_none(text):
    assert parse_bytes(text) is None


def test_planning_imports_no_framework(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config("8b")), encoding="utf-8")
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom hf_dsvllm.cli import app\n"
        f"done = CliRunner().invoke(app, ['plan', {str(tmp_path)!r}, '--gpus', '4xH100-80GB', '--explain'])\n"
        "assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'peft', 'trl', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert '--nproc_per_node 4' in done.output, done.output\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_plan_as_json_and_as_a_page(tmp_path: Path):
    from typer.testing import CliRunner

    from hf_dsvllm.cli import app

    (tmp_path / "config.json").write_text(json.dumps(config("8b")), encoding="utf-8")
    page = tmp_path / "plan.html"
    done = CliRunner().invoke(
        app, ["plan", str(tmp_path), "--gpus", "4xH100-80GB", "--method", "full", "--json", "--html", str(page)]
    )
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["chosen"]["preset"] == record["candidates"][0]["preset"]
    assert record["chosen"]["gpu_peak_bytes"] == max(record["chosen"]["gpu_allocated_bytes"].values())
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "src=" not in text


def test_nothing_fits_is_exit_code_1_with_what_would(tmp_path: Path):
    from typer.testing import CliRunner

    from hf_dsvllm.cli import app

    (tmp_path / "config.json").write_text(json.dumps(config("32b")), encoding="utf-8")
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--gpus", "1xT4", "--method", "full", "--host_ram", "64GB"])
    assert done.exit_code == 1
    assert "Nothing fits" in done.output
    assert "What would fit" in done.output


MIXTRAL = {**LLAMA_70B, "model_type": "mixtral", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8}
MIXTRAL |= {"num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}


def test_adapters_of_a_mixture_of_experts_are_named_for_peft_takes_all_linear_to_mean_the_experts():
    machine = parse_machine("1xH100-80GB")
    job = Job(
        shape=shape_from_config(MIXTRAL),
        machine=machine,
        rates=rates_of("H100"),
        length=512,
        global_batch=4,
        method="lora",
    )
    targets = "--lora_target_modules q_proj k_proj v_proj o_proj"
    assert targets in command_line(make_plan(job), "MODEL")
    assert any("on the attention alone" in sentence for sentence in sentences(make_plan(job)))
    whole = dataclasses.replace(job, method="full")
    assert "--lora_target_modules" not in command_line(make_plan(whole), "MODEL")
    dense = dataclasses.replace(job, shape=shape("1.7b"))
    assert "--lora_target_modules" not in command_line(make_plan(dense), "MODEL")
