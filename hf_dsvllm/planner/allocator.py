"""What PyTorch's caching allocator and CUDA take beyond the tensors; arithmetic only.

The allocator keeps freed blocks and splits large ones: a gradient buffer whose block was split for activations in the
next forward pass is made anew.  The rules below follow from that; their shares were read off cells of
benchmarks/planner that are not held out.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_dsvllm.planner.footprint import Footprint, Setup

__all__ = ["cannot_give_back", "held_bytes", "outside_bytes", "reserved_bytes"]

GIB = 2**30
# H200, driver 580: the driver keeps 0.6 GiB of what NVML reports; context and cuBLAS take 0.75 GiB, NCCL 1.3 more.
OUTSIDE_ALONE = int(1.35 * GIB)
OUTSIDE_GROUP = int(2.65 * GIB)
ADAPTER_SHARE = 1.02
LOGITS_SHARE = 0.3  # of the plain loss's logits: blocks of a gigabyte and more fit nothing else
REPLICA_SHARE = 0.3  # of the gradients, where nothing is sharded
OFFLOAD_BYTES = 3 * GIB
STATES = ("weights", "optimizer", "offload buffer", "DDP buckets")


def outside_bytes(setup: Setup) -> int:
    """Bytes of a card that the allocator never gets; DeepSpeed and several processes have an NCCL communicator."""
    return OUTSIDE_GROUP if setup.world > 1 or setup.preset.uses_deepspeed else OUTSIDE_ALONE


def reserved_bytes(setup: Setup, found: Footprint, card_bytes: int | None = None) -> int:
    """Peak of the memory the allocator holds: `held_bytes`, but no more than the card has.

    Where the card ends the allocator gives cached blocks back before it fails (c10/cuda/CUDACachingAllocator.cpp,
    release_cached_blocks), so that what it would like to hold is no reason to run out of memory.
    """
    held = held_bytes(setup, found)
    return held if card_bytes is None else min(held, max(found.peak, card_bytes - outside_bytes(setup)))


def held_bytes(setup: Setup, found: Footprint) -> int:
    """What the allocator holds if it never has to give anything back.

    Adapters: little more than the tensors.  ZeRO-2: states + the larger of transients and gradients or twice the
    gradients (a split buffer beside its successor) + the optimizer's own blocks.  ZeRO-3: states + transients + the
    optimizer's blocks, which are larger than any that activations leave, + the gathered window once more.
    """
    parts, preset = found.parts, setup.preset
    logits = LOGITS_SHARE * parts["forward"].get("logits", 0) if setup.loss == "plain" else 0.0
    if setup.method != "full":
        return int(ADAPTER_SHARE * found.peak + logits)
    gradients = parts["optimizer"].get("gradients", 0)
    if preset.zero_stage in (None, 0):
        return int(found.peak + REPLICA_SHARE * gradients + logits)
    if preset.offload_optimizer != "none":
        return int(found.peak + OFFLOAD_BYTES + logits)
    step = parts["optimizer"].get("optimizer step", 0)
    if preset.zero_stage == 3:
        kept = (*STATES, "gradients", "buckets")
        states = sum(parts["optimizer"].get(name, 0) for name in kept)
        return int(states + transients(parts, kept) + step + parts["backward"].get("gathered", 0) + logits)
    states = sum(parts["optimizer"].get(name, 0) for name in STATES)
    passing = transients(parts, (*STATES, "gradients"))
    if preset.zero_stage == 1:
        return int(max(found.peak, states + passing + max(gradients, step)) + logits)
    return int(states + step + max(passing + gradients, 2 * gradients) + logits)


def cannot_give_back(setup: Setup) -> bool:
    """Whether a card must have all of `held_bytes`: under ZeRO-2 gradients lie in blocks that activations have left.

    Then these cannot be given back when the optimizer wants its copy of a share of the gradients in one piece.  14B,
    SGD, three H100s: 64.2 GiB held, 49.8 of them tensors, and no room for 18.3 more (docs/lab-notes.md, 2026-11-28).
    """
    preset = setup.preset
    return setup.method == "full" and preset.zero_stage == 2 and preset.offload_optimizer == "none"


def transients(parts: Mapping[str, Mapping[str, int]], kept: tuple[str, ...]) -> int:
    """The most that forward and backward hold beside what is kept."""
    return max(sum(v for name, v in parts[phase].items() if name not in kept) for phase in ("forward", "backward"))
