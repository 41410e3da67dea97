"""The cells that the planner is held against: which runs are measured, in which order, and which are for testing only.

Order matters: a measurement may be cut off at any moment, so what tells most comes first.  Cells of one `case` are
alternatives for the same work (model, method, cards, length, tokens in a step): what `make_plan` chooses for it is
compared with the fastest of them (`choices.py`), and they must be timed on one host for that.

`FIRST` was measured on the first host as far as its time went.  `SECOND` are the choices of the planner that those
cells left out, each with its nearest rivals timed again beside it: measured on four GPUs of another host
(results/4xH200-2), which made the planner's micro-batches, ZeRO-1, adapters under ZeRO-3 and several processes without
DeepSpeed something that was seen.  `NEXT` is what has not been measured: ZeRO-1 with several micro-batches, which it
adds in bf16 and reduces once; ZeRO-3 on one GPU, where the cells of two hosts disagree; cells within 8 % of where the
planner says that memory ends, on both sides; offload on several GPUs.  As many cells run at a time as there are GPUs.
Each host's cells go into a folder of their own (rates are those of one host), and cells of one case count only beside
each other:

    python benchmarks/planner/measure.py --out runs/planner/3 --gpus 2 --budget_s 560 --note "2 x H200, third host"
    mkdir -p benchmarks/planner/results/2xH200-3
    cp runs/planner/3/*.json benchmarks/planner/results/2xH200-3/
    python benchmarks/planner/report.py

`python benchmarks/planner/matrix.py` lists the cells with what is predicted of each, and which are held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

__all__ = ["SHAPES", "Cell", "cells", "held_out"]

# Qwen3's config.json files: hidden, intermediate, layers, heads, key-value heads, tied; head_dim 128, 151936 words.
SHAPES: dict[str, tuple[int, int, int, int, int, bool]] = {
    "tiny": (64, 128, 2, 2, 1, True),  # for trying the measurement itself on a CPU
    "0.6b": (1024, 3072, 28, 16, 8, True),
    "1.7b": (2048, 6144, 28, 16, 8, True),
    "4b": (2560, 9728, 36, 32, 8, True),
    "8b": (4096, 12288, 36, 32, 8, False),
    "14b": (5120, 17408, 40, 40, 8, False),
    "32b": (5120, 25600, 64, 64, 8, False),
}
EDGE = "edge"
HEAD_DIM = 128
VOCAB = 151936


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: `micro` sequences of `length` tokens on each of `world` GPUs, `accumulation` times a step."""

    shape: str
    preset: str
    world: int
    micro: int
    accumulation: int = 1
    length: int
    recompute: bool
    loss: Literal["trl", "plain"] = "trl"
    case: str = ""

    @property
    def name(self) -> str:
        """Unique, and all that `held_out` looks at."""
        recompute = "rc" if self.recompute else "no"
        batch = f"{self.micro}x{self.accumulation}"
        return f"{self.shape}-{self.preset}-w{self.world}-b{batch}-s{self.length}-{recompute}-{self.loss}"

    @property
    def tokens(self) -> int:
        """Tokens of all GPUs in one optimizer step."""
        return self.world * self.micro * self.accumulation * self.length

    @property
    def offloads(self) -> bool:
        return "offload" in self.preset


def held_out(name: str) -> bool:
    """Whether a cell is never used to fit a constant; a coin thrown by the name, not by us."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


def make(line: str) -> Iterator[Cell]:
    """`case shape world length | preset batch recompute [plain]; …` → cells."""
    head, _, rest = line.partition("|")
    case, shape, world, length = head.split()
    for item in rest.split(";"):
        preset, batch, recompute, *loss = item.split()
        micro, _, accumulation = batch.partition("x")
        yield Cell(
            shape=shape,
            preset=preset,
            world=int(world),
            micro=int(micro),
            accumulation=int(accumulation or 1),
            length=int(length),
            recompute=recompute == "rc",
            loss="plain" if loss else "trl",
            case="" if case in ("-", EDGE) else case,
        )


# `edge` cells are within 8 % of the end of memory.
NEXT = """
A 1.7b 1 2048  | zero3 4 no; zero1 2x2 no
G 8b 2 4096    | zero1 1x2 no; zero2 1x2 no
J 1.7b 4 8192  | zero1 1x2 no
E 8b 4 4096    | zero1 2 no; zero1 1x2 no
edge 32b 4 2048 | zero3 1 rc; zero3 2 rc; qlora_zero2 2 no; zero3+lora 2 no
edge 14b 2 4096 | zero3+lora 2 no; lora_zero2 2 no; zero3 2 rc; zero3 4 rc
edge 8b 2 8192 | zero3 1 no; zero2 1 no; zero1 1 no
- 4b 2 4096    | zero2_offload 2 rc; zero3_offload 2 rc; zero1 2 no; ddp 2 no
edge 14b 4 2048 | zero2 2 no; lora_zero2 4 no
- 8b 4 1024    | zero3+lora 8 rc; qlora_zero2 8 no
edge 8b 1 4096 | zero3 2 rc; zero3 4 rc; none 2 rc
edge 14b 1 4096 | lora 2 no; lora_zero2 2 no
edge 1.7b 1 4096 | zero2 8 no; none 8 no; zero3 8 no; zero1 8 no
edge 32b 1 2048 | qlora_zero2 2 no; qlora 2 no
edge 0.6b 1 8192 | zero2 8 no; qlora 8 no
"""
# Measured on 2026-11-27, results/4xH200-2.
SECOND = """
A 1.7b 1 2048  | none 4 no; zero2 4 no; zero1 4 no
B 4b 1 4096    | none 1x2 no; none 2 no; zero2 2 no; zero2 1x2 no
C 8b 1 4096    | lora_zero2 2x2 no; lora 2x2 no; lora 4 rc
I 14b 1 4096   | lora_zero2 1x2 no; lora 1x2 no; qlora 2 no; qlora 1x2 no
G 8b 2 4096    | zero1 2 no; zero2 2 rc; zero3 2 rc; zero2 1x2 rc
N 1.7b 2 1024  | ddp 8 no; zero2 8 no; zero1 8 no; zero3 8 no
P 14b 2 4096   | qlora 2 no; qlora_zero2 2 no; qlora_zero2 1x2 no; qlora_zero2 2 rc
H 4b 2 8192    | zero2 1 no; ddp 1 no
L 4b 4 16384   | zero2 1 no; zero3 1 no; zero2 1 rc
M 8b 4 4096    | lora_zero2 2 no; lora 2 no; zero3+lora 2 no; lora_zero2 2 rc
J 1.7b 4 8192  | zero2 2 no; zero1 2 no; zero2 1x2 no; zero3 2 no
"""
# One GPU first: four of them run at a time.  Cases A to K each do the same work in several ways.
FIRST = """
A 1.7b 1 2048 | zero2 4 rc; zero2 4 no; zero2 2x2 no; zero1 4 no
B 4b 1 4096   | zero2 2 rc; zero2 2 no; zero2 1x2 no; zero3 2 rc
C 8b 1 4096   | lora 2x2 no; lora 4 rc; lora_zero2 4 rc; lora 1x4 no
D 8b 1 2048   | qlora 4 rc; qlora 4 no; qlora 8 rc plain; qlora_zero2 4 no
- 8b 1 4096   | lora 4 no; zero2 1 rc; lora 2 rc plain; qlora 2 no
- 0.6b 1 1024 | zero2 8 no; none 8 no; zero2 8 no plain; ddp 4 rc
- 1.7b 1 16384| zero2 1 rc; zero2 1 no; lora 1 rc; lora 2 no
E 8b 4 4096   | zero2 2 rc; zero2 2 no; zero3 2 no; zero2 1x2 no; zero3 2 rc
F 14b 4 4096  | zero3 1 no; zero2 2 rc; zero3 2 rc; zero2 1x2 rc; zero2 1x2 no
G 8b 2 4096   | zero2 2 rc; zero3 2 rc; zero2 1x2 rc; zero3 1x2 no
H 4b 2 8192   | zero2 1 no; zero2 1 rc; zero3 1 no; zero3 1 rc
I 14b 1 4096  | lora 2 rc; qlora 2 rc; lora 1x2 no; qlora 1x2 no
- 4b 1 4096   | zero2 4 rc; zero2 4 rc plain; none 1 rc; lora 4 no plain
- 32b 1 2048  | qlora 2 rc; lora 2 rc; qlora 2 no; qlora_zero2 1 no
- 1.7b 1 4096 | zero2_offload 4 rc; zero3_offload 4 rc; zero2 2 rc plain; zero3 2 no
- 4b 4 16384  | zero2 1 rc; zero3 1 no; zero2_lowmem 1 rc
- 14b 2 4096  | zero2 1 rc; zero3 1 rc; lora 2 no; qlora 2 rc
- 32b 4 2048  | zero3 1 rc; lora 2 rc; qlora_zero2 2 rc; zero3 2 no plain
J 1.7b 4 8192 | zero2 2 no; zero2 2 rc; ddp 1x2 no; zero1 2 no; zero2 1x2 no
K 1.7b 2 1024 | zero2 8 no; zero2 8 rc; zero3 8 no; zero1 8 no
- 8b 1 2048   | zero3_offload 4 rc; zero2_offload 4 rc; lora 4 no plain; zero2_lowmem 2 rc
- 4b 2 2048   | lora_zero2 4 no; zero1 2 rc plain; zero2_offload 4 rc; zero3_offload_optimizer 4 rc
- 8b 4 1024   | zero3 8 rc plain; zero2 8 rc; lora 8 no; zero3+lora 8 rc
- 14b 4 8192  | zero3 1 rc; zero2 1 no
- 8b 1 16384  | qlora 1 rc; lora 1 rc; qlora 1 no plain; lora 1 no
- 32b 4 4096  | zero3+lora 2 rc; zero3_offload_optimizer 1 rc
- 14b 4 4096  | zero3_offload 2 rc
"""


def cells() -> tuple[Cell, ...]:
    """All of them, most informative first; each once."""
    lines = (line for grid in (NEXT, SECOND, FIRST) for line in grid.strip().splitlines())
    every: dict[str, Cell] = {}
    for line in lines:
        for cell in make(line):
            every.setdefault(cell.name, cell)
    return tuple(every.values())


def dry_cells() -> tuple[Cell, ...]:
    """A few on a tiny shape, for trying the measurement on a CPU."""
    lines = """
    A tiny 1 64 | zero2 2 rc; lora 1x2 no; none 2 no plain; qlora 2 rc
    - tiny 2 64 | zero3 2 no; ddp 1 rc plain; zero3+lora 1 rc
    - tiny 1 64 | zero2_offload 1 rc plain; qlora_zero2 1 rc plain
    """
    return tuple(cell for line in lines.strip().splitlines() for cell in make(line))


def main() -> None:
    """What is to be measured: each cell, whether it is held out, the peak predicted and its share of what is usable."""
    from report import CARD_BYTES, setup_of

    from hf_dsvllm.planner.footprint import gpu_footprint
    from hf_dsvllm.planner.search import usable_bytes

    for cell in cells():
        setup = setup_of(cell)
        peak, usable = gpu_footprint(setup).peak, usable_bytes(CARD_BYTES, setup)
        part = "held out" if held_out(cell.name) else "fit"
        print(f"{cell.case or '-':2} {cell.name:45} {part:9} {peak / 2**30:6.1f} GiB {100 * peak / usable:5.0f} %")


if __name__ == "__main__":
    main()
