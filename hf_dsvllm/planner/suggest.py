"""What would fit where nothing does: the nearest jobs, each with one thing changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from hf_dsvllm.hardware import Gpu, Machine
from hf_dsvllm.planner.search import HOST_MARGIN, Job, gib, make_plan, preference
from hf_dsvllm.planner.setup import NODE_GPUS

__all__ = ["nodes_of", "suggestions"]

SHORTEST = 256  # tokens; below it a suggestion helps nobody
COUNTS = (2, 4, 8, 16, 32, 64)
LESS = {"full": ("lora", "qlora"), "lora": ("qlora",)}  # "any" has tried them all


def nodes_of(gpus: int) -> int:
    """Machines that a number of GPUs is taken to be spread over."""
    return max(1, -(-gpus // NODE_GPUS))


def suggestions(job: Job) -> list[str]:
    """The nearest jobs that fit: no evaluation, adapters, more host RAM, shorter sequences, more cards."""
    found = (without_evaluation(job), adapters(job), host_ram(job), shorter(job), more_cards(job))
    return [text for text in found if text is not None]


def chosen(job: Job) -> str | None:
    """The preset that a job's plan chooses."""
    plan = make_plan(job)
    return None if plan.chosen is None else plan.chosen.setup.preset.name


def without_evaluation(job: Job) -> str | None:
    if job.evaluation is None:
        return None
    preset = chosen(dataclasses.replace(job, evaluation=None))
    where = "export first and evaluate then, or let another machine answer with --gen_eval_server"
    return None if preset is None else f"{preset} without vLLM beside the trainer ({where})"


def lengths(job: Job) -> Iterator[int]:
    """The length asked for, and a half, a quarter, an eighth of it."""
    yield job.length
    for part in (2, 4, 8):
        if job.length // part >= SHORTEST:
            yield job.length // part


def adapters(job: Job) -> str | None:
    """Adapters instead of all weights, on 4-bit ones instead of 16-bit ones; rather not shorter than asked for."""
    for length in lengths(job):
        plans = (
            make_plan(dataclasses.replace(job, method=method, length=length)) for method in LESS.get(job.method, ())
        )
        fitting = [plan.chosen.setup.preset for plan in plans if plan.chosen is not None]
        if fitting:
            name = min(fitting, key=preference).name
            return f"{name} on the same machine" + ("" if length == job.length else f" with {length:,} tokens")
    return None


def host_ram(job: Job) -> str | None:
    if job.host_bytes is None:
        return None
    plan = make_plan(dataclasses.replace(job, host_bytes=None))
    if plan.chosen is None:
        return None
    return f"{plan.chosen.setup.preset.name} with {gib(plan.chosen.host_bytes / (1 - HOST_MARGIN))} of host RAM"


def shorter(job: Job) -> str | None:
    length = job.length // 2
    while length >= SHORTEST:
        preset = chosen(dataclasses.replace(job, length=length))
        if preset is not None:
            return f"{length:,} tokens instead of {job.length:,}, with {preset}"
        length //= 2
    return None


def more_cards(job: Job) -> str | None:
    """More of the same cards; host memory and NVMe grow with the machines, of `NODE_GPUS` cards each."""
    if not job.machine.gpus:
        return None
    for count in COUNTS:
        if count <= len(job.machine.gpus) * job.hosts or job.global_batch % count:
            continue
        nodes = max(job.hosts, nodes_of(count))
        larger = dataclasses.replace(
            job,
            machine=machine_of(job.gpu, count),
            nodes=nodes,
            host_bytes=job.host_bytes and job.host_bytes // job.hosts * nodes,
            nvme_bytes=job.nvme_bytes and job.nvme_bytes // job.hosts * nodes,
            processes=None,
            local_processes=None,
        )
        preset = chosen(larger)
        if preset is not None:
            spread = f" ({nodes} machines)" if nodes > 1 else ""
            return f"{preset} on {count} x {job.gpu.name}{spread}"
    return None


def machine_of(gpu: Gpu, count: int) -> Machine:
    cards = tuple(dataclasses.replace(gpu, index=index) for index in range(count))
    return Machine(gpus=cards, cpu_count=None, ram_bytes=None)
