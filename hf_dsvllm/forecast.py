"""The planner's word on one run: what it predicts, what was measured against it, and what to change out of memory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.auto import features_of, loss_of, planned_length, trl_config
from hf_dsvllm.errors import DsvllmError
from hf_dsvllm.features import asks_for
from hf_dsvllm.hardware import Machine, detect
from hf_dsvllm.launch import read_launch
from hf_dsvllm.model_shape import load_shape
from hf_dsvllm.optimizers import ADAM, optimizer_of, state_bytes
from hf_dsvllm.outcome import has_known_steps
from hf_dsvllm.planner.allocator import cannot_give_back, held_bytes
from hf_dsvllm.planner.cards import Rates, learn, machine_rates
from hf_dsvllm.planner.footprint import Footprint, Setup, between_steps, gpu_footprint
from hf_dsvllm.planner.host import HostFootprint, host_footprint
from hf_dsvllm.planner.search import Job, gib, make_plan
from hf_dsvllm.planner.speed import StepTime, step_time
from hf_dsvllm.planner.suggest import suggestions
from hf_dsvllm.presets import Preset
from hf_dsvllm.wiring import Wiring

__all__ = ["Forecast", "as_trained", "comparison", "forecast", "held_beside", "learn_from", "out_of_memory_advice"]


STEPS_TO_LEARN_FROM = 5
WORDS = {
    "before training": "before training (load, engine init)",
    "steps": "in steps (forward, backward, optimizer)",
    "between steps": "between steps (states; evaluations and saves come on top)",
}
FULL = 0.9  # of the planned tokens: with shorter sequences a step says nothing about the formulas


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run is predicted to take, for sequences of full length.

    `teaches`: the formulas describe this run, so that its step time may correct later plans.
    """

    setup: Setup
    machine: Machine
    rates: Rates
    footprint: Footprint
    host: HostFootprint
    step: StepTime
    optimizer: str = ADAM
    teaches: bool = True

    def as_record(self) -> dict[str, Any]:
        """As it stands in plan.json; sizes in bytes, of one GPU, and of all processes on the host."""
        setup = self.setup
        return {
            "preset": setup.preset.name,
            "processes": setup.world,
            "micro_batch_size": setup.micro,
            "gradient_accumulation_steps": setup.accumulation,
            "length": setup.length,
            "recompute": setup.recompute,
            "loss": setup.loss,
            "gpu_allocated_bytes": dict(self.footprint.allocated) if setup.device == "cuda" else None,
            "gpu_parts_bytes": {phase: dict(parts) for phase, parts in self.footprint.parts.items()},
            "gpu_bytes_as_measured": moments(self) if setup.device == "cuda" else None,
            "host_bytes": host_peak(self),
            "step_seconds": round(self.step.seconds, 4),
            "step_parts_seconds": {name: round(value, 4) for name, value in self.step.parts.items()},
            "rates": self.rates.source,
        }


def largest_file(model: str) -> dict[str, int]:
    """`file_bytes` of a model in a folder, {} for one that is elsewhere."""
    sizes = [file.stat().st_size for file in Path(model).expanduser().glob("*.safetensors")]
    return {"file_bytes": max(sizes)} if sizes else {}


def moments(found: Forecast) -> dict[str, int]:
    """Predicted peaks of the moments that a run can tell apart (`hf_dsvllm.measure`).

    Loading and engine init are one to it, and so are the parts of a step: callbacks come too late to part them.
    Between steps it is the least: an evaluation, a snapshot or a save comes on top.
    """
    allocated = found.footprint.allocated
    return {
        "before training": max(allocated["load"], allocated["init"]),
        "steps": max(allocated["forward"], allocated["backward"], allocated["optimizer"]),
        "between steps": between_steps(found.setup, found.footprint),
    }


def held_beside(found: Forecast) -> int:
    """What the trainer holds of its GPU while vLLM starts (the trainer loads) or answers (it is between two steps)."""
    beside = moments(found)
    return max(beside["before training"], beside["between steps"])


def host_peak(found: Forecast) -> int:
    """Resident bytes of all processes, as a run measures them; on a machine without GPU its tensors are among them."""
    tensors = found.setup.world * found.footprint.peak if found.setup.device == "cpu" else 0
    return max(found.host.resident_peak, found.host.train + tensors)


def forecast(args: Any, model_args: Any, preset: Preset | None, device: str) -> Forecast | None:
    """The prediction for these arguments; None without a preset or for a model the formulas do not know."""
    if preset is None:
        return None
    try:
        shape = load_shape(model_args.model_name_or_path, revision=model_args.model_revision)
        machine = detect()
        rates = machine_rates(machine if device == "cuda" else None)
    except DsvllmError:
        return None
    setup = Setup(
        shape=shape,
        preset=preset,
        world=read_launch().world_size,
        micro=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        length=planned_length(args, sys.argv[1:]),
        recompute=args.gradient_checkpointing,
        loss=loss_of(args),
        lora_r=model_args.lora_r,
        lora_dropout=bool(model_args.lora_dropout),
        optimizer_bytes=state_bytes(optimizer_of(args), preset.zero_stage),
        **largest_file(str(model_args.model_name_or_path)),
        device="cuda" if device == "cuda" else "cpu",
        features=features_of(args, model_args),
    )
    asked = asks_for(args.ds_speed, "whole_layers")  # the planner does not count with them where weights are offloaded
    return Forecast(
        setup=setup,
        machine=machine,
        rates=rates,
        footprint=gpu_footprint(setup),
        host=host_footprint(setup),
        step=step_time(setup, rates),
        optimizer=optimizer_of(args),
        teaches=trl_config(args) in (None, "SFTConfig") and not (asked and preset.offload_param != "none"),
    )


def as_trained(found: Forecast | None, trainer: Any, wiring: Wiring) -> Forecast | None:
    """The forecast, which learns nothing from a Trainer that trains otherwise: other weights, or a loss of its own.

    A `compute_loss` or `training_step` of the script's may ask a second model, say.
    """
    if found is None:
        return None
    method = "full" if not wiring.adapter_modules else "qlora" if wiring.four_bit_modules else "lora"
    whole = method != "full" or wiring.trainable_parameters >= FULL * found.setup.shape.parameters
    known = has_known_steps(trainer)
    return dataclasses.replace(found, teaches=found.teaches and whole and known and method == found.setup.method)


def comparison(found: Forecast, measured: Mapping[str, Any]) -> list[str]:
    """Predicted against measured, one line each; `measured` are the figures of measured.json.

    The peaks first, then the GPU's moment by moment.
    """
    pairs = []
    allocated = measured.get("gpu_peak_allocated_gib")
    if allocated:
        pairs.append(("GPU peak", found.footprint.peak / 2**30, allocated, "GiB"))
    if measured.get("host_peak_all_gib"):
        pairs.append(("host RAM", host_peak(found) / 2**30, measured["host_peak_all_gib"], "GiB"))
    if measured.get("median_step_seconds") and found.setup.device == "cuda":  # CPUs have no rates of their own
        pairs.append(("step", found.step.seconds, measured["median_step_seconds"], "s"))
    pairs += [
        (f"GPU {WORDS[name]}", said / 2**30, actual, "GiB")
        for name, said in moments(found).items()
        if (actual := measured.get("phases", {}).get(name, {}).get("allocated_gib"))
    ]
    return [
        f"{name}: predicted {said:.2f} {unit}, measured {actual:.2f} {unit} ({100 * (said / actual - 1):+.0f} %)"
        for name, said, actual, unit in pairs
    ]


def learn_from(found: Forecast, measured: Mapping[str, Any]) -> bool:
    """Keep a GPU run's step time for later plans on this machine; False for one too short, or with short sequences.

    Nothing is learnt from a run that the formulas do not describe (`Forecast.teaches`).
    """
    setup, seconds, steps = found.setup, measured.get("median_step_seconds"), measured.get("steps") or 0
    full = (measured.get("tokens") or 0) >= FULL * steps * setup.step_tokens
    if not found.teaches or not seconds or steps < STEPS_TO_LEARN_FROM or not full or setup.device != "cuda":
        return False
    learn(found.machine.gpus[0].name, found.rates, seconds / (found.step.seconds / found.rates.correction))
    return True


def out_of_memory_advice(found: Forecast | None, error: str) -> str:
    """What to change after an out-of-memory error on a GPU: the fastest way that needs a tenth less than this one."""
    first = error.strip().splitlines()[0] if error.strip() else "out of memory"
    if found is None:
        return (
            f"the GPU ran out of memory: {first}. Take a smaller --per_device_train_batch_size with more "
            "--gradient_accumulation_steps, --gradient_checkpointing true, or a preset that shards more."
        )
    setup = found.setup
    said = f"predicted {gib(found.footprint.peak)} at most for sequences of {setup.length:,} tokens"
    if cannot_give_back(setup):
        said += f", {gib(held_bytes(setup, found.footprint))} with what PyTorch cannot give back"
    plan = make_plan(job_of(found))
    less = [
        candidate
        for candidate in plan.candidates
        if candidate.fits and candidate.gpu_bytes < 0.9 * found.footprint.peak
    ]
    if not less:
        others = "; or ".join(suggestions(plan.job)) or "shorter sequences (--max_length)"
        return f"the GPU ran out of memory ({said}): {first}. Nothing smaller fits; what would: {others}."
    best = less[0].setup
    changes = [
        f"--{name} {value}"
        for name, value, before in (
            ("ds_preset", best.preset.name, setup.preset.name),
            ("per_device_train_batch_size", best.micro, setup.micro),
            ("gradient_accumulation_steps", best.accumulation, setup.accumulation),
            ("gradient_checkpointing", str(best.recompute).lower(), str(setup.recompute).lower()),
        )
        if value != before
    ]
    return (
        f"the GPU ran out of memory ({said}): {first}. Start again with {' '.join(changes)}: "
        f"predicted {gib(less[0].gpu_bytes)}, the same batch for each update."
    )


def job_of(found: Forecast) -> Job:
    """The work of this run, for another plan."""
    setup = found.setup
    local = read_launch().local_world_size
    nodes = max(1, setup.world // local)
    return Job(
        shape=setup.shape,
        machine=found.machine,
        rates=found.rates,
        length=setup.length,
        global_batch=setup.world * setup.micro * setup.accumulation,
        method=setup.method,
        loss=setup.loss,
        lora_r=setup.lora_r,
        optimizer=found.optimizer,
        host_bytes=found.machine.ram_bytes and found.machine.ram_bytes * nodes,
        device=setup.device,
        features=setup.features,
        processes=setup.world,
        local_processes=local,
    )
