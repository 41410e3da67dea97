"""What the user asked for is told from what is a default, however arguments come into being."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import ModelConfig, SFTConfig, TrlParser

from hf_dsvllm.arguments import with_presets
from hf_dsvllm.given import was_given
from tests.door import enter

NAME = "gradient_checkpointing"


def test_a_keyword_is_given_and_a_default_is_not(tmp_path: Path) -> None:
    assert was_given(enter(tmp_path, SFTConfig, gradient_checkpointing=True), NAME)
    assert not was_given(enter(tmp_path, SFTConfig), NAME)
    assert was_given(copy.deepcopy(enter(tmp_path, gradient_checkpointing=True)), NAME)


@pytest.mark.parametrize("flag", ["--gradient_checkpointing=true", "--gradient-checkpointing", NAME])
def test_a_parser_gives_every_field_and_the_command_line_decides(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = HfArgumentParser(with_presets(TrainingArguments))
    line = ["train.py", "--output_dir", str(tmp_path), *([flag] if flag.startswith("--") else [])]
    monkeypatch.setattr("sys.argv", line)
    (args,) = parser.parse_args_into_dataclasses()
    assert was_given(args, NAME) == flag.startswith("--")
    assert was_given(dataclasses.replace(args), NAME) == flag.startswith("--")


@pytest.mark.parametrize("line", ["", "gradient_checkpointing: true\n"])
def test_the_yaml_file_of_trls_parser_gives_what_it_has(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path}/run\nreport_to: none\n{line}", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config)])
    args, _ = TrlParser((with_presets(SFTConfig), ModelConfig)).parse_args_and_config()
    assert was_given(args, NAME) == bool(line)


def test_the_file_beside_the_script_gives_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.args").write_text(f"--output_dir {tmp_path}\n--{NAME} true\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py")])
    (args,) = HfArgumentParser(with_presets(TrainingArguments)).parse_args_into_dataclasses()
    assert was_given(args, NAME)
    assert not was_given(args, "learning_rate")


def test_a_broken_yaml_file_is_left_to_the_parser(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("a: [", encoding="utf-8")
    args = object.__new__(TrainingArguments)
    assert not was_given(args, NAME, ["train.py", "--config", str(config)])
    assert not was_given(args, NAME, ["train.py", "--config", str(tmp_path / "absent.yaml")])
    assert not was_given(args, NAME, ["train.py", "--config"])
