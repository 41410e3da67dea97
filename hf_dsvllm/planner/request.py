"""The words of `hf-dsvllm plan` → a `Job`, with every problem of them in one `ConfigError`."""

from __future__ import annotations

import dataclasses
import difflib
import re

from hf_dsvllm.errors import ConfigError, DsvllmError, HardwareError, Problem
from hf_dsvllm.features import left_to_plan, planned
from hf_dsvllm.hardware import Machine, count_and_card, detect, parse_machine
from hf_dsvllm.model_shape import ModelShape, UnknownModelError, load_shape
from hf_dsvllm.optimizers import ADAM, STATE_BYTES
from hf_dsvllm.planner.cards import Rates, machine_rates, rates_of
from hf_dsvllm.planner.footprint import Traced
from hf_dsvllm.planner.search import Job
from hf_dsvllm.planner.suggest import nodes_of

__all__ = ["METHODS", "Request", "job_of", "lacks_formulas", "parse_bytes"]

METHODS = ("full", "lora", "qlora", "any")
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}  # powers of 1000, of 1024 with an i
MOST_GPUS = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked, as typed.  `gpus` None is this machine; `eval_sequences` 0 is no evaluation by vLLM."""

    model: str
    gpus: str | None = None
    seq_len: int = 2048
    global_batch: int = 32
    method: str = "any"
    loss: str = "trl"
    lora_r: int = 16
    optim: str = ADAM
    host_ram: str | None = None
    nvme: str | None = None
    eval_sequences: int = 0
    eval_length: int = 1024


def job_of(request: Request, shape: ModelShape | None = None, traced: Traced | None = None) -> Job:
    """Everything looked up and checked; `shape` and `traced` from `hf_dsvllm.trace` where the model was traced.

    Raises ConfigError with all problems.
    """
    problems: list[Problem] = []
    shape = shape or found_shape(request, problems)
    machine = found_machine(request, problems)
    host = sized(request.host_ram, "--host_ram", problems)
    nvme = sized(request.nvme, "--nvme", problems)
    problems += number_problems(request, shape, machine)
    if problems or shape is None or machine is None:
        raise ConfigError(problems)
    try:
        rates = rates_for(request, machine)
    except HardwareError as error:
        raise ConfigError([Problem(str(error), "--gpus with the nearest card of the catalogue")]) from error
    on_gpu = bool(machine.gpus)
    nodes = 1 if request.gpus is None else nodes_of(len(machine.gpus))
    return Job(
        shape=shape,
        machine=machine,
        rates=rates,
        length=request.seq_len,
        global_batch=request.global_batch,
        method=request.method,  # type: ignore[arg-type]
        loss=request.loss,  # type: ignore[arg-type]
        lora_r=request.lora_r,
        optimizer=request.optim,
        host_bytes=host * nodes if host else machine.ram_bytes,
        nvme_bytes=nvme and nvme * nodes,
        evaluation=(request.eval_sequences, request.eval_length) if request.eval_sequences else None,
        device="cuda" if on_gpu else "cpu",
        traced=traced,
        streams=None,
        nodes=nodes,
        features=planned(None),
        features_that_fit=left_to_plan(None) if request.loss == "trl" else frozenset(),
    )


def found_shape(request: Request, problems: list[Problem]) -> ModelShape | None:
    try:
        return load_shape(request.model)
    except DsvllmError as error:
        problems.append(
            Problem(
                str(error),
                "a local folder with a config.json or a hub id; --trace for an architecture the formulas do not know",
            )
        )
        return None


def lacks_formulas(model: str) -> str | None:
    """The `model_type` that no formula knows; None where there is one, or another problem that `job_of` will name."""
    try:
        load_shape(model)
    except UnknownModelError as error:
        return error.model_type
    except DsvllmError:
        return None
    return None


def found_machine(request: Request, problems: list[Problem]) -> Machine | None:
    count = 1 if request.gpus is None else count_and_card(request.gpus)[0]
    if count > MOST_GPUS:
        problems.append(Problem(f"--gpus {request.gpus} is more than {MOST_GPUS:,} GPUs", f"{MOST_GPUS} or fewer"))
        return None
    try:
        return detect() if request.gpus is None else parse_machine(request.gpus)
    except HardwareError as error:
        problems.append(Problem(str(error), "--gpus 4xH100-80GB, or leave it out for this machine"))
        return None


def rates_for(request: Request, machine: Machine) -> Rates:
    """This machine's rates if it is the one asked about, else the catalogue's."""
    return machine_rates(machine) if request.gpus is None else rates_of(machine.gpus[0].name)


def sized(text: str | None, flag: str, problems: list[Problem]) -> int | None:
    if text is None:
        return None
    size = parse_bytes(text)
    if size is None:
        bare = text.strip().isdecimal()
        what = f"{flag} {text} has no unit" if bare else f"{flag} {text} is not a size"
        problems.append(Problem(what, f"{flag} {text.strip()}GB" if bare else f"{flag} 512GB or 2TB"))
    return size


def parse_bytes(text: str) -> int | None:
    """`512GB`, `512G`, `1.5TiB` → bytes; None for anything that is no positive size with its unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(I?)B?", text.strip().upper())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** UNITS[found[2]]) if found else 0
    return size if size > 0 else None


def number_problems(request: Request, shape: ModelShape | None, machine: Machine | None) -> list[Problem]:
    """Lengths, batches and words that cannot be."""
    problems = []
    if request.method not in METHODS:
        near = difflib.get_close_matches(request.method, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        problems.append(Problem(f"--method {request.method} is not known", f"{hint}use {', '.join(METHODS)}"))
    if request.optim not in STATE_BYTES:
        near = ", ".join(difflib.get_close_matches(request.optim, STATE_BYTES, n=3)) or ", ".join(STATE_BYTES)
        problems.append(Problem(f"--optim {request.optim} is not known to the planner", f"--optim {near}"))
    if request.loss not in ("trl", "plain"):
        problems.append(Problem(f"--loss {request.loss} is not known", "use trl (SFTTrainer) or plain (Trainer)"))
    for name, value in (
        ("seq_len", request.seq_len),
        ("global_batch", request.global_batch),
        ("lora_r", request.lora_r),
    ):
        if value < 1:
            problems.append(Problem(f"--{name} {value} must be at least 1", f"--{name} a positive number"))
    if request.eval_sequences < 0:
        what = f"--eval_sequences {request.eval_sequences} is less than none"
        problems.append(Problem(what, "--eval_sequences 0 without evaluation, else 1 or more"))
    if request.eval_sequences > 0 and request.eval_length < 1:
        problems.append(Problem(f"--eval_length {request.eval_length} must be at least 1", "--eval_length 1024"))
    problems += length_problems(request, shape)
    count = len(machine.gpus) if machine else count_and_card(request.gpus or "")[0]
    if 1 < count <= MOST_GPUS and request.global_batch >= 1 and request.global_batch % count:
        down = request.global_batch // count * count
        choices = " or ".join(str(value) for value in (down, down + count) if value)
        problems.append(
            Problem(
                f"--global_batch {request.global_batch} sequences cannot be split evenly over {count} GPUs",
                f"--global_batch {choices}",
            )
        )
    return problems


def length_problems(request: Request, shape: ModelShape | None) -> list[Problem]:
    """Sequences longer than the model was made for."""
    longest = shape.max_length if shape else None
    lengths = {"seq_len": request.seq_len, "eval_length": request.eval_length if request.eval_sequences > 0 else 0}
    return [
        Problem(
            f"--{name} {value} is longer than the model's max_position_embeddings={longest}",
            f"--{name} {longest} or less",
        )
        for name, value in lengths.items()
        if longest is not None and value > longest
    ]
