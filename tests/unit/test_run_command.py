"""Whose argument is it: the script's and ours are told apart anywhere on the command line, in YAML and .args files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_type_hints

import pytest
import transformers
import trl
from transformers import HfArgumentParser

from hf_dsvllm.errors import ConfigError
from hf_dsvllm.fields import PresetFields
from hf_dsvllm.run.command import AdapterOptions, Given, nearest_of_ours, read_command, read_rank, split


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A script in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("", encoding="utf-8")
    return "train.py"


def problems(error: pytest.ExceptionInfo[ConfigError]) -> str:
    return str(error.value)


def test_ours_are_taken_out_and_the_rest_keeps_its_order() -> None:
    words = [
        "data",
        "--lr",
        "1e-3",
        "--ds_preset",
        "zero3",
        "--flag",
        "--gen_eval_file",
        "a.jsonl",
        "b.jsonl",
        "--out=x",
    ]
    rest, ours, wrong = split(words)
    assert rest == ["data", "--lr", "1e-3", "--flag", "--out=x"]
    assert ours == {"ds_preset": "zero3", "gen_eval_file": ["a.jsonl", "b.jsonl"]}
    assert wrong == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ds-preset=zero2"], {"ds_preset": "zero2"}),
        (["--gen_eval_steps", "5"], {"gen_eval_steps": 5}),
        (["--gen_eval_temperature=0.5"], {"gen_eval_temperature": 0.5}),
        (["--gen_eval_on_start", "false"], {"gen_eval_on_start": False}),
        (["--gen_eval_on_start", "--x"], {"gen_eval_on_start": True}),
        (["--no_gen_eval_on_start"], {"gen_eval_on_start": False}),
        (["--no-gen-eval-on-start"], {"gen_eval_on_start": False}),
        (["--gen_eval_late", "false"], {"gen_eval_late": False}),
        (["--gen_eval_late=true"], {"gen_eval_late": True}),
        (["--gen_eval_late", "--x"], {"gen_eval_late": True}),
        (["--no_gen_eval_late"], {"gen_eval_late": False}),
        (["--vllm_args", "--enforce-eager --seed 1"], {"vllm_args": "--enforce-eager --seed 1"}),
        (["--vllm_args=--enforce-eager"], {"vllm_args": "--enforce-eager"}),
    ],
)
def test_every_way_to_write_a_flag_is_read_like_the_trainers_parser_would(
    words: list[str], expected: dict[str, object]
) -> None:
    assert split(words)[1:] == (expected, [])


# For each kind of field: a text, the value it is, a text it cannot be, what is wanted.
KINDS = {
    bool: ("False", False, "perhaps", "true or false"),
    int: ("3", 3, "3.5", "a whole number"),
    float: ("0.5", 0.5, "half", "a number"),
    str: ("some text", "some text", None, None),
    list[str]: ("some text", ["some text"], None, None),
}


@pytest.mark.parametrize(("name", "hint"), get_type_hints(PresetFields).items())
def test_every_field_is_read_as_its_kind(name: str, hint: object, script: str) -> None:
    kind = next(kind for kind in KINDS if hint in (kind, kind | None))
    text, value, wrong, wanted = KINDS[kind]
    assert split([f"--{name}", text]) == ([], {name: value}, [])
    parsed, *_ = HfArgumentParser(PresetFields).parse_args_into_dataclasses([f"--{name}", text])
    assert getattr(parsed, name) == value
    Path("run.yaml").write_text(f"{name}: {text}\n", encoding="utf-8")
    assert read_command([script, "--config", "run.yaml"]).value(name) == value
    if wrong is not None:
        Path("run.yaml").write_text(f"{name}: {wrong}\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=f"--{name} {wrong} is not {wanted}\n.*, in run.yaml"):
            read_command([script, "--config", "run.yaml"])
        assert f"--{name} {wrong} is not {wanted}" in str(split([f"--{name}={wrong}"])[2][0])


@pytest.mark.parametrize("field", dataclasses.fields(PresetFields), ids=lambda field: field.name)
def test_every_default_may_be_written_out_in_yaml(field: dataclasses.Field, script: str) -> None:
    Path("run.yaml").write_text(f"{field.name}: {json.dumps(field.default)}\n", encoding="utf-8")
    assert read_command([script, "--config", "run.yaml"]).value(field.name) == field.default


def test_what_stands_after_two_dashes_is_the_scripts() -> None:
    assert split(["--", "--ds_preset", "zero3"]) == (["--", "--ds_preset", "zero3"], {}, [])


def test_all_wrong_values_are_reported_at_once(script: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_command([script, "--gen_eval_steps", "many", "--gen_eval_temperature", "hot", "--ds_preset"])
    assert "--gen_eval_steps many is not a whole number" in problems(error)
    assert "--gen_eval_temperature hot is not a number" in problems(error)
    assert "--ds_preset has no value" in problems(error)


def test_a_wrong_path_names_the_nearest_scripts(script: str) -> None:
    with pytest.raises(ConfigError, match=r"script trian\.py does not exist\n.*did you mean train\.py"):
        read_command(["trian.py"])


def test_trl_and_a_name_stand_for_trls_own_script() -> None:
    command = read_command(["trl", "sft", "--ds_preset", "zero2", "--max_length", "8"])
    assert command.target.path is not None
    assert command.target.path.parts[-3:] == ("trl", "scripts", "sft.py")
    assert command.script_args == ("--max_length", "8")
    assert command.words[:2] == ("trl", "sft")


def test_ours_may_stand_in_the_yaml_file_of_trls_parser(script: str) -> None:
    Path("run.yaml").write_text("ds_preset: zero3\nlearning_rate: 0.1\n", encoding="utf-8")
    command = read_command([script, "--config", "run.yaml"])
    assert command.value("ds_preset") == "zero3"
    assert command.given["ds_preset"].place == "run.yaml"


def test_a_list_in_yaml_may_be_one_text_and_each_value_is_of_its_kind(script: str) -> None:
    Path("run.yaml").write_text(
        "gen_eval_file: e.jsonl\ngen_eval_metrics: [contains, bleu]\ngen_eval_temperature: 1\ngen_eval_late: 'no'\n",
        encoding="utf-8",
    )
    command = read_command([script, "--config", "run.yaml", "--gen_eval_file", "e.jsonl"])
    assert command.value("gen_eval_file") == ["e.jsonl"]
    assert command.value("gen_eval_metrics") == ["contains", "bleu"]
    assert command.value("gen_eval_temperature") == 1.0
    assert command.value("gen_eval_late") is False


def test_values_of_another_kind_in_yaml_are_refused_at_once(script: str) -> None:
    Path("run.yaml").write_text(
        "export_to: no\ngen_eval_file: [1]\ngen_eval_steps: [5]\ngen_eval_timeout:\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError) as error:
        read_command([script, "--config", "run.yaml"])
    assert '--export_to False is not text to YAML\n    fix: in quotes: "False", in run.yaml' in problems(error)
    assert "--gen_eval_file 1 is not text to YAML" in problems(error)
    assert "--gen_eval_steps [5] is not a whole number" in problems(error)
    assert "--gen_eval_timeout has no value" in problems(error)


def test_ours_may_stand_in_the_args_file_of_the_script(script: str) -> None:
    Path("train.args").write_text("--ds_preset lora --learning_rate 0.1\n", encoding="utf-8")
    assert read_command([script]).value("ds_preset") == "lora"


def test_two_places_that_differ_are_an_error_naming_both(script: str) -> None:
    Path("run.yaml").write_text("ds_preset: zero3\n", encoding="utf-8")
    Path("train.args").write_text("--gen_eval_limit 3", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_command([script, "--ds_preset", "zero2", "--config", "run.yaml", "--gen_eval_limit", "4"])
    assert "ds_preset: the command line says 'zero2', run.yaml says 'zero3'" in problems(error)
    assert "gen_eval_limit: the command line says 4, train.args says 3" in problems(error)


def test_two_places_that_agree_are_none(script: str) -> None:
    Path("run.yaml").write_text("ds_preset: zero3\n", encoding="utf-8")
    assert read_command([script, "--ds_preset", "zero3", "--config", "run.yaml"]).value("ds_preset") == "zero3"


def test_a_yaml_file_that_cannot_be_read_is_named(script: str) -> None:
    Path("run.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--config run\.yaml cannot be read"):
        read_command([script, "--config", "run.yaml"])


def test_a_rank_reads_what_the_parent_writes(script: str) -> None:
    adapter = AdapterOptions(lora_r=4, lora_dropout=0.0, lora_target_modules=("q_proj", "v_proj"))
    words = [script, "--seed", "1", "--ds_preset", "lora"]
    assert read_rank([*adapter.words(), *words]) == read_command(words, adapter=adapter)
    module = ["trl.scripts.sft", "--ds_preset", "lora"]
    assert read_rank(["-m", *module]) == read_command(module, module=True)


def test_all_linear_is_the_word_that_peft_reads() -> None:
    assert AdapterOptions(lora_target_modules=("all-linear",)).chosen() == {"lora_target_modules": "all-linear"}
    assert AdapterOptions(lora_target_modules=("q_proj",)).chosen() == {"lora_target_modules": ["q_proj"]}
    assert AdapterOptions(lora_target_modules=("all-linear",)).words() == ["--lora_target_modules", "all-linear"]


def test_adapter_options_of_a_script_stay_the_scripts(script: str) -> None:
    command = read_rank([script, "--lora_r", "4", "--ds_preset", "lora"])
    assert command.script_args == ("--lora_r", "4")
    assert command.adapter.chosen() == {}


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--ds_prest", "--ds_preset"), ("--ds-presets=zero3", "--ds_preset"), ("--gen_eval_files", "--gen_eval_file"),
     ("--ds_pre", "--ds_preset"), ("--no_gen_eval_lat", "--gen_eval_late"), ("--learning_rate", None),
     ("--ds_preset", None), ("--ds", None)],
)  # fmt: skip
def test_a_misspelt_flag_is_recognised(flag: str, near: str | None) -> None:
    assert nearest_of_ours(flag) == near


def test_no_flag_of_the_trainers_is_taken_for_a_misspelt_one_of_ours() -> None:
    kinds = [transformers.TrainingArguments, trl.ModelConfig, trl.ScriptArguments]
    kinds += [getattr(trl, f"{name}Config") for name in ("SFT", "DPO", "GRPO", "KTO", "Reward", "RLOO")]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert {name: near for name in names if (near := nearest_of_ours(f"--{name}"))} == {}


@pytest.mark.parametrize("flag", ["--gen_eval_fle", "--ds_pre=zero3", "--vllm-arg"])
def test_a_misspelt_flag_is_refused_before_a_script_can_ignore_it(flag: str, script: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is not one of ours, nor is it in the script\n    fix: did you mean"):
        read_command([script, flag, "x", "--ds_preset", "zero2"])


@pytest.mark.parametrize("spelt", ["--gen-eval-fle", "gen_eval_fle: str = 'x'"])
@pytest.mark.parametrize("file", ["train.py", "options.py"])
def test_a_flag_that_the_script_or_a_file_beside_it_knows_is_its_own(spelt: str, file: str, script: str) -> None:
    Path(file).write_text(f"# {spelt}", encoding="utf-8")
    command = read_command([script, "--gen_eval_fle", "x", "--ds_preset", "zero2"])
    assert command.script_args == ("--gen_eval_fle", "x")


def test_an_option_of_the_command_is_refused_where_nobody_would_read_it(script: str) -> None:
    words = [script, "--ds_preset", "zero2", "--num_processes", "2"]
    Path(script).write_text("TrainingArguments('out')", encoding="utf-8")
    with pytest.raises(ConfigError, match="fix: hf-dsvllm run --num_processes … SCRIPT: before the script"):
        read_command(words)
    for text in ("TrainingArguments(parse().out)", "from package import main; main()", "SFTConfig(num_processes=3)"):
        Path(script).write_text(text, encoding="utf-8")
        assert read_command(words).script_args == ("--num_processes", "2")


def test_a_flag_that_is_given_twice_is_not_half_dropped(script: str) -> None:
    with pytest.raises(ConfigError, match=r"--gen_eval_file is given twice: a b, then c\n.*fix: --gen_eval_file a b c"):
        read_command([script, "--gen_eval_file", "a", "b", "--gen_eval_file", "c"])
    with pytest.raises(ConfigError, match="--ds_preset is given twice: zero2, then zero3"):
        read_command([script, "--ds_preset", "zero2", "--ds_preset=zero3"])
    assert read_command([script, "--ds_preset", "zero2", "--ds_preset", "zero2"]).value("ds_preset") == "zero2"


def test_a_value_that_looks_like_a_flag_is_told_its_spelling(script: str) -> None:
    with pytest.raises(ConfigError, match=r"fix: --vllm_args=--enforce-eager if --enforce-eager is the value"):
        read_command([script, "--vllm_args", "--enforce-eager"])


@pytest.mark.parametrize("words", [["--config=run.json"], ["--config", "run.json"], ["run.json"]])
def test_ours_may_stand_in_the_json_of_the_script(words: list[str], script: str) -> None:
    Path("run.json").write_text(json.dumps({"ds_preset": "zero3", "max_steps": 2}), encoding="utf-8")
    command = read_command([script, *words])
    assert command.given["ds_preset"] == Given("zero3", "run.json")
    assert command.own["max_steps"] == "2"


def test_ours_may_stand_in_a_yaml_joined_to_its_flag(script: str) -> None:
    Path("run.yaml").write_text("ds_preset: zero3\n", encoding="utf-8")
    assert read_command([script, "--config=run.yaml"]).value("ds_preset") == "zero3"


def test_ours_may_stand_in_the_args_file_of_a_module(script: str) -> None:
    Path("package").mkdir()
    Path("package/train.py").touch()
    Path("package/train.args").write_text("--ds_preset lora", encoding="utf-8")
    assert read_command(["package.train"], module=True).value("ds_preset") == "lora"
