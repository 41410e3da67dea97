"""Every way to run a job on a machine, what each takes, and the fastest that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from hf_dsvllm.hardware import Gpu, Machine
from hf_dsvllm.model_shape import ModelShape
from hf_dsvllm.optimizers import ADAM, state_bytes
from hf_dsvllm.planner.allocator import cannot_give_back, held_bytes, outside_bytes, reserved_bytes
from hf_dsvllm.planner.cards import Rates
from hf_dsvllm.planner.engine import Engine, EnginePlace, engine_footprint, places, settled_place
from hf_dsvllm.planner.footprint import Footprint, Loss, Setup, Traced, between_steps, gpu_footprint
from hf_dsvllm.planner.host import HostFootprint, disk_bytes, host_footprint
from hf_dsvllm.planner.speed import StepTime, step_time
from hf_dsvllm.presets import Preset, get_preset

__all__ = ["Candidate", "Job", "Plan", "make_plan", "usable_bytes"]

Wanted = Literal["full", "lora", "qlora", "any"]
GIB = 2**30
# Safety: share of the card that a plan leaves free for what formulas miss and for fragmentation.
MARGIN = 0.05
HOST_MARGIN = 0.05
TIE = 0.02  # two thirds of the speed model's mean error (benchmarks/planner/results)
# Listing order decides between equals: what is simpler, or known better, stands first.
PRESETS: dict[str, tuple[str, ...]] = {
    "full": (
        "none", "zero2", "zero1", "zero3", "ddp",
        "zero2_offload", "zero3_offload_optimizer", "zero3_offload", "zero3_nvme",
    ),
    "lora": ("lora", "lora_zero2", "zero3+lora", "zero3_offload+lora"),
    "qlora": ("qlora", "qlora_zero2"),
}  # fmt: skip
LARGEST_MICRO = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done, on what.  `global_batch` in sequences of `length` tokens; bytes of all `nodes` together.

    `optimizer`: the name of --optim (`hf_dsvllm.optimizers`).
    `evaluation`: sequences vLLM answers at once and their length, None without evaluation; `streams` whether weights
    reach it from GPU to GPU (then a shared engine sleeps), None where the plan may choose.  `processes` (of them
    `local_processes` here) where the launch has settled their number; otherwise one for each GPU that vLLM leaves.
    """

    shape: ModelShape
    machine: Machine
    rates: Rates
    length: int
    global_batch: int
    method: Wanted = "any"
    loss: Loss = "trl"
    lora_r: int = 16
    host_bytes: int | None = None
    nvme_bytes: int | None = None
    optimizer: str = ADAM
    evaluation: tuple[int, int] | None = None
    streams: bool | None = False
    device: Literal["cuda", "cpu"] = "cuda"
    traced: Traced | None = None
    processes: int | None = None
    local_processes: int | None = None
    nodes: int = 1
    features: frozenset[str] = frozenset()
    features_that_fit: frozenset[str] = frozenset()  # more of them, taken by candidates that have the memory

    @property
    def hosts(self) -> int:
        """Machines: as launched, else as assumed."""
        return self.processes // self.local_processes if self.processes and self.local_processes else self.nodes

    @property
    def gpu(self) -> Gpu:
        """The smallest card: every process does the same work."""
        return min(self.machine.gpus, key=lambda gpu: gpu.memory_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the job, with what it takes; `lacking` says why it does not fit, () if it does.

    `roomy`: the allocator can keep every block it would like to, so that it never stops to give some back.
    """

    setup: Setup
    footprint: Footprint
    reserved_bytes: int
    roomy: bool
    host: HostFootprint
    disk_bytes: int
    step: StepTime
    place: EnginePlace
    engine: Engine | None
    lacking: tuple[str, ...]

    @property
    def placement(self) -> str:
        """Where vLLM answers, in a word."""
        return self.place.kind

    @property
    def fits(self) -> bool:
        return not self.lacking

    @property
    def scarce(self) -> tuple[str, ...]:
        """What is lacking, in a word each."""
        words = {
            "of GPU memory, ": "GPU",
            "cannot give back": "GPU, held",
            "its own GPU": "vLLM's GPU",
            "of its GPU": "vLLM's GPU",
            "host RAM": "host RAM",
        }
        words["NVMe"] = "NVMe"
        return tuple(short for phrase, short in words.items() if any(phrase in text for text in self.lacking))

    @property
    def gpu_bytes(self) -> int:
        """Peak of the GPU that carries most: with an engine beside the trainer, both.

        Awake all the time: peak + awake.  Asleep while training: max(peak + asleep, start + awake, rest + awake), where
        it starts while the trainer loads, and answers beside what training holds between two steps, whose cached blocks
        have been given back (live/stream.py).
        """
        if self.engine is None or self.placement != "shared":
            return self.footprint.peak
        if not self.place.sleeps:
            return self.footprint.peak + self.engine.awake
        start = max(self.footprint.allocated["load"], self.footprint.allocated["init"])
        rest = between_steps(self.setup, self.footprint)
        return max(self.footprint.peak + self.engine.asleep, max(start, rest) + self.engine.awake)

    @property
    def host_bytes(self) -> int:
        """Peak of the host; without GPUs the training of all processes is there too."""
        tensors = self.setup.world * self.footprint.peak if self.setup.device == "cpu" else 0
        return self.host.peak + tensors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All candidates, the choice first, then by speed; `chosen` is None if nothing fits."""

    job: Job
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None


def make_plan(job: Job, *, presets: Sequence[str] | None = None) -> Plan:
    """Try every preset, micro-batch, recompute choice and place for the evaluation that keeps the global batch."""
    found = sorted(every_candidate(job, presets), key=lambda candidate: rank(job, candidate))
    chosen = choose(job, found)
    if chosen is not None:
        found.remove(chosen)
        found.insert(0, chosen)
    return Plan(job=job, candidates=tuple(found), chosen=chosen)


def choose(job: Job, ranked: Sequence[Candidate]) -> Candidate | None:
    """The first that fits; of those as fast within `TIE`, where the model cannot tell, the best by `plainness`."""
    first = next((candidate for candidate in ranked if candidate.fits), None)
    if first is None:
        return None
    close = [
        candidate
        for candidate in ranked
        if candidate.fits
        and rank(job, candidate)[1] == rank(job, first)[1]
        and candidate.step.tokens_per_second >= (1 - TIE) * first.step.tokens_per_second
    ]
    return min(close, key=lambda candidate: (plainness(candidate), rank(job, candidate)))


def plainness(candidate: Candidate) -> tuple[bool, bool, bool, int, bool, int]:
    """What decides between equals: no engine that sleeps needlessly, room to spare, gradients of several micro-batches
    added in fp32, the simplest preset, no layer computed twice, the fewest passes.

    Each pass reads weights and moves gradients anew, and short ones reach less of the card; memory that is left over
    earns nothing.
    """
    setup, roomy = candidate.setup, candidate.roomy
    coarse = setup.accumulation > 1 and setup.method == "full" and setup.preset.zero_stage in (1, 3)
    passes = setup.accumulation if roomy else 0
    return (candidate.place.sleeps, not roomy, coarse, simplicity(setup.preset), setup.recompute, passes)


def simplicity(preset: Preset) -> int:
    """The place of a preset in `PRESETS`; any other stands last."""
    names = [name for listed in PRESETS.values() for name in listed]
    return names.index(preset.name) if preset.name in names else len(names)


def rank(job: Job, candidate: Candidate) -> tuple[bool, int, float, bool, float]:
    """What fits first; where any method will do, all weights, then adapters, then offloading; then the fastest.

    Speeds are compared to three digits; of equals the one that needs less is better, but no engine sleeps needlessly.
    """
    speed = float(f"{candidate.step.tokens_per_second:.3g}")
    preferred = preference(candidate.setup.preset) if job.method == "any" else 0
    return (not candidate.fits, preferred, -speed, candidate.fits and candidate.place.sleeps, candidate.gpu_bytes)


def preference(preset: Preset) -> int:
    """What learns most first, but nothing that waits for the host while something else fits."""
    if preset.offload_optimizer != "none":
        return 3
    return {None: 0, "lora": 1, "qlora": 2}[preset.adapter]


def every_candidate(job: Job, presets: Sequence[str] | None) -> Iterator[Candidate]:
    for world, place in placements(job):
        if job.global_batch % world:
            continue
        for preset in wanted_presets(job, presets, world):
            for micro in micro_batches(job.global_batch // world):
                if preset.zero_stage == 1 and not presets and job.global_batch > world * micro:
                    continue  # it adds the gradients of several micro-batches in bf16, where ZeRO-2 has fp32
                for recompute in (False, True):
                    yield judge(job, preset, world, micro, recompute, place)


def placements(job: Job) -> Iterator[tuple[int, EnginePlace]]:
    """Processes that train, and where vLLM answers."""
    gpus = len(job.machine.gpus)
    evaluates = job.evaluation is not None and job.device == "cuda"
    if job.processes is not None:
        local = job.local_processes or job.processes
        if not evaluates:
            yield job.processes, EnginePlace()
            return
        spare = gpus > local
        there = gpus - local if spare else local
        kind: Literal["spare", "shared"] = "spare" if spare else "shared"
        yield (
            job.processes,
            settled_place(job.shape, kind, there, job.gpu.memory_bytes, streams=bool(job.streams)),
        )
        return
    count = gpus if job.device == "cuda" else 1
    if not evaluates:
        yield count, EnginePlace()
        return
    yield from places(job.shape, count, job.gpu.memory_bytes, streams=job.streams)


def wanted_presets(job: Job, names: Sequence[str] | None, world: int) -> Iterator[Preset]:
    methods = ("full", "lora", "qlora") if job.method == "any" else (job.method,)
    for name in names or [name for method in methods for name in PRESETS[method]]:
        preset = get_preset(name)
        if preset.name == "none" and world > 1:
            continue
        if preset.name == "ddp" and world == 1:
            continue
        if preset.name == "zero3+lora" and world == 1 and not names:
            continue  # nothing to shard: lora_zero2 without its hooks on every module of every adapter
        if preset.needs_nvme and not job.nvme_bytes:
            continue
        yield preset


def micro_batches(per_process: int) -> list[int]:
    """Micro-batches that divide the sequences of one process."""
    return [size for size in range(1, min(per_process, LARGEST_MICRO) + 1) if per_process % size == 0]


def judge(job: Job, preset: Preset, world: int, micro: int, recompute: bool, place: EnginePlace) -> Candidate:
    """One candidate with everything it takes and lacks."""
    if job.features_that_fit and preset.offload_optimizer == "cpu":
        plain = dataclasses.replace(job, features_that_fit=frozenset())
        more = dataclasses.replace(plain, features=job.features | job.features_that_fit)
        found = judge(more, preset, world, micro, recompute, place)
        return found if found.fits and found.setup.sums_on_gpu else judge(plain, preset, world, micro, recompute, place)
    setup = Setup(
        shape=job.shape,
        preset=preset,
        world=world,
        micro=micro,
        accumulation=job.global_batch // world // micro,
        length=job.length,
        recompute=recompute,
        loss=job.loss,
        lora_r=job.lora_r,
        optimizer_bytes=state_bytes(job.optimizer, preset.zero_stage),
        device=job.device,
        traced=job.traced,
        features=job.features,
    )
    footprint, host = gpu_footprint(setup), host_footprint(setup)
    engine = None
    if job.evaluation is not None and place.kind != "none":
        engine = engine_footprint(job.shape, place, length=job.evaluation[1], card_bytes=job.gpu.memory_bytes)
    held = held_bytes(setup, footprint)
    room = job.gpu.memory_bytes - outside_bytes(setup) if job.device == "cuda" else held
    candidate = Candidate(
        setup=setup,
        footprint=footprint,
        reserved_bytes=reserved_bytes(setup, footprint, job.gpu.memory_bytes if job.device == "cuda" else None),
        roomy=False,
        host=host,
        disk_bytes=disk_bytes(setup),
        step=step_time(setup, job.rates),
        place=place,
        engine=engine,
        lacking=(),
    )
    beside = candidate.gpu_bytes - footprint.peak
    return dataclasses.replace(candidate, roomy=held + beside <= room, lacking=tuple(shortfalls(job, candidate)))


def usable_bytes(card_bytes: int, setup: Setup) -> int:
    """usable = (card - what CUDA and NCCL take) * (1 - margin)"""
    return int((card_bytes - outside_bytes(setup)) * (1 - MARGIN))


def shortfalls(job: Job, candidate: Candidate) -> Iterator[str]:
    """What the machine has too little of."""
    if job.device == "cuda":
        setup, beside = candidate.setup, " with vLLM beside it" if candidate.placement == "shared" else ""
        usable = usable_bytes(job.gpu.memory_bytes, setup)
        held = held_bytes(setup, candidate.footprint) + beside_training(candidate)
        room = job.gpu.memory_bytes - outside_bytes(setup)
        if candidate.gpu_bytes > usable:
            yield f"needs {gib(candidate.gpu_bytes)} of GPU memory, {gib(usable)} are usable{beside}"
        elif cannot_give_back(setup) and held > room:
            yield f"needs {gib(held)} of GPU memory with what PyTorch cannot give back, {gib(room)} are there{beside}"
        yield from engine_shortfalls(candidate, usable)
    if job.host_bytes is not None and candidate.host_bytes > job.host_bytes * (1 - HOST_MARGIN):
        yield f"needs {gib(candidate.host_bytes)} of host RAM, {gib(job.host_bytes * (1 - HOST_MARGIN))} are usable"
    if candidate.host.nvme and job.nvme_bytes is not None and candidate.host.nvme > job.nvme_bytes:
        yield f"needs {gib(candidate.host.nvme)} of NVMe, {gib(job.nvme_bytes)} are free"


def beside_training(candidate: Candidate) -> int:
    """What an engine on the same GPU holds during a step."""
    if candidate.engine is None or candidate.placement != "shared":
        return 0
    return candidate.engine.asleep if candidate.place.sleeps else candidate.engine.awake


def engine_shortfalls(candidate: Candidate, usable: int) -> Iterator[str]:
    """What vLLM alone has too little of."""
    engine = candidate.engine
    if engine is None:
        return
    if not engine.starts:
        yield (
            f"vLLM's weights are {gib(engine.weights)} on each of {candidate.place.gpus} GPUs, and it may take "
            f"{gib(engine.allowed_weights)} of its GPU for them ({candidate.placement})"
        )
    elif candidate.placement == "spare" and engine.awake > usable:
        yield f"vLLM needs {gib(engine.awake)} on its own GPU, {gib(usable)} are usable"


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
