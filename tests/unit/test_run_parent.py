"""The command that starts the ranks: checks before torch, signals, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hf_dsvllm import preflight
from hf_dsvllm.errors import ConfigError
from hf_dsvllm.hardware import Gpu, Machine
from hf_dsvllm.run import parent
from hf_dsvllm.run.command import AdapterOptions, Command, read_command
from hf_dsvllm.run.dry import as_text
from hf_dsvllm.run.parent import LaunchOptions, Plan, make_plan, start
from hf_dsvllm.run.target import Target
from tests.scripts.launch import launch
from tests.waiting import wait_for

PARSING = "from transformers import HfArgumentParser\n"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(PARSING, encoding="utf-8")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    cards = tuple(Gpu(name="H100", memory_bytes=80 << 30, index=index) for index in range(count))
    machine = Machine(gpus=cards, cpu_count=8, ram_bytes=1 << 38)
    monkeypatch.setattr(parent, "detect", lambda: machine)


def plan(*words: str, **options: object) -> Plan:
    return make_plan(LaunchOptions(**options), read_command(["train.py", *words]))  # type: ignore[arg-type]


def test_everything_wrong_is_said_at_once_and_before_torch() -> None:
    Path("acc.yaml").write_text("distributed_type: DEEPSPEED\n", encoding="utf-8")
    Path("own.yaml").write_text("deepspeed: ds.json\n", encoding="utf-8")
    words = [
        "--ds_preset",
        "zero3_nvme",
        "--gen_eval_file",
        "missing.jsonl",
        "--deepspeed",
        "ds.json",
        "--config",
        "own.yaml",
    ]
    with pytest.raises(ConfigError) as error:
        plan(*words, accelerate_config=Path("acc.yaml"), num_processes="some")
    text = str(error.value)
    for expected in (
        "--num_processes some is no number of processes",
        "preset zero3_nvme needs a folder on an NVMe disk",
        "missing.jsonl",
        "--deepspeed and --ds_preset zero3_nvme both bring a DeepSpeed configuration",
        "own.yaml sets deepspeed",
        "acc.yaml says distributed_type: DEEPSPEED",
    ):
        assert expected in text


@pytest.mark.parametrize("words", [("--ds_preset", "ddp"), ("--ds_preset", "auto"), ("--ds_preset", "zero2")])
def test_fsdp_in_accelerates_file_is_refused_with_every_preset(words: tuple[str, ...]) -> None:
    Path("acc.yaml").write_text("distributed_type: FSDP\nnum_processes: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"acc\.yaml says distributed_type: FSDP, whose shards"):
        plan(*words, accelerate_config=Path("acc.yaml"))


def test_a_preset_for_one_process_refuses_two() -> None:
    with pytest.raises(ConfigError, match="preset none is for one process"):
        plan("--ds_preset", "none", num_processes="2")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'zero4'; did you mean zero"):
        plan("--ds_preset", "zero4")


def test_a_command_that_asks_for_nothing_of_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is nothing to add to the script\n.*--ds_preset NAME"):
        plan("--lr", "1")


def test_the_scripts_help_needs_nothing_that_a_run_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    assert plan("--ds_preset", "long_context", "--gen_eval_file", "none.jsonl", "--help").processes == 1


def test_a_preset_for_several_names_this_commands_option() -> None:
    with pytest.raises(ConfigError, match=r"(?s)needs 2 processes.*fix: hf-dsvllm run --num_processes 2 SCRIPT"):
        plan("--ds_preset", "long_context")


def test_an_option_of_the_command_that_is_left_to_the_script_is_said() -> None:
    (reason, *_) = [r for r in plan("--ds_preset", "zero2", "--max_restarts", "1").reasons if "max_restarts" in r]
    assert "left to the script" in reason


def test_a_misspelt_flag_does_not_train_plainly() -> None:
    with pytest.raises(
        ConfigError, match=r"--ds_prest is not one of ours, nor is it in the script\n.*mean --ds_preset\?"
    ):
        plan("--ds_prest", "zero3")


def test_an_offloaded_optimizer_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(parent, "usable_cpus", lambda: 8)
    monkeypatch.setattr(parent, "preset_problems", lambda *_, **__: [])
    assert plan("--ds_preset", "zero3_offload", num_processes="2").environment == {"OMP_NUM_THREADS": "4"}
    assert plan("--ds_preset", "zero3", num_processes="2").environment == {}


SERVER = ("--gen_eval_server", "http://node7:8000")
LATE = ("--gen_eval_late", "true")


@pytest.mark.parametrize(
    ("words", "cards"),
    [
        ((), 4),
        (SERVER, 4),
        (SERVER, 0),
        (LATE, 4),
        (LATE, 0),
        (("--save_strategy", "best", "--metric_for_best_model", "gen_e_exact_match"), 4),
    ],
)
def test_spare_remote_and_late_evaluations_are_planned(
    words: tuple[str, ...], cards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated_on(cards, monkeypatch)
    made = plan("--ds_preset", "zero2", "--gen_eval_file", "e.jsonl", *words, num_processes="3")
    assert (made.processes, made.device) == (3, "cuda" if cards else "cpu")
    assert "--nproc_per_node" in as_text(made)


def test_a_late_score_cannot_choose_what_is_saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated_on(4, monkeypatch)
    Path("own.yaml").write_text("metric_for_best_model: eval_gen_e_exact_match\n", encoding="utf-8")
    asked = ("--ds_preset", "zero2", "--gen_eval_file", "e.jsonl", *LATE, "--config", "own.yaml")
    with pytest.raises(ConfigError, match="gen_eval_late with save_strategy=best"):
        plan(*asked, "--save_strategy", "best", num_processes="3")
    assert plan(*asked, num_processes="3").processes == 3


def evaluated_on(cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with so many cards, vLLM and an evaluation file."""
    gpus(monkeypatch, cards)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards))))
    monkeypatch.setattr(preflight, "find_vllm", lambda *_, **__: Path(sys.executable))
    Path("e.jsonl").write_text('{"prompt": "1+1=", "reference": "2"}\n', encoding="utf-8")


def test_planning_an_evaluation_on_spare_gpus_imports_no_framework() -> None:
    Path("e.jsonl").write_text('{"prompt": "1+1=", "reference": "2"}\n', encoding="utf-8")
    code = (
        "import sys; from hf_dsvllm import hardware, preflight; from hf_dsvllm.run import parent, command;"
        "card = hardware.Gpu(name='H100', memory_bytes=80 << 30, index=0);"
        "hardware.detect_gpus = lambda: (card,) * 4;"
        "preflight.find_vllm = lambda *_, **__: None;"
        "words = ['train.py', '--ds_preset', 'zero2', '--gen_eval_file', 'e.jsonl', '--gen_eval_placement', 'spare'];"
        "plan = parent.make_plan(parent.LaunchOptions(num_processes='3'), command.read_command(words));"
        "assert (plan.device, plan.processes) == ('cuda', 3);"
        "assert not {'torch', 'transformers', 'deepspeed', 'trl', 'accelerate'} & set(sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_planning_and_printing_import_no_framework() -> None:
    code = (
        "import sys; from hf_dsvllm.run import parent, dry, command;"
        "c = command.read_command(['train.py', '--ds_preset', 'qlora_zero3']);"
        "print(len(dry.as_text(parent.make_plan(parent.LaunchOptions(), c))));"
        "assert not {'torch', 'transformers', 'deepspeed', 'trl', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- starting


def started(code: str, folder: Path) -> Plan:
    """A plan whose launcher is `python -c code`."""
    target = Target(name="x", path=None, file=None)
    command = Command(target=target, script_args=(), given={}, adapter=AdapterOptions(), words=("x",))
    return Plan(
        command=command, launcher=(sys.executable, "-c", code), rank=(), environment={"X": str(folder)}, preset=None,
        processes=1, device="cpu", ds_config=None, reasons=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; assert os.environ['X']", 0),
        ("raise SystemExit(1)", 1),
        ("import os; open(os.environ['HF_DSVLLM_EXIT_FILE'], 'w').write('7'); raise SystemExit(1)", 7),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
def test_the_exit_code_is_the_scripts(code: str, expected: int, tmp_path: Path) -> None:
    assert start(started(code, tmp_path)) == expected


DRIVER = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests themselves ignore it
from pathlib import Path
from tests.unit.test_run_parent import started
from hf_dsvllm.run.parent import start
code = "import os, signal, time; open(os.environ['X'] + '/pid', 'w').write(str(os.getpid())); {setup}; time.sleep(600)"
sys.exit(start(started(code, Path(sys.argv[1]))))
"""
IGNORING = "[signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGHUP)]"


NOHUP = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_run_parent import started
from hf_dsvllm.run.parent import start
signal.signal(signal.SIGHUP, signal.SIG_IGN)
code = "import os, signal, time; open(os.environ['X'] + '/pid', 'w').write(''); time.sleep(3)"
sys.exit(start(started(code, Path(sys.argv[1]))))
"""


def test_under_nohup_a_hangup_ends_nothing(tmp_path: Path) -> None:
    run = launch(tmp_path, [sys.executable, "-c", NOHUP, str(tmp_path)])
    try:
        wait_for((tmp_path / "pid").exists, run.ended, timeout_s=60)
        run.process.send_signal(signal.SIGHUP)
        assert run.wait(60) == 0, run.output()
    finally:
        run.kill()


def test_a_launcher_that_ends_well_by_itself_beats_a_signal(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    setup = "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))"
    code = DRIVER.replace(
        "open(os.environ['X'] + '/pid', 'w').write(str(os.getpid())); {setup};",
        "{setup}; open(os.environ['X'] + '/pid', 'w').write(str(os.getpid()));",
    )
    run = launch(tmp_path, [sys.executable, "-c", code.format(setup=setup), str(tmp_path)])
    try:
        wait_for(lambda: pid_file.exists() and bool(pid_file.read_text()), run.ended, timeout_s=60)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0, run.output()
    finally:
        run.kill()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_launcher_and_is_the_exit_code(number: int, expected: int, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    run = launch(tmp_path, [sys.executable, "-c", DRIVER.format(setup="pass"), str(tmp_path)])
    try:
        wait_for(pid_file.exists, run.ended, timeout_s=60)
        run.process.send_signal(number)
        assert run.wait(60) == expected, run.output()
        assert run.left() == []
    finally:
        run.kill()


def test_a_second_signal_ends_a_launcher_that_will_not(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    run = launch(tmp_path, [sys.executable, "-c", DRIVER.format(setup=IGNORING), str(tmp_path)])
    try:
        wait_for(lambda: pid_file.exists() and bool(pid_file.read_text()), run.ended, timeout_s=60)
        wait_for(lambda: ignores(int(pid_file.read_text()), signal.SIGHUP), run.ended, timeout_s=60)
        run.process.send_signal(signal.SIGTERM)
        run.process.send_signal(signal.SIGHUP)
        assert run.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGHUP), run.output()
        assert run.left() == []
    finally:
        run.kill()


# A launcher that hands no signal on, and a rank that has not yet asked to die with it.
ORPHAN = "import os, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {child!r}]); child.wait()"
PID = "import os, signal, time; {setup}; open(os.environ['X'] + '/pid', 'w').write(str(os.getpid())); time.sleep(600)"
ORPHANED = """
import sys
from pathlib import Path
from tests.unit.test_run_parent import ORPHAN, PID, started
from hf_dsvllm.run.parent import start
sys.exit(start(started(ORPHAN.format(child=PID.format(setup={setup!r})), Path(sys.argv[1]))))
"""


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_a_launcher_without_signal_handling_leaves_is_ended(number: int, expected: int, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    run = launch(tmp_path, [sys.executable, "-c", ORPHANED.format(setup="pass"), str(tmp_path)])
    try:
        wait_for(pid_file.exists, run.ended)
        run.process.send_signal(number)
        assert run.wait(60) == expected, run.output()
        assert run.left() == []
    finally:
        run.kill()


def test_a_second_signal_kills_a_rank_that_will_not_end(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    run = launch(tmp_path, [sys.executable, "-c", ORPHANED.format(setup=IGNORING), str(tmp_path)])
    try:
        wait_for(lambda: pid_file.exists() and bool(pid_file.read_text()), run.ended)
        rank = psutil.Process(int(pid_file.read_text()))
        launcher = rank.parent()
        assert launcher is not None
        run.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not launcher.is_running(), run.ended)
        assert rank.is_running()
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(20) == 143, run.output()
        assert run.left() == []
    finally:
        run.kill()


ONE_PROCESS = """
compute_environment: LOCAL_MACHINE
distributed_type: "NO"
num_machines: 1
num_processes: 1
use_cpu: true
mixed_precision: "no"
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_rank_of_accelerates_launcher_outlives_the_command(number: int, expected: int, tmp_path: Path) -> None:
    Path("acc.yaml").write_text(ONE_PROCESS, encoding="utf-8")
    Path("sleep.py").write_text("import time; open('sleeps', 'w'); time.sleep(600)", encoding="utf-8")
    words = ["run", "--accelerate_config", "acc.yaml", "sleep.py", "--ds_preset", "lora"]
    run = launch(tmp_path, [sys.executable, "-m", "hf_dsvllm", *words])
    try:
        wait_for(Path("sleeps").exists, run.ended, timeout_s=120)
        run.process.send_signal(number)
        assert run.wait(60) == expected, run.output()
        if number != signal.SIGKILL:
            assert run.left() == []
        wait_for(lambda: run.left() == [], timeout_s=30)
    finally:
        run.kill()


def test_a_killed_parent_takes_the_launcher_along(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    run = launch(tmp_path, [sys.executable, "-c", DRIVER.format(setup="pass"), str(tmp_path)])
    try:
        wait_for(lambda: pid_file.exists() and bool(pid_file.read_text()), run.ended, timeout_s=60)
        child = psutil.Process(int(pid_file.read_text()))
        os.kill(run.process.pid, signal.SIGKILL)
        run.wait(60)
        psutil.wait_procs([child], timeout=60)
        assert run.left() == []
    finally:
        run.kill()


def ignores(pid: int, number: int) -> bool:
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    ignored = next(line.split()[1] for line in text.splitlines() if line.startswith("SigIgn:"))
    return bool(int(ignored, 16) & 1 << (number - 1))
