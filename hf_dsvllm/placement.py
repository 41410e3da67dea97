"""Where vLLM runs beside the trainer, and whether training goes on meanwhile; from arguments and launch alone."""

from __future__ import annotations

import dataclasses
import os
import sys
import urllib.parse
from collections.abc import Sequence
from typing import Any, Literal, get_args

from hf_dsvllm.errors import Problem
from hf_dsvllm.fields import steers
from hf_dsvllm.hardware import detect, usable_cpus
from hf_dsvllm.launch import Launch

__all__ = ["Place", "choose_place", "for_adapters", "place_problems", "visible_gpus"]

Kind = Literal["spare", "shared", "cpu", "remote"]
AUTO = "auto"
PARALLEL = ("gen_eval_tensor_parallel", "gen_eval_data_parallel")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """`gpus` are ids as CUDA_VISIBLE_DEVICES names them, those the engine may use; `late`: training does not wait.

    `stream`: weights go there from GPU to GPU, not by a folder; a shared engine then sleeps between evaluations.
    """

    kind: Kind
    gpus: tuple[str, ...] = ()
    cpu_threads: int | None = None
    url: str | None = None
    late: bool = False
    stream: bool = False
    reason: str

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """What the engine computes on; a remote server is taken to have GPUs."""
        return "cpu" if self.kind == "cpu" else "cuda"


def choose_place(args: Any, device: str, launch: Launch, visible: Sequence[str]) -> Place:
    """The place asked for with --gen_eval_placement, or the first there is of: remote, spare GPUs, the shared one, CPU.

    `device` is the trainer's, `visible` the GPUs this process may use.  Call `place_problems` first.
    """
    kind = choose_kind(args, device, launch, visible)
    late = choose_late(args, kind, device)
    meanwhile = "while training goes on" if late else "while training waits"
    if kind == "remote":
        return Place(kind=kind, url=args.gen_eval_server, late=late, reason=f"{args.gen_eval_server} {meanwhile}")
    if kind == "spare":
        free = tuple(visible[launch.local_world_size :])
        named = f"GPU {free[0]}" if len(free) == 1 else f"GPUs {', '.join(free)}"
        why = f"{named}, which the trainer does not use, {meanwhile}"
        # A late score may be the best of a run whose weights have moved on: then a snapshot of them must exist.
        stream = wants_stream(args, kind) and not (late and steers(args))
        return Place(kind=kind, gpus=free, late=late, stream=stream, reason=why)
    if kind == "shared":
        mine = visible[launch.local_rank % len(visible)]  # a launcher may show each process its own GPU only
        others = tuple(gpu for gpu in visible[: launch.local_world_size] if gpu != mine)
        why = f"GPU {mine}, shared with the trainer's main process, {meanwhile}"
        return Place(kind=kind, gpus=(mine, *others), late=late, stream=wants_stream(args, kind), reason=why)
    threads = usable_cpus()
    if late and device == "cpu":
        threads = max(1, threads - launch.local_world_size)
    return Place(kind=kind, cpu_threads=threads, late=late, reason=f"the CPU with {threads} threads {meanwhile}")


def wants_stream(args: Any, kind: Kind) -> bool:
    """Whether weights shall go from GPU to GPU, without a folder.

    By default they do wherever both ends are GPUs of this host, but for adapters on their way to a spare GPU: a folder
    of megabytes holds training up least, and nothing there has to sleep.
    """
    if args.gen_eval_weights != AUTO:
        return bool(args.gen_eval_weights == "stream")
    adapters = "lora" in str(getattr(args, "ds_preset", None) or "").partition(":")[0].lower()
    return kind == "shared" or (kind == "spare" and not adapters)


def for_adapters(place: Place, args: Any) -> Place:
    """`place` of a run that trains adapters, whoever asked for them: see `wants_stream`."""
    by_folder = place.kind == "spare" and args.gen_eval_weights == AUTO
    return dataclasses.replace(place, stream=False) if by_folder else place


def choose_kind(args: Any, device: str, launch: Launch, visible: Sequence[str]) -> Kind:
    """The kind of place for these arguments, which have no problem."""
    asked = args.gen_eval_placement
    if asked != AUTO:
        kind: Kind = asked
        return kind
    if args.gen_eval_server:
        return "remote"
    if device == "cpu":
        return "cpu"
    return "spare" if len(visible) > launch.local_world_size else "shared"


def choose_late(args: Any, kind: Kind, device: str) -> bool:
    """Whether training goes on while vLLM answers.

    By default where the two do not compete; but `save_strategy=best` saves the weights of the moment in which the score
    is known, which must then be those it belongs to.
    """
    if args.gen_eval_late is not None:
        return bool(args.gen_eval_late)
    apart = kind in ("spare", "remote") or (kind == "cpu" and device != "cpu")
    return apart and not saves_the_best(args)


def saves_the_best(args: Any) -> bool:
    """Whether the Trainer saves a checkpoint at the moment a generation score is the best."""
    return steers(args) and str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"


def place_problems(args: Any, device: str, launch: Launch, visible: Sequence[str]) -> list[Problem]:
    """What is wrong with the place asked for."""
    asked, server = args.gen_eval_placement, args.gen_eval_server
    kinds = (AUTO, *get_args(Kind))
    if asked not in kinds:
        return [Problem(f"gen_eval_placement={asked!r} is none of {', '.join(kinds)}", "--gen_eval_placement auto")]
    problems = []
    ways = (AUTO, "disk", "stream")
    if args.gen_eval_weights not in ways:
        what = f"gen_eval_weights={args.gen_eval_weights!r} is none of {', '.join(ways)}"
        problems.append(Problem(what, "--gen_eval_weights auto"))
    if args.gen_eval_weights == "stream" and (device == "cpu" or asked in ("cpu", "remote") or server):
        what = "gen_eval_weights=stream goes from GPU to GPU of one host"
        problems.append(Problem(what, "--gen_eval_weights disk, or a placement spare or shared"))
    if asked == "remote" and not server:
        problems.append(Problem("gen_eval_placement=remote without a server", "--gen_eval_server http://HOST:PORT"))
    if server and asked not in (AUTO, "remote"):
        what = f"gen_eval_server={server} and gen_eval_placement={asked} name two places"
        problems.append(Problem(what, "drop one of them"))
    if server and not _is_address(server):
        what = f"gen_eval_server={server!r} is no address of a server"
        problems.append(Problem(what, "--gen_eval_server http://HOST:PORT, as vLLM was started with"))
    if asked == "remote" or server:
        ours = [name for name in PARALLEL if getattr(args, name) is not None]
        if ours:
            what = f"{' and '.join(ours)}: how a server that already runs is spread is settled where it was started"
            problems.append(Problem(what, f"drop {' and '.join(f'--{name}' for name in ours)}"))
    if asked in ("spare", "shared") and device == "cpu":
        what = f"gen_eval_placement={asked} is about GPUs and this run trains on CPUs"
        problems.append(Problem(what, "--gen_eval_placement cpu, or drop --use_cpu"))
    if asked == "spare" and device != "cpu" and len(visible) <= launch.local_world_size:
        what = f"gen_eval_placement=spare: the trainer uses all {len(visible)} visible GPUs"
        problems.append(Problem(what, f"start {max(1, len(visible) - 1)} processes, or --gen_eval_placement shared"))
    return problems or late_problems(args, device, launch, visible)


def _is_address(server: str) -> bool:
    """Whether it names a scheme, a host and, if any, a port that is a number."""
    try:
        parts = urllib.parse.urlsplit(server)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def late_problems(args: Any, device: str, launch: Launch, visible: Sequence[str]) -> list[Problem]:
    """Late scores asked for where they cannot be."""
    if not args.gen_eval_late:
        return []
    problems = []
    if choose_kind(args, device, launch, visible) == "shared":
        what = "gen_eval_late on a GPU shared with the trainer: both would need its memory at once"
        problems.append(Problem(what, "leave a GPU free (--gen_eval_placement spare), or drop --gen_eval_late"))
    if saves_the_best(args):
        what = "gen_eval_late with save_strategy=best: when a late score is known its weights have moved on"
        fix = "--save_strategy steps (the best snapshot is kept and loaded at the end all the same)"
        problems.append(Problem(what, fix))
    return problems


def visible_gpus() -> list[str]:
    """The ids this process may use, as CUDA_VISIBLE_DEVICES names them.

    Without that variable the driver counts them where torch is not there yet: a command that only checks imports none.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [part.strip() for part in named.split(",") if part.strip()]
    torch = sys.modules.get("torch")
    count = len(detect().gpus) if torch is None else torch.cuda.device_count()
    return [str(index) for index in range(count)]
