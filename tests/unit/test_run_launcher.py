"""Which processes a run has, and the launcher's command line: torchrun's, or accelerate's with a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_dsvllm.errors import ConfigError
from hf_dsvllm.run.command import AdapterOptions, read_command
from hf_dsvllm.run.parent import LaunchOptions, make_plan
from tests.unit.test_run_parent import _in_a_folder, gpus, plan

__all__ = ["_in_a_folder"]


@pytest.mark.parametrize(
    ("count", "preset", "asked", "expected"),
    [
        (4, "zero3", "auto", 4),
        (4, "none", "auto", 1),
        (0, "zero3", "auto", 1),
        (0, "zero3", "2", 2),
        (4, "zero2", "3", 3),
        (4, "zero2", "auto", 4),
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
    Path("pkg").mkdir()
    Path("pkg/train.py").touch()
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
    Path("acc.yaml").write_text("distributed_type: MULTI_GPU\n", encoding="utf-8")
    made = plan("--ds_preset", "zero2", accelerate_config=Path("acc.yaml"), num_processes="2")
    assert made.launcher[1:] == (
        *("-m", "accelerate.commands.launch", "--config_file", "acc.yaml", "--num_processes", "2"),
    )


@pytest.mark.parametrize(
    ("words", "in_yaml", "expected"),
    [
        (("--use_cpu", "false"), "", 4),
        (("--use_cpu=False",), "", 4),
        (("--use_cpu",), "", 1),
        (("--use-cpu",), "", 1),
        (("--use_cpu=true",), "", 1),
        (("--use-cpu", "true", "--lr", "1"), "", 1),
        ((), "use_cpu: true\n", 1),
        ((), "use_cpu: false\n", 4),
        (("--use_cpu", "false"), "use_cpu: true\n", 4),
    ],
)
def test_use_cpu_is_read_wherever_it_stands(
    words: tuple[str, ...], in_yaml: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 4)
    Path("own.yaml").write_text(in_yaml or "lr: 1\n", encoding="utf-8")
    assert plan("--ds_preset", "zero2", "--config", "own.yaml", *words).processes == expected


def test_use_cpu_may_stand_in_the_args_file(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    Path("train.args").write_text("--use_cpu true --ds_preset zero2", encoding="utf-8")
    assert plan().device == "cpu"


def test_restarts_leave_the_free_port_of_loopback() -> None:
    launcher = plan("--ds_preset", "zero2", torchrun=("--max_restarts", "1")).launcher
    assert "127.0.0.1:0" in launcher
    assert launcher[launcher.index("--max_restarts") + 1] == "1"


# -- accelerate's file

ACCELERATE = "distributed_type: MULTI_GPU\nnum_machines: {machines}\nnum_processes: {processes}\n"


def accelerate(machines: int, processes: int) -> Path:
    Path("acc.yaml").write_text(ACCELERATE.format(machines=machines, processes=processes), encoding="utf-8")
    return Path("acc.yaml")


def test_the_processes_of_accelerates_file_are_those_of_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    made = plan("--ds_preset", "long_context", accelerate_config=accelerate(2, 8))
    assert made.processes == 4
    assert "--num_processes" not in made.launcher
    asked = plan("--ds_preset", "zero2", accelerate_config=accelerate(2, 8), num_processes="3").launcher
    assert asked[-2:] == ("--num_processes", "6")


def test_a_file_that_names_no_processes_gets_one_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    Path("acc.yaml").write_text("distributed_type: MULTI_GPU\n", encoding="utf-8")
    made = plan("--ds_preset", "zero2", accelerate_config=Path("acc.yaml"))
    assert made.launcher[-2:] == ("--num_processes", "2")


def test_torchruns_options_reach_accelerate_in_its_words() -> None:
    torchrun = ("--nnodes", "2", "--node_rank", "1", "--master_addr", "host", "--master_port", "29500")
    made = plan("--ds_preset", "zero2", accelerate_config=accelerate(1, 4), torchrun=torchrun, num_processes="2")
    assert made.launcher[5:] == (
        *("--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "host", "--main_process_port", "29500"),
    )


@pytest.mark.parametrize("pair", [("--rdzv_id", "x"), ("--local_addr", "host"), ("--rdzv_endpoint", "host:1")])
def test_what_accelerate_has_no_word_for_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"accelerate launch has nothing for {' '.join(pair)}"):
        plan("--ds_preset", "zero2", accelerate_config=accelerate(1, 2), torchrun=pair)


def test_too_few_processes_in_accelerates_file_are_answered_by_that_file() -> None:
    with pytest.raises(ConfigError, match=r"(?s)needs 2 processes.*fix: num_processes: 2 in acc.yaml"):
        plan("--ds_preset", "long_context", accelerate_config=accelerate(1, 1))


@pytest.mark.parametrize("preset", ["lora", "zero2"])
def test_a_file_that_is_not_there_is_noticed_with_every_preset(preset: str) -> None:
    with pytest.raises(ConfigError, match=r"--accelerate_config none\.yaml cannot be read"):
        plan("--ds_preset", preset, accelerate_config=Path("none.yaml"))


def test_a_file_by_which_accelerate_starts_one_process_is_not_asked_for_more() -> None:
    Path("acc.yaml").write_text("distributed_type: 'NO'\nnum_processes: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"distributed_type: NO, with which accelerate starts 1 process instead of 2"):
        plan("--ds_preset", "lora", accelerate_config=Path("acc.yaml"))
