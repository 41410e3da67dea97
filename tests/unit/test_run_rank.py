"""A rank runs the script as python itself would: same `__main__`, argv, path, pickling, tracebacks and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.launch import launch
from tests.waiting import wait_for

# What a script can see of the way it was started.
SEEN = """
import json, multiprocessing, pickle, sys
import beside


class Thing:
    pass


def double(x):
    return 2 * x


if __name__ == "__main__":
    copy = pickle.loads(pickle.dumps(Thing()))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        doubled = pool.map(double, [1, 2])
    spec = sys.modules["__main__"].__spec__
    print(json.dumps({
        "argv": sys.argv, "path": sys.path[0], "file": __file__, "name": __name__, "package": __package__,
        "main": sys.modules["__main__"].__dict__ is globals(), "same": type(copy) is Thing, "doubled": doubled,
        "beside": beside.__file__, "spec": spec and spec.name, "imported": sorted({"torch", "trl"} & set(sys.modules)),
    }))
"""
OURS = ("--ds_preset", "zero3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`scripts/seen.py` with a module beside it, and the same as a package."""
    for name in ("scripts", "pkg"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "seen.py").write_text(SEEN, encoding="utf-8")
        (tmp_path / name / "beside.py").write_text("", encoding="utf-8")
    text = SEEN.replace("import beside", "from . import beside")
    (tmp_path / "pkg" / "seen.py").write_text(text, encoding="utf-8")
    return tmp_path


def python(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | env, capture_output=True, text=True, check=False
    )


def as_rank(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "hf_dsvllm.run", *words, *OURS, **env)


@pytest.mark.parametrize("words", [("scripts/seen.py", "a", "--b"), ("-m", "pkg.seen", "a", "--b")])
def test_a_script_sees_what_it_sees_under_python(words: tuple[str, ...], folder: Path) -> None:
    plain, ours = python(folder, *words), as_rank(folder, *words)
    assert plain.returncode == 0, plain.stderr
    assert ours.stdout == plain.stdout, ours.stderr


def test_a_script_is_compiled_without_our_future_imports(folder: Path) -> None:
    text = "import dataclasses\n\n\n@dataclasses.dataclass\nclass A:\n    x: int = 0\n\n\n"
    (folder / "kinds.py").write_text(f"{text}print(dataclasses.fields(A)[0].type)\n", encoding="utf-8")
    assert as_rank(folder, "kinds.py").stdout == "<class 'int'>\n"


def test_a_script_that_is_not_a_trainer_script_is_told_so(folder: Path) -> None:
    ended = as_rank(folder, "scripts/seen.py")
    assert ended.returncode == 2
    assert "the script made no TrainingArguments: it is not a Trainer script" in ended.stderr


@pytest.mark.parametrize(
    ("code", "expected"),
    [("import sys; sys.exit(3)", 3), ("raise SystemExit('bye')", 1), ("1 / 0", 1), ("raise KeyboardInterrupt", 130)],
)
def test_the_exit_code_is_kept_and_left_for_the_parent(code: str, expected: int, folder: Path) -> None:
    (folder / "end.py").write_text(code, encoding="utf-8")
    ended = as_rank(folder, "end.py", HF_DSVLLM_EXIT_FILE=str(folder / "code"))
    assert ended.returncode == expected
    assert (folder / "code").read_text(encoding="utf-8") == str(expected)
    assert ("bye" in ended.stderr) == ("bye" in code)


OUT_OF_MEMORY = """
import os

from hf_dsvllm.errors import GpuMemoryError

if os.environ["RANK"] == "1":
    try:
        raise MemoryError("2 GiB too much")
    except MemoryError as cause:
        raise GpuMemoryError("take a smaller batch") from cause
"""


def test_an_error_of_ours_on_another_rank_is_said(folder: Path) -> None:
    (folder / "end.py").write_text(OUT_OF_MEMORY, encoding="utf-8")
    ended = as_rank(folder, "end.py", RANK="1")
    assert ended.returncode == 2
    assert "hf-dsvllm: error: rank 1: take a smaller batch" in ended.stderr
    assert "cause: MemoryError at end.py:8: 2 GiB too much" in ended.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("code", "said"),
    [(f"{OUT_OF_MEMORY}else:\n    import time\n    time.sleep(600)\n", "rank 1: take a smaller batch"),
     ("import time; time.sleep(1)", "the script made no TrainingArguments")],
    ids=["one rank", "all ranks"],
)  # fmt: skip
def test_what_any_rank_and_what_all_ranks_say_is_said_once(code: str, said: str, folder: Path) -> None:
    (folder / "end.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "hf_dsvllm", "run", "--num_processes", "2", str(folder / "end.py"), *OURS]
    run = launch(folder, command)
    try:
        assert run.wait(120) == 2, run.output()
        assert run.output().count("hf-dsvllm: error:") == run.output().count(said) == 1, run.output()
    finally:
        run.kill()


# A launcher that starts one rank without naming it, as accelerate's does, and hands no signal on.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'hf_dsvllm.run', *sys.argv[1:]])"
SLEEPING = "import pathlib, time; pathlib.Path('sleeps').touch(); time.sleep(600)"


def test_a_rank_without_a_number_dies_with_its_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DSVLLM_EXIT_FILE", str(folder / "code"))
    Path("sleep.py").write_text(SLEEPING, encoding="utf-8")
    run = launch(folder, [sys.executable, "-c", LAUNCHER, "sleep.py", *OURS])
    try:
        wait_for(Path("sleeps").exists, run.ended)
        run.process.kill()
        run.wait(30)
        wait_for(lambda: run.left() == [], timeout_s=30)
    finally:
        run.kill()


def test_a_rank_whose_launcher_died_just_before_ends(folder: Path) -> None:
    code = (
        "import os; parents = iter([7, 1]); os.getppid = lambda: next(parents);"
        "from hf_dsvllm.run.rank import main; main(['end.py'])"
    )
    (folder / "end.py").write_text("print('ran')", encoding="utf-8")
    ended = python(folder, "-c", code, RANK="0")
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "")


def test_a_traceback_shows_the_scripts_frames_alone(folder: Path) -> None:
    (folder / "end.py").write_text("def fall():\n    1 / 0\n\n\nfall()\n", encoding="utf-8")
    ours, plain = as_rank(folder, "end.py"), python(folder, "end.py")
    assert ours.stderr == plain.stderr


def test_after_a_failure_an_option_in_the_wrong_place_is_named(folder: Path) -> None:
    (folder / "end.py").write_text("import sys; sys.exit(2)", encoding="utf-8")
    ended = as_rank(folder, "end.py", "--learning_rate", "1", "--num_processes", "2")
    assert "--num_processes was left to the script: as an option of `hf-dsvllm run` it stands before" in ended.stderr
    assert "learning_rate" not in ended.stderr


def test_environment_hooks_of_the_user_keep_working(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text("print('customized')", encoding="utf-8")
    (folder / "end.py").write_text("import os; print(os.environ['PYTHONPATH'])", encoding="utf-8")
    paths = f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"
    assert as_rank(folder, "end.py", PYTHONPATH=paths).stdout == f"customized\n{paths}\n"


def test_asking_for_help_is_no_failure(folder: Path) -> None:
    (folder / "end.py").write_text("import argparse; argparse.ArgumentParser().parse_args()", encoding="utf-8")
    assert as_rank(folder, "end.py", "--help").returncode == 0


def test_a_flag_of_ours_before_the_script_is_told_its_place(folder: Path) -> None:
    ended = python(folder, "-m", "hf_dsvllm.run", *OURS, "scripts/seen.py")
    assert ended.returncode == 2
    assert "--ds_preset stands before the script\n    fix: SCRIPT --ds_preset …: after the script" in ended.stderr


# A script that catches what we say of its arguments, and ends in its own way.
CATCHES = """
import sys
from transformers import TrainingArguments

try:
    TrainingArguments("out", ds_preset="zero2")
except Exception:
    sys.exit(1)
"""


def test_an_error_of_ours_that_the_script_catches_is_said(folder: Path) -> None:
    (folder / "end.py").write_text(CATCHES, encoding="utf-8")
    ended = as_rank(folder, "end.py")
    assert ended.returncode == 1
    assert "hf-dsvllm: error: 1 problem" in ended.stderr
    assert "ds_preset: the command line says 'zero3', the script's arguments (end.py:6) say 'zero2'" in ended.stderr
