"""Speed features of a training run: what each does, whether it is on by default, and `--ds_speed`, which decides.

A feature is on by default only once its gain was measured alone (docs/performance.md).  None of them changes what is
learnt: `exact` ones give the same numbers up to the order of additions, the others differ by rounding in bf16.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from hf_dsvllm.errors import Problem

__all__ = ["FEATURES", "Feature", "choose", "feature_problems"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One thing that makes steps faster; `why` says how, with its measurement where there is one."""

    name: str
    why: str
    default: bool
    exact: bool


FEATURES = (
    Feature(
        name="keep_activations",
        why="no recompute where the planner says that activations fit: 39.2 instead of 28.0 % of the matmul rate "
        "(8B full, ZeRO-3, 4 H200), 9,032 instead of 6,830 tokens/s (8B LoRA, 1 H200)",
        default=True,
        exact=True,
    ),
    Feature(
        name="split_batch",
        why="where activations do not fit without recompute: a smaller micro-batch, accumulated to the same batch, if "
        "the planner predicts that it is faster; not where --gradient_accumulation_steps is given",
        default=False,
        exact=False,  # gradients of micro-batches are added up in bf16 under ZeRO-1 and ZeRO-3
    ),
    Feature(
        name="cudnn",
        why="cuDNN's attention before PyTorch's own flash kernel: 584 against 304 TFLOP/s forward on an H200, 10,095 "
        "against 9,902 tokens/s of 8B LoRA; it plans anew for every shape, so only where all sequences have one length",
        default=False,
        exact=False,
    ),
    Feature(
        name="unmasked",
        why="batches padded on the right need no padding mask under causal attention, so the fast kernels take them",
        default=False,
        exact=True,
    ),
    Feature(
        name="varlen",
        why="packed sequences through PyTorch's attention for sequences of several lengths, without a mask of "
        "tokens x tokens",
        default=False,
        exact=True,
    ),
    Feature(
        name="padding_free",
        why="the sequences of a micro-batch end to end, nothing padded; implies varlen",
        default=False,
        exact=True,
    ),
    Feature(
        name="lean_adapters",
        why="fp32 adapters under bf16 autocast: the input of a layer is not copied to fp32 and back",
        default=False,
        exact=True,
    ),
    Feature(
        name="bf16_adapters",
        why="LoRA without DeepSpeed: adapters and their Adam in bf16, not fp32: 9,902 instead of 9,032 tokens/s (8B); "
        "the only feature that changes the precision of what is trained",
        default=False,
        exact=False,
    ),
    Feature(
        name="fused_adapters",
        why="an adapted layer as one operation: its low-rank products are added to what is there, 3 passes over its "
        "output forward instead of 7; LoRA on frozen linear layers, 4-bit ones too, not under ZeRO-3",
        default=False,
        exact=False,
    ),
    Feature(
        name="fused",
        why="norms, rotation and gated activation as one kernel each (liger-kernel), which also keep less for backward",
        default=False,
        exact=False,
    ),
)
NAMES = tuple(feature.name for feature in FEATURES)
ALL, NONE, WITHOUT = "all", "none", "no_"


def choose(words: Sequence[str] | None) -> frozenset[str]:
    """The features in force: the defaults, changed by the words of `--ds_speed` from left to right.

    `NAME` adds one, `no_NAME` leaves one out, `all` and `none` start from everything and from nothing.
    """
    chosen = {feature.name for feature in FEATURES if feature.default}
    for word in words or ():
        if word in (ALL, NONE):
            chosen = set(NAMES) if word == ALL else set()
        elif word in NAMES:
            chosen.add(word)
        else:
            chosen.discard(word.removeprefix(WITHOUT))
    if "padding_free" in chosen:
        chosen.add("varlen")
    return frozenset(chosen)


def feature_problems(words: Sequence[str] | None) -> list[Problem]:
    """Words of `--ds_speed` that name nothing."""
    known = {ALL, NONE, *NAMES, *(WITHOUT + name for name in NAMES)}
    problems = []
    for word in words or ():
        if word not in known:
            near = difflib.get_close_matches(word, known, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            problems.append(
                Problem(f"--ds_speed {word} is no speed feature", f"{hint}one of {', '.join(NAMES)}, or no_NAME")
            )
    return problems
