"""What cannot be run is refused before a launcher starts, with what to run instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_dsvllm.errors import ConfigError
from hf_dsvllm.run.command import read_command

OURS = ("--ds_preset", "zero2")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file, text in {
        "train.py": "",
        "nb.ipynb": '{"cells": []}',
        "go.sh": "ls",
        "run.yaml": "ds_preset: zero2",
        "broken.py": "x = 1\nif x\n    pass\n",
        "scripts/one.py": "",
        "package/__main__.py": "",
        "plain/__init__.py": "",
        "plain/train.py": "raise SystemExit('imported')",
    }.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["nb.ipynb"], "nb.ipynb is a notebook", "jupyter nbconvert --to script nb.ipynb, then run nb.py"),
        (["go.sh"], "go.sh is a shell script", "the Python script that it starts"),
        (["run.yaml"], "run.yaml is no script", "SCRIPT --config run.yaml"),
        (["broken.py"], "broken.py is not Python: line 2: expected ':'", "correct it"),
        (["python", "train.py"], "python is no script: this command starts the processes", "leave python out"),
        (["/usr/bin/python3.11", "train.py"], "python3.11 is no script", "leave /usr/bin/python3.11 out"),
        (["torchrun", "train.py"], "torchrun is no script", "leave torchrun out"),
        (["scripts"], "script scripts is a folder", f"one of the scripts in it: {Path('scripts/one.py')}"),
        (["package"], "script package is a folder", "-m package"),
        (["--ds_preset", "zero2", "train.py"], "--ds_preset stands before the script", "SCRIPT --ds_preset …"),
        (["--num_proceses", "2", "train.py"], "--num_proceses is no option of this command", "mean --num_processes?"),
        (["trl"], "trl stands alone", "trl distillation, dpo, "),
        (["trl", "utils"], "trl utils is no training script", "sft"),
        (["trl", "ppo"], "trl ppo is no training script", "sft"),
    ],
)
def test_what_is_no_script_is_answered_by_what_to_run(words: list[str], what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_command([*words, *OURS])
    (problem,) = error.value.problems
    assert what in problem.what
    assert fix in problem.fix


def test_only_scripts_that_run_are_suggested() -> None:
    with pytest.raises(ConfigError) as error:
        read_command(["trl", "utils"])
    names = error.value.problems[0].fix.removeprefix("trl ").split(", ")
    assert "sft" in names
    for name in names:
        read_command(["trl", name, *OURS])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("train.py", "-m train.py is a file"),
        ("scripts/one", "-m scripts/one is a file"),
        ("no.such.module", "-m no.such.module: there is no such module here"),
        ("plain.none", "-m plain.none: there is no such module here"),
        ("plain", "-m plain is a package that has no __main__"),
    ],
)
def test_what_is_no_module_is_refused(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        read_command([name, *OURS], module=True)


@pytest.mark.parametrize("name", ["train", "plain.train", "package", "scripts.one", "json.tool", "trl.scripts.sft"])
def test_modules_are_found_without_being_imported(name: str) -> None:
    before = set(sys.modules)
    assert read_command([name, *OURS], module=True).target.file is not None
    assert not {"train", "plain", "package", "scripts"} & (set(sys.modules) - before)


def test_finding_trl_imports_no_framework() -> None:
    code = (
        "import sys; from hf_dsvllm.run.command import read_command;"
        "read_command(['trl.scripts.sft'], module=True); read_command(['trl', 'sft']);"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
