"""Memory of GPUs: the engine's by the driver where it knows it, the trainer's of the fullest process."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_dsvllm import measure
from hf_dsvllm.measure import RunMeasure, gib_of_others, with_children

GIB = 1 << 30


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30 * GIB)


def test_the_engines_processes_are_counted_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        held = {os.getpid(): 50 * GIB, child.pid: 2 * GIB, 1: 7 * GIB}
        monkeypatch.setattr(measure, "memory_by_process", lambda: held)
        monkeypatch.setattr(measure, "with_children", lambda processes: {*processes, child.pid})
        assert gib_of_others([999_999_999]) == 2.0
    finally:
        child.communicate(b"\n")


def test_workers_below_a_process_are_found_and_one_that_is_gone_is_none() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in with_children([os.getpid()])
    finally:
        child.communicate(b"\n")
    assert with_children([child.pid]) == {child.pid}


@pytest.mark.parametrize("held", [{}, {1: 3 * GIB}])
def test_where_the_driver_does_not_know_our_numbers_it_is_what_pytorch_does_not_hold(
    held: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "memory_by_process", lambda: held)
    assert gib_of_others([1]) == 10.0


def test_a_driver_that_says_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> dict[int, int]:
        raise OSError("no driver")

    monkeypatch.setattr(measure, "memory_by_process", silent)
    assert gib_of_others([1]) == 10.0


def test_of_several_processes_the_fullest_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-2 the first rank is not it."""
    other = {"steps": {"host_gib": 9.0, "allocated_gib": 119.3, "reserved_gib": 100.0}}
    monkeypatch.setattr(measure, "from_all", lambda mine: [mine, (7.0, other)])
    run = RunMeasure()
    monkeypatch.setattr(RunMeasure, "mark", lambda self, phase: None)
    run.phases = {
        "steps": {"host_gib": 1.0, "allocated_gib": 109.1, "reserved_gib": 122.5},
        "end": {"host_gib": 1.0, "allocated_gib": 48.0, "reserved_gib": 122.5},
    }
    run.stop(SimpleNamespace(log_history=[], num_input_tokens_seen=0))
    assert run.phases["steps"] == {"host_gib": 1.0, "allocated_gib": 119.3, "reserved_gib": 122.5}
    assert run.highest("allocated_gib") == 119.3
    assert run.host_peaks[1:] == [7.0]
