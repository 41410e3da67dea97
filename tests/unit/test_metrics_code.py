"""Code in answers: what is run, and what the sandbox keeps it from.

Walls that this machine's kernel refuses are not tested here; the limits and the end of all processes always are.
"""

from __future__ import annotations

import os

import psutil
import pytest

from hf_dsvllm.metrics import code, resolve, sandbox, score
from hf_dsvllm.metrics.code import extract_code, program_of, warn_of_missing_walls
from hf_dsvllm.metrics.sandbox import WALLS, Limits, run_python

GRANTED = run_python("").walls
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open({marker!r} + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename({marker!r} + ".new", {marker!r})
        time.sleep(300)
    os._exit(0)
os.wait()
"""


def needs(wall: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(wall not in GRANTED, reason=f"the kernel refuses the wall {wall} here")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nThen\n```python\nx = 2\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("```bash\nls\n```\n```Python\nx = 1\n```", "x = 1\n"),
    ],
)
def test_the_first_block_of_python_is_the_code(completion, expected):
    assert extract_code(completion) == expected


def test_the_code_stands_before_the_tests_or_where_they_say():
    assert program_of("x = 1", "assert x") == "x = 1\n\nassert x"
    assert (
        program_of("    return r'\\1'", "def f():\n# ANSWER\n\nassert f()")
        == "def f():\n    return r'\\1'\n\nassert f()"
    )


def test_many_answers_are_judged_in_order():
    answers = [f"x = {number}" for number in range(6)]
    assert score(resolve("code_tests"), answers, ["assert x % 2 == 0"] * 6) == [1.0, 0.0] * 3


def test_answers_beyond_the_time_of_a_batch_have_no_score(monkeypatch, capsys):
    monkeypatch.setattr(code, "BATCH_S", 0.0)
    assert score(resolve("code_tests"), ["x = 1", "x = 2"], ["assert x"] * 2) == [None, None]
    assert "metric code_tests: 2 of 2 answers have no score" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def (", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended before its tests did"),
        ("import numpy", "ModuleNotFoundError"),
        ("import os; os.close(int(input()))", "EOFError"),
        ("x = bytearray(2**31)", "MemoryError"),
        ("open('x', 'wb').write(bytes(17 * 2**20))", "File too large"),
        ("raise BaseException('a\\nb' * 5000)", "BaseException: a b"),
    ],
)
def test_a_program_that_does_not_reach_its_end_fails_with_its_reason(program, reason):
    outcome = run_python(program)
    assert not outcome.passed
    assert reason in outcome.reason
    assert len(outcome.reason) < 300


@pytest.mark.parametrize("walls", [WALLS, ()], ids=["walls", "no walls"])
@pytest.mark.parametrize(
    ("program", "limits", "reason"),
    [
        ("import time; time.sleep(300)", Limits(wall_s=0.5), "took longer than 0.5 s"),
        ("while True: pass", Limits(wall_s=20, cpu_s=1), "ended before its tests did"),
    ],
)
def test_a_program_that_does_not_end_is_ended(monkeypatch, walls, program, limits, reason):
    monkeypatch.setattr(sandbox, "WALLS", walls)
    assert reason in run_python(program, limits=limits).reason


def test_a_daemon_is_ended_with_its_program_without_any_wall(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "WALLS", ())
    marker = tmp_path / "pid"
    assert run_python(DAEMON.format(marker=str(marker)) + f"while not os.path.exists({str(marker)!r}): pass").passed
    assert not psutil.pid_exists(int(marker.read_text()))


def test_a_program_that_kills_its_keeper_fails(monkeypatch):
    monkeypatch.setattr(sandbox, "WALLS", ())
    outcome = run_python("import os, signal; os.kill(os.getppid(), signal.SIGKILL); signal.pause()")
    assert outcome.reason == "its keeper was ended or hung"


def test_nothing_of_the_environment_or_the_folder_is_handed_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcome = run_python(
        "import os\n"
        "assert set(os.environ) <= {'PATH', 'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE'}, os.environ\n"
        "assert os.listdir('.') == []\n"
        "assert os.getcwd() == os.environ['HOME']\n"
        "open('x', 'w').write('a file of its own')"
    )
    assert outcome.passed, outcome.reason


def test_the_folder_is_gone_afterwards(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_python("open('x', 'w').close()").passed
    assert list(tmp_path.iterdir()) == []


def test_a_program_longer_than_a_pipe_holds_is_run():
    assert run_python(f"x = '{'a' * 300_000}'\nassert len(x) == 300_000").passed


def test_it_is_the_first_to_go_when_memory_runs_out():
    assert run_python("assert open('/proc/self/oom_score_adj').read() == '1000\\n'").passed


@needs("network")
def test_there_is_no_network():
    outcome = run_python("import socket; socket.create_connection(('127.0.0.1', 22), timeout=5)")
    assert "OSError" in outcome.reason or "unreachable" in outcome.reason


@needs("files")
def test_files_outside_can_not_be_changed(tmp_path):
    outcome = run_python(f"open({str(tmp_path / 'x')!r}, 'w')")
    assert "Read-only file system" in outcome.reason or "Permission denied" in outcome.reason
    assert list(tmp_path.iterdir()) == []


@needs("files")
def test_the_disk_is_bounded():
    outcome = run_python("for n in range(99): open(str(n), 'wb').write(bytes(2**20))")
    assert "No space left" in outcome.reason


@needs("processes")
def test_it_can_not_signal_the_trainer_or_its_keeper():
    outcome = run_python(f"import os; os.kill({os.getpid()}, 0)")
    assert "ProcessLookupError" in outcome.reason
    keeper = run_python("import os; os.kill(os.getppid(), 9); assert os.getppid() == 1")
    assert keeper.passed, keeper.reason


@needs("identity")
def test_it_holds_no_capability():
    outcome = run_python("assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()")
    assert outcome.passed, outcome.reason


@pytest.mark.skipif(os.getuid() == 0 and "nobody" not in GRANTED, reason="limits on processes do not bind root")
def test_a_fork_bomb_meets_a_limit():
    outcome = run_python("import os\nwhile True: os.fork()", limits=Limits(wall_s=5))
    assert not outcome.passed


def test_missing_walls_are_said_once(capsys):
    warn_of_missing_walls.cache_clear()
    for _ in range(2):
        warn_of_missing_walls(frozenset({"identity"}))
    said = capsys.readouterr().err
    assert said.count("without a wall before your files and the network") == 1
    warn_of_missing_walls(frozenset(WALLS))
    assert capsys.readouterr().err == ""


def test_endless_output_goes_nowhere():
    assert "took longer" in run_python("while True: print('x' * 1000)", limits=Limits(wall_s=1)).reason
