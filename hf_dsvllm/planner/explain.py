"""A plan in words: the table, the choice in sentences, what would fit if nothing does, the command line, the bars."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from hf_dsvllm.hardware import Gpu, Machine
from hf_dsvllm.planner.footprint import PHASES, Setup
from hf_dsvllm.planner.search import GIB, Candidate, Job, Plan, gib, make_plan, usable_bytes

__all__ = ["bars", "best_of_each", "command_line", "record", "sentences", "suggestions", "table_rows"]

WIDTH = 46
SHORTEST = 256  # tokens; below it a suggestion helps nobody
HEADINGS = ("preset", "batch", "recompute", "GPU GiB", "host GiB", "tokens/s", "verdict")


def best_of_each(plan: Plan) -> list[Candidate]:
    """The best candidate of every preset and placement: the fastest that fits, else the one that lacks least."""
    best: dict[tuple[str, str], Candidate] = {}
    for candidate in plan.candidates:
        key = (candidate.setup.preset.name, candidate.placement)
        known = best.get(key)
        if known is None or (not known.fits and not candidate.fits and candidate.gpu_bytes < known.gpu_bytes):
            best[key] = candidate
    return list(best.values())


def table_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Rows under HEADINGS, best first."""
    rows = []
    for found in best_of_each(plan):
        setup = found.setup
        name = setup.preset.name if found.placement == "none" else f"{setup.preset.name} (vLLM: {found.placement})"
        verdict = "chosen" if found is plan.chosen else "fits" if found.fits else f"no: {', '.join(found.scarce)}"
        rows.append(
            (
                name,
                f"{setup.micro} x {setup.accumulation}",
                "yes" if setup.recompute else "no",
                f"{found.gpu_bytes / GIB:.1f}",
                f"{found.host.peak / GIB:.0f}",
                f"{found.step.tokens_per_second:,.0f}",
                verdict,
            )
        )
    return rows


def sentences(plan: Plan) -> list[str]:
    """The choice, for somebody who has never heard of ZeRO."""
    chosen, job = plan.chosen, plan.job
    if chosen is None:
        lines = [f"Nothing fits on {job.machine.describe()}: {closest(plan)}."]
        found = suggestions(job)
        return [*lines, "What would fit: " + "; or ".join(found) + "."] if found else lines
    setup = chosen.setup
    lines = [
        f"Use {setup.preset.name}: {setup.preset.summary}.",
        batch_sentence(setup),
        memory_sentence(plan, chosen),
        speed_sentence(job, chosen),
    ]
    return [*lines, *why_not_others(plan), *advice(plan)]


def batch_sentence(setup: Setup) -> str:
    who = "The process takes" if setup.world == 1 else f"Each of {setup.world} processes takes"
    many = "1 sequence" if setup.micro == 1 else f"{setup.micro} sequences"
    times = f", {setup.accumulation} times before each update" if setup.accumulation > 1 else ""
    how = (
        "activations are computed again in the backward pass: a third more arithmetic, much less memory"
        if setup.recompute
        else "activations are kept, because there is room for them"
    )
    return f"{who} {many} at a time{times}; {how}."


def speed_sentence(job: Job, chosen: Candidate) -> str:
    step = chosen.step
    return f"About {step.seconds:.2f} s a step, {step.tokens_per_second:,.0f} tokens/s (rates: {job.rates.source})."


def memory_sentence(plan: Plan, chosen: Candidate) -> str:
    if plan.job.device == "cpu":
        return f"It needs {gib(chosen.host.peak + chosen.footprint.peak)} of memory at its highest."
    usable = usable_bytes(plan.job.gpu.memory_bytes, chosen.setup)
    parts = chosen.footprint.parts[chosen.footprint.peak_phase]
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    text = ", ".join(f"{name} {gib(parts[name])}" for name in largest)
    return (
        f"At its highest, in the {chosen.footprint.peak_phase} phase, it takes {gib(chosen.gpu_bytes)} of the "
        f"{gib(usable)} usable on each {plan.job.gpu.name} ({text}), and {gib(chosen.host.peak)} of host RAM."
    )


def why_not_others(plan: Plan) -> Iterator[str]:
    """The presets a newcomer would have tried first, and why they are not it."""
    assert plan.chosen is not None
    for found in best_of_each(plan):
        name = found.setup.preset.name
        if name in ("zero2", "lora", "qlora") and name != plan.chosen.setup.preset.name:
            if not found.fits:
                yield f"{name} does not fit: {'; '.join(found.lacking)}."
            elif found.setup.method == plan.chosen.setup.method:
                ratio = found.step.tokens_per_second / plan.chosen.step.tokens_per_second
                yield f"{name} fits too, at {100 * ratio:.0f} % of the speed."


def advice(plan: Plan) -> Iterator[str]:
    """What the choice costs that a newcomer would not expect."""
    chosen, job = plan.chosen, plan.job
    assert chosen is not None
    if len(job.machine.gpus) == 1 and job.method in ("full", "any"):
        yield "ZeRO-1 and ZeRO-2 shard over GPUs: on one GPU they save nothing."
    if chosen.setup.preset.offload_optimizer == "none" or chosen.setup.method != "full":
        return
    fitting = [found for found in make_plan(dataclasses.replace(job, method="qlora")).candidates if found.fits]
    if fitting:
        adapter = fitting[0]
        times = adapter.step.tokens_per_second / chosen.step.tokens_per_second
        yield (
            f"Full fine-tuning works here only with {gib(chosen.host.peak)} of host RAM and is slow. Recommended "
            f"instead: qlora, {gib(adapter.gpu_bytes)} on the GPU and {times:.1f} times the tokens per second."
        )


def closest(plan: Plan) -> str:
    """What the candidate that lacks least lacks."""
    if not plan.candidates:
        return "no preset runs there"
    least = min(plan.candidates, key=lambda found: (len(found.lacking), found.gpu_bytes))
    return f"{least.setup.preset.name} comes closest ({'; '.join(least.lacking)})"


def suggestions(job: Job) -> list[str]:
    """The nearest jobs that fit: adapters, more cards, offload with enough host RAM, shorter sequences."""
    found = []
    for method, length in ((m, job.length // part) for m in ("lora", "qlora") for part in (1, 2, 4, 8)):
        plan = make_plan(dataclasses.replace(job, method=method, length=length))
        if job.method == "full" and length >= SHORTEST and plan.chosen is not None:
            shorter = "" if length == job.length else f" with {length:,} tokens"
            found.append(f"{plan.chosen.setup.preset.name} on the same machine{shorter}")
            break
    if job.host_bytes is not None:
        plan = make_plan(dataclasses.replace(job, host_bytes=None))
        if plan.chosen is not None:
            found.append(f"{plan.chosen.setup.preset.name} with {gib(plan.chosen.host.peak / 0.95)} of host RAM")
    length = job.length // 2
    while length >= SHORTEST:
        plan = make_plan(dataclasses.replace(job, length=length))
        if plan.chosen is not None:
            found.append(f"{length:,} tokens instead of {job.length:,}, with {plan.chosen.setup.preset.name}")
            break
        length //= 2
    for count in (2, 4, 8, 16, 32, 64):
        if count <= len(job.machine.gpus) or job.global_batch % count:
            continue
        plan = make_plan(dataclasses.replace(job, machine=machine_of(job.gpu, count)))
        if plan.chosen is not None:
            found.append(f"{plan.chosen.setup.preset.name} on {count} x {job.gpu.name}")
            break
    return found


def machine_of(gpu: Gpu, count: int) -> Machine:
    cards = tuple(dataclasses.replace(gpu, index=index) for index in range(count))
    return Machine(gpus=cards, cpu_count=None, ram_bytes=None)


def command_line(plan: Plan, model: str) -> str:
    """What to type for the chosen candidate."""
    assert plan.chosen is not None
    setup = plan.chosen.setup
    length = ["--max_length", str(setup.length)] if setup.loss == "trl" else ["--block_size", str(setup.length)]
    script = "recipes/sft.py" if setup.loss == "trl" else "recipes/continued_pretraining.py"
    return shlex.join(
        [
            "torchrun", "--nproc_per_node", str(setup.world), script,
            "--ds_preset", setup.preset.name,
            "--model_name_or_path", model,
            "--per_device_train_batch_size", str(setup.micro),
            "--gradient_accumulation_steps", str(setup.accumulation),
            "--gradient_checkpointing", str(setup.recompute).lower(),
            *length,
        ]
    )  # fmt: skip


def bars(plan: Plan, candidate: Candidate) -> list[str]:
    """One line a phase: a bar of the card's memory with the parts' initials, and the parts' sizes."""
    total = plan.job.gpu.memory_bytes if plan.job.machine.gpus else max(candidate.footprint.peak, 1)
    lines = []
    for phase in PHASES:
        parts = candidate.footprint.parts[phase]
        bar = ""
        for name in sorted(parts, key=lambda part: -parts[part]):
            bar += name[0].upper() * round(WIDTH * parts[name] / total)
        sizes = ", ".join(f"{name} {gib(size)}" for name, size in sorted(parts.items(), key=lambda item: -item[1]))
        lines.append(f"{phase:9} |{bar[:WIDTH]:{WIDTH}}| {gib(candidate.footprint.allocated[phase]):>9}  {sizes}")
    return lines


def record(plan: Plan, model: str) -> dict[str, Any]:
    """The plan as JSON; sizes in bytes."""
    chosen = plan.chosen
    return {
        "model": model,
        "machine": plan.job.machine.describe(),
        "rates": dataclasses.asdict(plan.job.rates),
        "chosen": None if chosen is None else candidate_record(chosen),
        "why": sentences(plan),
        "command": None if chosen is None else command_line(plan, model),
        "candidates": [candidate_record(found) for found in best_of_each(plan)],
    }


def candidate_record(found: Candidate) -> dict[str, Any]:
    setup = found.setup
    return {
        "preset": setup.preset.name,
        "processes": setup.world,
        "micro_batch_size": setup.micro,
        "gradient_accumulation_steps": setup.accumulation,
        "recompute": setup.recompute,
        "evaluation": found.placement,
        "fits": found.fits,
        "lacking": list(found.lacking),
        "gpu_allocated_bytes": dict(found.footprint.allocated),
        "gpu_parts_bytes": {phase: dict(parts) for phase, parts in found.footprint.parts.items()},
        "gpu_peak_bytes": found.gpu_bytes,
        "gpu_reserved_bytes": found.reserved_bytes,
        "host_bytes": dataclasses.asdict(found.host),
        "checkpoint_bytes": found.disk_bytes,
        "step_seconds": {name: round(value, 4) for name, value in found.step.parts.items()},
        "tokens_per_second": round(found.step.tokens_per_second, 1),
    }
