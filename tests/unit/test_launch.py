"""How a process was started is read from its environment and its parent's command line."""

from __future__ import annotations

import pytest

from hf_dsvllm import launch
from hf_dsvllm.launch import Launch, become_single_process, processes_asked_for, read_launch

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


def test_a_process_of_torchrun_knows_its_place() -> None:
    found = read_launch(TORCHRUN, [])
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (5, 1, 8, 4)
    assert found.launched
    assert not found.is_main


def test_a_launcher_that_does_not_name_the_local_group_is_taken_to_run_on_one_host() -> None:
    assert read_launch({"RANK": "0", "WORLD_SIZE": "2"}, []).local_world_size == 2


@pytest.mark.parametrize("env", [{}, {"RANK": "3"}, {"WORLD_SIZE": "4"}])
def test_plain_python_is_one_process_alone(env: dict[str, str]) -> None:
    found = read_launch(env, [])
    assert (found.rank, found.world_size, found.launched, found.is_main) == (0, 1, False, True)


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python /env/bin/accelerate launch --num_processes 2 train.py", 2),
        ("python /env/bin/accelerate launch --num-processes=4 --multi_gpu train.py", 4),
        ("accelerate-launch -n 3 train.py", 3),
        ("python -m accelerate.commands.launch --num_processes 2 train.py", 2),
        ("python /env/lib/accelerate/commands/launch.py --num_processes 2 train.py", 2),
        ("accelerate launch train.py --num_processes 7", None),
        ("accelerate launch --multi_gpu train.py -n 7", None),
        ("accelerate launch --num_processes many train.py", None),
        ("torchrun --nproc_per_node 2 train.py", None),
        ("accelerate launch -m hf_dsvllm.run -m package.train -n 8", None),
        ("accelerate launch --module hf_dsvllm.run trl sft --num_processes 8", None),
        ("accelerate launch -n 2 -m hf_dsvllm.run trl sft -n 8", 2),
        ("accelerate launch -m -n 2 hf_dsvllm.run trl sft", 2),
        ("bash run.sh -n 4", None),
        ("python accelerate-experiments/sweep.py -n 8", None),
        ("", None),
    ],
)
def test_only_accelerates_own_option_says_how_many_were_asked_for(command: str, asked: int | None) -> None:
    assert processes_asked_for(command.split()) == asked


def made(*, world_size: int, asked: int | None) -> Launch:
    return Launch(
        rank=0,
        local_rank=0,
        world_size=world_size,
        local_world_size=world_size,
        launched=world_size > 1,
        asked_processes=asked,
    )


def test_fewer_processes_than_asked_for_is_an_error_with_two_ways_out() -> None:
    (problem,) = made(world_size=1, asked=2).problems()
    assert "asked for 2 processes and started 1" in problem.what
    assert "torchrun --nproc_per_node 2" in problem.fix
    assert "accelerate launch --multi_gpu --num_processes 2" in problem.fix


@pytest.mark.parametrize(("world_size", "asked"), [(1, None), (1, 1), (2, 2), (4, None), (8, 4)])
def test_as_many_processes_as_asked_for_is_none(world_size: int, asked: int | None) -> None:
    assert made(world_size=world_size, asked=asked).problems() == []


def test_a_lone_process_gets_the_variables_of_a_group_of_one() -> None:
    env: dict[str, str] = {}
    assert become_single_process(env)
    assert (env["RANK"], env["LOCAL_RANK"]) == ("0", "0")
    assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("1", "1")
    assert env["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(env["MASTER_PORT"]) < 65536
    assert not become_single_process(env), "a second time there is nothing to do"


def test_a_launched_process_keeps_its_variables() -> None:
    env = dict(TORCHRUN)
    assert not become_single_process(env)
    assert env == TORCHRUN


def test_a_parent_that_is_gone_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.os, "getppid", lambda: 2**22 + 1)
    assert launch._parent_command() == []
