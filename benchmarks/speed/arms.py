"""The grid of `train_speed.py`: what is run beside what.

Arms of one case do the same work: model, method, cards, length.  Order matters: a measurement may be cut off at any
moment, so what tells most comes first.  An arm is `plain` (TRL's defaults and a DeepSpeed file written by hand, or
nothing) or one of our presets; the words after it change one thing each, so that every gain is measured alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from hf_dsvllm.features import FEATURES, choose

__all__ = ["PLAIN", "Arm", "arms", "dry_arms", "parse"]

ARM_WORDS = """
word            what it changes
rc, sel, no     recompute all activations (TRL's default), all but attention (TRL's selective), none
bMxA            M sequences in a micro-batch, A micro-batches in a step
+FEATURE, -FEATURE   a speed feature of `--ds_speed` on or off; +all, -all
pack, group     TRL's packing (bfd); batches of similar lengths (transformers' group_by_length)
compile         --torch_compile
segments        PYTORCH_ALLOC_CONF=expandable_segments:True
KEY=VALUE       a key of the DeepSpeed configuration, dotted
sN              sequences of N tokens
"""
OFFLOAD_S = 240.0
Z = {"overlap_comm": True, "contiguous_gradients": True}
PLAIN: dict[str, dict[str, Any] | None] = {  # as DeepSpeed's and transformers' documentation write them
    "lora": None,
    "qlora": None,
    "z2": {"stage": 2, **Z, "reduce_bucket_size": 2e8, "allgather_bucket_size": 2e8},
    "z3": {
        "stage": 3,
        **Z,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
CPU = {"device": "cpu", "pin_memory": True}
PLAIN["qlora_z2"] = PLAIN["z2"]
PLAIN["z2o"] = {**(PLAIN["z2"] or {}), "offload_optimizer": CPU}
PLAIN["z3o"] = {**(PLAIN["z3"] or {}), "offload_optimizer": CPU, "offload_param": CPU}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run; `words` are the changes as written, `ladder` names a search for the longest sequence."""

    case: str
    kind: Literal["plain", "preset"]
    preset: str
    words: tuple[str, ...] = ()
    shape: str
    world: int
    length: int
    micro: int
    accumulation: int = 1
    recompute: Literal["full", "selective", "none"] = "full"
    features: tuple[str, ...] = ()
    mix: bool = False
    ladder: bool = False
    batching: Literal["padded", "packed", "grouped"] = "padded"
    compile: bool = False
    segments: bool = False
    deepspeed: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Unique within the grid; results are kept under it."""
        words = "_".join(word.replace("=", "-").replace("+", "with-") for word in self.words)
        batch = f"b{self.micro}x{self.accumulation}-s{self.length}"
        return "-".join(filter(None, (self.case, self.kind, self.preset, f"w{self.world}", batch, words)))

    @property
    def title(self) -> str:
        return " ".join((f"plain TRL {self.preset}" if self.kind == "plain" else self.preset, *self.words))

    @property
    def adapter(self) -> str | None:
        return next((kind for kind in ("qlora", "lora") if kind in self.preset), None)

    @property
    def tokens(self) -> int:
        """Tokens of all GPUs in one optimizer step, padding included where there is some; at most."""
        replicas = 1 if self.preset == "long_context" else self.world
        return replicas * self.micro * self.accumulation * self.length

    @property
    def offloads(self) -> bool:
        return "offload" in self.preset or "nvme" in self.preset or self.preset in ("z2o", "z3o")

    def limit_s(self, wanted: float) -> float:
        """Seconds an arm may take: what offloads fills host memory first, page by page."""
        return max(wanted, OFFLOAD_S) if self.offloads else wanted

    def steps(self, wanted: int) -> int:
        """Steps to run: long ones need no more than two after the warm-up.

        One tells whether a length fits, or the second, if Adam's moments, made in the first, are then on the GPU.
        """
        if self.ladder:
            return 1 if self.adapter or self.offloads else 2
        return min(wanted, 4) if self.accumulation >= 8 else wanted

    @property
    def rung(self) -> tuple[str, str, str, tuple[str, ...]]:
        """Arms of a ladder that differ in length alone."""
        return self.case, self.kind, self.preset, tuple(w for w in self.words if not w[1:].isdigit())


def parse(line: str) -> Iterator[Arm]:
    """`CASE SHAPE WORLD LENGTH BATCH [mix] [ladder] | ARM; …` → arms; a preset starts from the default features."""
    head, _, rest = line.partition("|")
    case, shape, world, length, batch, *marks = head.split()
    for item in rest.split(";"):
        preset, *words = item.split()
        kind: Literal["plain", "preset"] = "plain" if preset.startswith("plain:") else "preset"
        arm = Arm(
            case=case,
            kind=kind,
            preset=preset.removeprefix("plain:"),
            shape=shape,
            world=int(world),
            length=int(length),
            micro=1,
            mix="mix" in marks,
            ladder="ladder" in marks,
            words=tuple(words),
            features=() if kind == "plain" else features_of(preset),
        )
        for word in (batch, *words):
            arm = changed(arm, word)
        yield arm


def features_of(preset: str) -> tuple[str, ...]:
    """The features that a run with this preset has by default, in order."""
    named_alone = {"whole_layers"} if preset in ("zero3_offload", "zero3_nvme") else set()
    return tuple(feature.name for feature in FEATURES if feature.name in choose(None) - named_alone)


def changed(arm: Arm, word: str) -> Arm:
    """`arm` with what one word changes; ValueError for a word that is none of `ARM_WORDS`."""
    recompute = {"rc": "full", "sel": "selective", "no": "none"}
    names = {feature.name for feature in FEATURES}
    if word in recompute:
        return dataclasses.replace(arm, recompute=recompute[word])
    if word[0] in "+-":
        chosen, wanted = set(arm.features), names if word[1:] == "all" else {word[1:]}
        if not wanted <= names:
            raise ValueError(f"{word!r} names no speed feature; {sorted(names)}")
        return dataclasses.replace(arm, features=tuple(sorted(chosen | wanted if word[0] == "+" else chosen - wanted)))
    if word in ("pack", "group"):
        return dataclasses.replace(arm, batching="packed" if word == "pack" else "grouped")
    if word in ("compile", "segments"):
        return dataclasses.replace(arm, **{word: True})
    if "=" in word:
        key, _, value = word.partition("=")
        known = {"true": True, "false": False}
        number = known.get(value, float(value) if value.replace(".", "").replace("e", "").isdigit() else value)
        if isinstance(number, float) and number.is_integer() and "." not in value:
            number = int(number)
        return dataclasses.replace(arm, deepspeed=(*arm.deepspeed, (key, number)))
    if word[0] == "b" and word[1:].replace("x", "").isdigit():
        micro, _, accumulation = word[1:].partition("x")
        return dataclasses.replace(arm, micro=int(micro), accumulation=int(accumulation or 1))
    if word[0] == "s" and word[1:].isdigit():
        return dataclasses.replace(arm, length=int(word[1:]))
    raise ValueError(f"{word!r} changes nothing known:{ARM_WORDS}")


# A preset starts from the default features; `-all` first leaves them out, so that one can be measured alone.  First
# what is to be shown: full fine-tunes, offload and scaling on 4 and 2 GPUs, then one GPU; after them other settings.
FIRST = """
scale8 8b 4 4096 b2      | zero3 rc; zero2 rc; zero3 rc -whole_layers
full8 8b 4 4096 b2       | plain:z3; zero2 b2x8 no; zero2 b3x4 no; zero3 b2x4 no; zero2 no; zero3 no
off14 14b 4 4096 b2x4    | zero2_offload no +gpu_gradients; zero3 no; plain:z3o; zero2_offload b2x8 no +gpu_gradients; plain:z3o b2x8; zero3 b2x8 no; zero2_offload no +gpu_gradients -overlap_offload; zero3_offload_optimizer no +gpu_gradients; zero2_offload b3x8 no +gpu_gradients
scale 4b 4 4096 b2       | zero2 no; zero3 no; zero3 no -whole_layers
full14 14b 4 4096 b2     | zero3 b2x4 no; zero2 b1x8 no; plain:z3
scale 4b 2 4096 b2       | zero2 no; zero3 no; zero3 no -whole_layers; zero3 no zero_optimization.stage3_max_reuse_distance=1e10 zero_optimization.stage3_max_live_parameters=1e10; zero3 no zero_optimization.reduce_bucket_size=6553600
scale8 8b 2 4096 b2      | zero2 rc; zero3 rc; zero3 rc -whole_layers; zero3 rc zero_optimization.stage3_max_reuse_distance=1e9 zero_optimization.stage3_max_live_parameters=1e9
off8 8b 2 4096 b2x8      | zero2_offload b4x4 no +gpu_gradients; zero2_offload b4x4 no +gpu_gradients -overlap_offload; zero3_offload_optimizer b4x4 no +gpu_gradients; zero2 no; zero2_offload b4x8 no +gpu_gradients; zero2_offload b4x8 no; zero3_offload_optimizer b4x8 no +gpu_gradients; plain:z3o b4x8
scale 4b 1 4096 b2       | zero2 no; zero3 no; zero3 no -whole_layers
scale8 8b 1 4096 b2      | zero3 rc; zero3 rc -whole_layers
full4 4b 1 4096 b2       | plain:z2; zero2 b4x4 no; zero2 b2x8 no; zero2 no -all; zero2 no -all +fused
lora8 8b 1 4096 b4       | plain:lora; lora no; lora b2x2 no; lora b2x2 no -all; lora b2x2 no -all +fused; lora b2x2 no -all +fused_adapters; lora b2x2 no -all +lean_adapters
mix8 8b 1 4096 b8 mix    | plain:lora; lora no; lora rc -all +padding_free; lora rc -all +unmasked
mix4 4b 1 4096 b8 mix    | plain:z2; zero2 b4x2 no
qlora8 8b 1 4096 b4      | plain:qlora; qlora no; lora rc; qlora rc; lora sel; qlora sel
lora14 14b 1 4096 b2     | plain:lora; lora no
lora32 32b 1 4096 b1     | plain:lora; lora rc
"""  # noqa: E501 - a table

LATER = """
lora8 8b 1 4096 b4       | lora rc -all; lora b2x2 no -all +cudnn; lora no +bf16_adapters; lora b1x4 no; lora_zero2 b2x2 no; lora b2x2 no segments; lora b2x2 no compile; lora sel
full4 4b 1 4096 b2       | zero2 rc -all; zero2 no -all +cudnn; zero2 b3 no; zero2 b4 sel; zero2 no compile; none no
mix8 8b 1 4096 b8 mix    | lora rc group -all +unmasked; lora rc pack -all; lora rc pack -all +varlen; lora b2 no pack
qlora8 8b 1 4096 b4      | qlora no -all
mix4 4b 1 4096 b8 mix    | zero2 rc group -all +unmasked; zero2 rc pack; zero2 b3 no pack
lora14 14b 1 4096 b2     | lora b1x2 no; lora b4 sel
lora32 32b 1 4096 b1     | lora sel; lora no s2048
full8x2 8b 2 4096 b2     | plain:z2; plain:z3; zero2 b1x2 no -all; zero2 b1x2 no; zero2 no; zero3 no -all; zero3 no; zero3 no -whole_layers; zero3 sel; zero2 b4 sel; zero2 b1x2 no zero_optimization.reduce_bucket_size=500000000; zero3 no zero_optimization.stage3_prefetch_bucket_size=500000000
full8 8b 4 4096 b2       | plain:z2; zero2 no -all; zero2 b2x4 no; zero2 b3 no; zero2 no zero_optimization.reduce_bucket_size=500000000; zero3 no zero_optimization.stage3_prefetch_bucket_size=500000000; zero2 b4 sel; zero2 no zero_optimization.round_robin_gradients=true; zero2 no compile
full14 14b 4 4096 b2     | zero3 b1x2 no -all; zero3 b1x2 no; zero3 sel; zero2 b1x2 no
lora8z3 8b 2 4096 b2     | zero3+lora rc; zero3+lora rc -whole_layers; zero3+lora no; lora_zero2 no
off8z3 8b 2 4096 b2      | zero3_offload rc +whole_layers; zero3_offload rc; plain:z3o
off8 8b 2 4096 b2x8      | zero3_offload_optimizer b4x4 no +gpu_gradients -overlap_offload; plain:z3o; plain:z3o b2x16; zero2_offload b4x4 no; zero2_offload b4x4 sel; plain:z2o; zero3 b1x16 no; zero3_offload_optimizer no; zero3_offload_optimizer no zero_optimization.offload_optimizer.super_offload=true
off14 14b 4 4096 b2x4    | zero3_offload_optimizer b1x8 no +gpu_gradients; plain:z3o b1x8; zero2_offload b4x2 sel +gpu_gradients
off4 4b 1 4096 b4x8      | zero2 no; zero2_offload no; zero2_offload no +gpu_gradients; plain:z3o b8x4
sp8 8b 2 65536 b1 ladder | long_context rc; long_context rc s131072
long8 8b 1 16384 b1 ladder | plain:lora s32768; lora rc s32768; plain:lora s65536; lora rc s65536; lora rc s131072; lora rc s262144; plain:lora s262144; plain:lora s131072
longf 8b 1 16384 b1 ladder | plain:z3o s32768; zero3_offload rc s32768; plain:z3o s65536; zero3_offload rc s65536; plain:z3o s131072; zero3_offload rc s131072; zero3_offload rc s196608; plain:z3o s196608; zero3_offload rc s262144; zero3_offload rc s262144 segments; plain:z3o s262144
long32 32b 1 8192 b1 ladder | plain:qlora s16384; qlora rc s16384; plain:qlora s32768; qlora rc s32768; plain:qlora s65536; qlora rc s65536; qlora rc s98304; plain:qlora s98304; qlora rc s114688; plain:qlora s114688
sp8x4 8b 4 131072 b1 ladder | long_context rc s524288; long_context rc; long_context rc s262144; long_context rc s786432
nvme 1.7b 1 4096 b2      | zero3_nvme rc; zero3_nvme rc zero_optimization.offload_param.buffer_size=311165952; zero3_offload rc; zero3_offload rc +whole_layers; zero3 rc
onebit 1.7b 2 4096 b2    | ddp no; onebit_adam no optimizer.params.freeze_step=3; onebit_lamb no optimizer.params.freeze_step=3; zero_one_adam no optimizer.params.var_freeze_step=3
"""  # noqa: E501 - a table
GRID = FIRST + LATER.lstrip()

DRY = """
one tiny 1 64 b2        | plain:lora; lora no -all; lora no; plain:z2; zero2 rc; zero2 sel; none no; qlora no
mix tiny 1 64 b4 mix    | plain:lora; lora no group -all +unmasked; lora no; lora b2 no pack
two tiny 2 64 b2        | plain:z3; zero2 no zero_optimization.reduce_bucket_size=1000000; zero3 rc; lora b1x2 no
twomix tiny 2 64 b4 mix | zero3 no; zero2 rc -all +unmasked
off tiny 1 64 b1x2      | plain:z3o; zero3_offload_optimizer no; zero2_offload no
long tiny 1 64 b1 ladder | lora rc s64; lora rc s128
"""


def arms(lines: str = GRID) -> tuple[Arm, ...]:
    """All arms of a grid, most informative first."""
    return tuple(arm for line in lines.strip().splitlines() for arm in parse(line))


def dry_arms() -> tuple[Arm, ...]:
    """A few on a tiny shape, for trying the measurement on a CPU."""
    return arms(DRY)


def shadowed(arm: Arm, results: dict[str, Any], every: Sequence[Arm]) -> bool:
    """Whether a shorter rung of the arm's ladder did not fit: the longer one need not be tried."""
    if not arm.ladder:
        return False
    shorter = [other for other in every if other.rung == arm.rung and other.length < arm.length]
    return any(results.get(other.name, {}).get("status") == "oom" for other in shorter)
