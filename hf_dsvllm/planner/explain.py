"""A plan in words: the table, the choice in sentences, what would fit if nothing does, the command line, the bars."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from hf_dsvllm.optimizers import ADAM
from hf_dsvllm.planner.cards import NVME_BYTES_PER_S, lacks_bf16
from hf_dsvllm.planner.engine import CONCURRENT_SEQUENCES
from hf_dsvllm.planner.footprint import PHASES, Setup
from hf_dsvllm.planner.search import GIB, Candidate, Job, Plan, gib, make_plan, usable_bytes
from hf_dsvllm.planner.setup import NODE_GPUS
from hf_dsvllm.planner.suggest import suggestions

__all__ = ["bars", "best_of_each", "command_line", "record", "sentences", "suggestions", "table_rows"]

WIDTH = 46
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
                f"{found.host_bytes / GIB:.0f}",
                f"{found.step.tokens_per_second:,.0f}",
                verdict,
            )
        )
    return rows


def sentences(plan: Plan) -> list[str]:
    """The choice, for somebody who has never heard of ZeRO."""
    chosen, job = plan.chosen, plan.job
    if chosen is None:
        lines = [f"Nothing fits on this machine ({job.machine.describe()}): {closest(plan)}."]
        found = suggestions(job)
        if found:
            lines.append("What would fit: " + "; or ".join(found) + ".")
        if not job.machine.gpus:
            lines.append("The driver reports no GPU here: --gpus 4xH100-80GB plans for another machine.")
        return lines
    setup = chosen.setup
    lines = [
        f"Use {setup.preset.name}: {setup.preset.summary}.",
        batch_sentence(setup),
        memory_sentence(plan, chosen),
        speed_sentence(job, chosen),
        *engine_sentences(job, chosen),
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
        return f"It needs {gib(chosen.host_bytes)} of memory at its highest."
    usable = usable_bytes(plan.job.gpu.memory_bytes, chosen.setup)
    parts = chosen.footprint.parts[chosen.footprint.peak_phase]
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    text = ", ".join(f"{name} {gib(parts[name])}" for name in largest)
    return (
        f"At its highest, in the {chosen.footprint.peak_phase} phase, it takes {gib(chosen.gpu_bytes)} of the "
        f"{gib(usable)} usable on each {plan.job.gpu.name} ({text}), and {host_words(chosen)}."
    )


def engine_sentences(job: Job, chosen: Candidate) -> Iterator[str]:
    """Where vLLM answers, what it takes there, and what it does between evaluations."""
    engine, place = chosen.engine, chosen.place
    if engine is None or job.evaluation is None:
        return
    count = place.gpus * place.copies
    cards = "1 GPU" if count == 1 else f"{count} GPUs"
    where = f"on {cards} of its own" if place.kind == "spare" else f"on {cards} of the trainer's"
    takes = f"{gib(engine.awake)} on each ({gib(engine.weights)} weights, {gib(engine.kv_bytes)} KV cache)"
    shared = f", in {place.copies} copies that share the prompts," if place.copies > 1 else ""
    yield f"vLLM answers {where}{shared} and takes {takes}."
    if place.sleeps:
        yield (
            f"Between evaluations it sleeps ({gib(engine.asleep)} stay), which it does only where weights are streamed "
            "(--gen_eval_weights stream): awake it does not fit beside this training."
        )
    elif place.kind == "shared":
        yield "It keeps that memory between evaluations, as weights reach it by the disk."
    rounds = -(-job.evaluation[0] // CONCURRENT_SEQUENCES)
    if rounds > 1:
        yield f"{job.evaluation[0]} sequences are answered {CONCURRENT_SEQUENCES} at a time: its cache is for as many."


def host_words(chosen: Candidate) -> str:
    """Host memory in training, which was held against measurements, and what loading and saving may take beyond it."""
    training, peak = chosen.host.measured_peak, chosen.host_bytes
    more = f" ({gib(peak)} while the model is loaded or saved)" if peak > 1.05 * training else ""
    return f"{gib(training)} of host RAM in training{more}"


def why_not_others(plan: Plan) -> Iterator[str]:
    """The presets a newcomer would have tried first, and why they are not it."""
    assert plan.chosen is not None
    said = {plan.chosen.setup.preset.name}
    for found in best_of_each(plan):
        name = found.setup.preset.name
        if name in ("zero2", "lora", "qlora") and name not in said:
            said.add(name)
            if not found.fits:
                yield f"{name} does not fit: {'; '.join(found.lacking)}."
            elif found.setup.method == plan.chosen.setup.method:
                ratio = found.step.tokens_per_second / plan.chosen.step.tokens_per_second
                yield f"{name} fits too, at {100 * ratio:.0f} % of the speed."


def advice(plan: Plan) -> Iterator[str]:
    """What the choice costs that a newcomer would not expect."""
    chosen, job = plan.chosen, plan.job
    assert chosen is not None
    if without_bf16(job):
        yield (
            f"{job.gpu.name} has no bf16: train with --fp16 true, whose loss scaling may skip steps; nothing of this "
            "was measured." + (" vLLM is started in bf16 and will not run there." if chosen.engine else "")
        )
    if named_targets(chosen.setup):
        yield (
            "Adapters are put on the attention alone, by name: on fused experts PEFT allows none with dropout, and "
            "they are not counted here."
        )
    if job.nodes > 1:
        yield (
            f"{len(job.machine.gpus)} GPUs are taken to be {job.nodes} machines of {NODE_GPUS} each, --host_ram "
            "and --nvme to be those of one; the network between machines is not in the speed."
        )
    if chosen.setup.preset.needs_nvme:
        rate = job.rates.nvme_bytes_per_s
        known = "an assumption" if rate == NVME_BYTES_PER_S else "as measured"
        yield f"The NVMe drive is taken to move {rate / 1e9:.1f} GB/s ({known}); all processes of a machine share it."
    if job.traced is not None:
        yield "Parameters and activations were counted on the model itself, with fake tensors; the rest are formulas."
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


def command_line(plan: Plan, model: str) -> str:
    """What to type for the chosen candidate; the files, and the address of several machines, are to be filled in."""
    assert plan.chosen is not None
    setup, job = plan.chosen.setup, plan.job
    length = ["--max_length", str(setup.length)] if setup.loss == "trl" else ["--block_size", str(setup.length)]
    script = "recipes/sft.py" if setup.loss == "trl" else "recipes/continued_pretraining.py"
    nodes = job.nodes if setup.world % job.nodes == 0 else 1
    several = ["--nnodes", str(nodes), "--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST:29500"] if nodes > 1 else []
    return shlex.join(
        [
            "torchrun", *several, "--nproc_per_node", str(setup.world // nodes), script,
            "--ds_preset", setup.preset.name,
            "--model_name_or_path", model,
            "--per_device_train_batch_size", str(setup.micro),
            "--gradient_accumulation_steps", str(setup.accumulation),
            "--gradient_checkpointing", str(setup.recompute).lower(),
            *length,
            *(("--optim", job.optimizer) if job.optimizer != ADAM else ()),
            *(("--fp16", "true") if without_bf16(job) else ()),
            *(("--lora_target_modules", *targets) if (targets := named_targets(setup)) else ()),
            *engine_flags(plan.chosen),
        ]
    )  # fmt: skip


def named_targets(setup: Setup) -> tuple[str, ...]:
    """Adapters of a mixture of experts, by name: () where "all-linear" does.

    PEFT 0.21.2 takes "all-linear" to mean fused experts as well where the attention's layers are the only linear ones
    (Mixtral, Qwen3-MoE), and refuses them with dropout, TRL's default.
    """
    inner = [linear for linear in setup.shape.linears if linear.kind != "lm_head"]
    if setup.method == "full" or not setup.shape.experts or any(linear.kind != "attention" for linear in inner):
        return ()
    return tuple(dict.fromkeys(linear.name for linear in inner))


def engine_flags(chosen: Candidate) -> Iterator[str]:
    """The flags with which a run puts vLLM where the plan has it."""
    place = chosen.place
    if chosen.engine is None:
        return
    yield from ("--gen_eval_file", "EVALUATION.jsonl", "--gen_eval_placement", place.kind)
    if place.gpus > 1:
        yield from ("--gen_eval_tensor_parallel", str(place.gpus))
    if place.copies > 1:
        yield from ("--gen_eval_data_parallel", str(place.copies))
    if place.kind == "shared":
        yield from ("--gen_eval_weights", "stream" if place.sleeps else "disk")


def without_bf16(job: Job) -> bool:
    """Whether the card computes in fp16 only."""
    return job.device == "cuda" and lacks_bf16(job.gpu)


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
        "counted_by": "trace" if plan.job.traced else "formulas",
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
        "engine": None
        if found.engine is None
        else {
            "gpus": found.place.gpus,
            "copies": found.place.copies,
            "sleeps": found.place.sleeps,
            **dataclasses.asdict(found.engine),
        },
        "fits": found.fits,
        "lacking": list(found.lacking),
        "gpu_allocated_bytes": dict(found.footprint.allocated),
        "gpu_parts_bytes": {phase: dict(parts) for phase, parts in found.footprint.parts.items()},
        "gpu_peak_bytes": found.gpu_bytes,
        "gpu_reserved_bytes": found.reserved_bytes,
        "host_peak_bytes": found.host_bytes,
        "host_training_bytes": found.host.measured_peak,
        "host_bytes": dataclasses.asdict(found.host),
        "checkpoint_bytes": found.disk_bytes,
        "step_seconds": {name: round(value, 4) for name, value in found.step.parts.items()},
        "tokens_per_second": round(found.step.tokens_per_second, 1),
    }
