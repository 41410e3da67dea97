"""Speed features of a training run: what each does, whether it is on by default, and `--ds_speed`, which decides.

A feature is on by default only once its gain was measured alone (docs/performance.md).  None that is on changes what is
learnt: `exact` ones give the same numbers up to the order of additions, the others differ by rounding in bf16.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Sequence

from hf_dsvllm.errors import Problem

__all__ = [
    "FEATURES",
    "FUSED_ACTIVATIONS",
    "FUSED_TYPES",
    "LARGEST_LAYER",
    "LAYERS_AT_ONCE",
    "PIECE",
    "REDUCED_AT_ONCE",
    "SLOT",
    "SLOTS",
    "Feature",
    "asks_for",
    "choose",
    "feature_problems",
    "planned",
]


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
        "(8B full, ZeRO-3, 4 H200)",
        default=True,
        exact=True,
    ),
    Feature(
        name="split_batch",
        why="where activations do not fit without recompute: a smaller micro-batch, accumulated to the same batch, if "
        "the planner predicts that it is faster: 9,073 instead of 6,764 tokens/s (8B LoRA, 1 H200); by default only "
        "where gradients are added up in fp32, and not where --gradient_accumulation_steps is given",
        default=True,
        exact=True,
    ),
    Feature(
        name="fused",
        why="norms, rotation and gated activation as one kernel each (liger-kernel), which keep less for backward: "
        "11,503 instead of 9,073 tokens/s and 63.7 instead of 77.8 GiB (8B LoRA), 13,512 instead of 10,425 tokens/s "
        "(4B full)",
        default=True,
        exact=False,
    ),
    Feature(
        name="padding_free",
        why="the sequences of a micro-batch end to end, nothing padded: 5,620 instead of 1,512 tokens/s for chats (8B "
        "LoRA); implies varlen",
        default=True,
        exact=True,
    ),
    Feature(
        name="varlen",
        why="packed sequences through PyTorch's attention for sequences of several lengths, without a mask of "
        "tokens x tokens: 7,051 instead of 1,939 tokens/s",
        default=True,
        exact=True,
    ),
    Feature(
        name="unmasked",
        why="batches padded on the right need no padding mask under causal attention, so the fast kernels take them: "
        "2,245 instead of 1,512 tokens/s",
        default=True,
        exact=True,
    ),
    Feature(
        name="fused_adapters",
        why="an adapted layer as one operation: its low-rank products are added to what is there; LoRA on frozen "
        "linear layers, 4-bit ones too, not under ZeRO-3: 10,580 instead of 9,073 tokens/s (8B LoRA)",
        default=True,
        exact=False,
    ),
    Feature(
        name="lean_adapters",
        why="fp32 adapters under bf16 autocast: the input of a layer is not copied to fp32 and back: 10,039 instead of "
        "9,073 tokens/s and 68.6 instead of 77.8 GiB (8B LoRA)",
        default=True,
        exact=True,
    ),
    Feature(
        name="bf16_adapters",
        why="LoRA without DeepSpeed: adapters and their Adam in bf16, not fp32: 13,940 instead of 13,738 tokens/s "
        "(8B); this and fp32_adapters change the precision of what is trained",
        default=False,
        exact=False,
    ),
    Feature(
        name="fp32_adapters",
        why="QLoRA without DeepSpeed: adapters and their Adam in fp32, as those of LoRA are; TRL rounds them to bf16, "
        "and small updates with them: a loss of 0.662 instead of 0.681 after 200 steps, LoRA 0.649 "
        "(135M, mean of three seeds)",
        default=False,
        exact=False,
    ),
    Feature(
        name="gpu_gradients",
        why="an offloaded optimizer's gradients are added up on the GPU over a step's micro-batches and cross to the "
        "host once: 8,656 instead of 6,958 tokens/s (8B, 2 H200), 13,779 instead of 11,419 (4B, 1 H200); takes 2 bytes "
        "of GPU a parameter over the processes, so by default only where the planner says that it fits",
        default=False,
        exact=True,
    ),
    Feature(
        name="overlap_offload",
        why="an offloaded optimizer's gradients leave the GPU behind the backward pass, and its step takes the weights "
        "piece by piece, each on its way back while Adam works on the next: 8,116 instead of 7,224 tokens/s (8B, 2 "
        "H200, 131,072 tokens a step), 0.5 GiB more",
        default=True,
        exact=True,
    ),
    Feature(
        name="whole_layers",
        why="ZeRO-3: a layer's weights are gathered as one unit, the next layers' while one computes, and gradients "
        "reduced in fewer and larger pieces: 13,475 instead of 8,125 tokens/s (4B full, 2 H200), 6,707 instead of "
        "5,895 (8B, recomputed); not by default where weights lie in host memory, which was not measured",
        default=True,
        exact=True,
    ),
    Feature(
        name="cudnn",
        why="cuDNN's attention before PyTorch's own flash kernel, which torch 2.11 does by itself on an H200: no gain "
        "there; it plans anew for every shape, so only where all sequences have one length",
        default=False,
        exact=False,
    ),
)
NAMES = tuple(feature.name for feature in FEATURES)
ALL, NONE, WITHOUT = "all", "none", "no_"
# Of `whole_layers`: layers that may be gathered at a time, the one in use included; elements of the bucket of gradients
# (4B on two H200s: 0.598 s a step with it, 0.686 with hidden_size squared; as much as ZeRO-2's bucket of the presets)
LAYERS_AT_ONCE, REDUCED_AT_ONCE = 3, 200_000_000
LARGEST_LAYER = 1_000_000_000  # elements: DeepSpeed's default `stage3_max_live_parameters`
# Of `overlap_offload`, in elements of fp32: buffers on the GPU through which gradients leave it, and the weights that
# Adam steps at a time (two H200s, 8B: 1.93 s a step for 2.42 in one piece)
SLOTS, SLOT, PIECE = 8, 1 << 24, 1 << 23
# Whose kernels liger-kernel 0.8 has, and whose layers the planner's formulas describe; measured on Qwen3
FUSED_TYPES = frozenset(("llama", "mistral", "qwen2", "qwen3", "smollm3"))
FUSED_ACTIVATIONS = ("silu", "swish")  # two names of one function


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


def asks_for(words: Sequence[str] | None, feature: str) -> bool:
    """Whether the words of `--ds_speed` ask for a feature by its name, or for all."""
    return bool({ALL, feature} & set(words or ()))


def planned(words: Sequence[str] | None) -> frozenset[str]:
    """The features that a plan counts with: those in force, less `fused` where liger-kernel is not installed."""
    lacking = {"fused"} if importlib.util.find_spec("liger_kernel") is None else set()
    return choose(words) - lacking


def left_to_plan(words: Sequence[str] | None) -> frozenset[str]:
    """What a plan takes where it fits: `gpu_gradients`, unless the words of `--ds_speed` decide about it."""
    decided = {NONE, ALL, "gpu_gradients", WITHOUT + "gpu_gradients"} & set(words or ())
    return frozenset() if decided else frozenset({"gpu_gradients"})


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
