"""The command that starts the ranks: processes, launcher, checks before torch, the plan as text, signals, codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hf_dsvllm.errors import ConfigError
from hf_dsvllm.hardware import Gpu, Machine
from hf_dsvllm.run import parent
from hf_dsvllm.run.command import AdapterOptions, Command, read_command
from hf_dsvllm.run.dry import LORA, as_text
from hf_dsvllm.run.parent import LaunchOptions, Plan, make_plan, start
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


@pytest.mark.parametrize(
    ("count", "preset", "asked", "expected"),
    [
        (4, "zero3", "auto", 4),
        (4, "none", "auto", 1),
        (0, "zero3", "auto", 1),
        (0, "zero3", "2", 2),
        (4, "zero2", "3", 3),
    ],
)
def test_one_process_a_gpu_unless_told_otherwise(
    count: int, preset: str, asked: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    assert plan("--ds_preset", preset, num_processes=asked).processes == expected


def test_the_original_file_is_started_by_torchrun_with_every_word() -> None:
    words = plan("--lr", "1", "--ds_preset", "zero2", num_processes="2").words
    assert words[:3] == (sys.executable, "-m", "torch.distributed.run")
    assert words[words.index("--nproc_per_node") + 1 :] == (
        *("2", "-m", "hf_dsvllm.run", "train.py", "--lr", "1", "--ds_preset", "zero2"),
    )


def test_a_module_and_adapter_options_reach_the_ranks() -> None:
    command = read_command(["pkg.train", "--ds_preset", "lora"], module=True, adapter=AdapterOptions(lora_r=8))
    assert make_plan(LaunchOptions(module=True), command).rank == (
        *("-m", "hf_dsvllm.run", "--lora_r", "8", "-m", "pkg.train", "--ds_preset", "lora"),
    )


def test_multi_node_options_pass_through_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    torchrun = ("--nnodes", "2", "--node_rank", "1", "--master_addr", "host")
    made = plan("--ds_preset", "zero3_hpz", torchrun=torchrun)
    assert made.launcher[3:] == (*torchrun, "--nproc_per_node", "2")
    assert made.ds_config is not None


def test_accelerate_starts_with_its_file() -> None:
    Path("acc.yaml").write_text("distributed_type: MULTI_CPU\n", encoding="utf-8")
    made = plan("--ds_preset", "zero2", accelerate_config=Path("acc.yaml"), num_processes="2")
    assert made.launcher[1:] == (
        *("-m", "accelerate.commands.launch", "--config_file", "acc.yaml", "--num_processes", "2"),
    )


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


def test_a_preset_for_one_process_refuses_two() -> None:
    with pytest.raises(ConfigError, match="preset none is for one process"):
        plan("--ds_preset", "none", num_processes="2")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'zero4'; did you mean zero"):
        plan("--ds_preset", "zero4")


def test_a_misspelt_flag_does_not_train_plainly() -> None:
    with pytest.raises(ConfigError, match=r"--ds_prest is not one of ours: --ds_preset\?"):
        plan("--ds_prest", "zero3")


def test_an_offloaded_optimizer_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(parent, "usable_cpus", lambda: 8)
    monkeypatch.setattr(parent, "preset_problems", lambda *_: [])
    assert plan("--ds_preset", "zero3_offload", num_processes="2").environment == {"OMP_NUM_THREADS": "4"}
    assert plan("--ds_preset", "zero3", num_processes="2").environment == {}


# -- --dry_run


def shell_words(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_dry_run_is_a_shell_script_that_does_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    text = as_text(plan("--lr", "1", "--ds_preset", "zero3", num_processes="2"))
    written = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert written.returncode == 0, written.stderr
    lines = shell_words(text)
    start_, end = lines.index("cat > ds_zero3.json <<'JSON'"), lines.index("JSON")
    assert json.loads("\n".join(lines[start_ + 1 : end]))["zero_optimization"]["stage"] == 3
    assert lines[end + 1 :] == [lines[-1]]
    assert lines[-1].endswith("train.py --lr 1 --deepspeed ds_zero3.json --bf16 false --use_cpu true")
    assert "hf_dsvllm" not in lines[-1]


def test_a_script_with_arguments_of_its_own_is_reached_through_the_environment() -> None:
    Path("train.py").write_text("TrainingArguments('out')", encoding="utf-8")
    last = shell_words(as_text(plan("--ds_preset", "zero2")))[-1]
    assert last.startswith("ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=ds_zero2.json ")
    assert last.endswith(" train.py")


def test_every_reason_of_a_preset_is_given() -> None:
    text = as_text(plan("--ds_preset", "zero2_lowmem", num_processes="2"))
    made = plan("--ds_preset", "zero2_lowmem", num_processes="2").preset
    assert made is not None
    assert made.deepspeed
    for setting in (*made.deepspeed, *made.arguments):
        assert setting.why in text


def test_adapters_become_trls_flags_or_code_to_add() -> None:
    assert "get_peft_model" in as_text(plan("--ds_preset", "qlora"))
    Path("train.py").write_text("from trl import ModelConfig, TrlParser", encoding="utf-8")
    assert "--use_peft --lora_target_modules all-linear --load_in_4bit" in as_text(plan("--ds_preset", "qlora"))


def test_adapter_options_are_in_the_dry_run_as_trls_flags() -> None:
    Path("train.py").write_text("from trl import ModelConfig, TrlParser", encoding="utf-8")
    options = AdapterOptions(lora_r=4, lora_dropout=0.0, lora_target_modules=("q_proj", "v_proj"))
    command = read_command(["train.py", "--dtype", "float16", "--ds_preset", "lora"], adapter=options)
    words = shell_words(as_text(make_plan(LaunchOptions(), command)))[-1]
    assert "--use_peft --lora_target_modules q_proj v_proj --lora_r 4 --lora_dropout 0.0" in words
    assert words.count("--lora_target_modules") == words.count("--dtype") == 1


def test_adapter_options_are_in_the_dry_run_as_code() -> None:
    Path("train.py").write_text("AutoModelForSequenceClassification.from_pretrained('m')", encoding="utf-8")
    options = AdapterOptions(lora_r=4, lora_alpha=8, lora_target_modules=("q_proj",))
    text = as_text(make_plan(LaunchOptions(), read_command(["train.py", "--ds_preset", "qlora"], adapter=options)))
    assert "LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=['q_proj']," in text
    assert "task_type='SEQ_CLS'" in text
    assert "model = AutoModelForSequenceClassification.from_pretrained(" in text


def test_a_reward_script_is_told_its_task_type() -> None:
    Path("train.py").write_text("from trl import ModelConfig, RewardConfig, TrlParser", encoding="utf-8")
    assert "--lora_task_type SEQ_CLS" in as_text(plan("--ds_preset", "lora"))


def test_the_values_of_the_dry_run_are_trls_defaults() -> None:
    from trl import ModelConfig

    assert {name: getattr(ModelConfig(), name) or "all-linear" for name in LORA} == LORA


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
    command = Command(target="x", path=None, script_args=(), given={}, adapter=AdapterOptions(), words=("x",))
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
import sys
from pathlib import Path
from tests.unit.test_run_parent import started
from hf_dsvllm.run.parent import start
code = "import os, signal, time; open(os.environ['X'] + '/pid', 'w').write(str(os.getpid())); {setup}; time.sleep(600)"
sys.exit(start(started(code, Path(sys.argv[1]))))
"""
IGNORING = "[signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGHUP)]"


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
