"""What stands in DeepSpeed's place where an offloaded optimizer's copies overlap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dsvllm import overlap_offload as overlap

CPU = torch.device("cpu")


def trainer(**zero: Any) -> Any:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    return SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({}, "no optimizer is offloaded"),
        ({"offload_optimizer": {"device": "nvme"}}, "no optimizer is offloaded"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "steps of their own"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "a part of the optimizer is on the GPU"),
        ({"offload_optimizer": {"device": "cpu", "ratio": None}}, "None"),
        ({"offload_optimizer": {"device": "cpu"}}, "None"),
    ],
)
def test_what_keeps_copies_from_overlapping_is_said(zero: dict[str, Any], said: str) -> None:
    assert said in str(overlap.why_not(trainer(**zero)))


def test_a_step_is_skipped_for_gradients_that_are_not_finite_whoever_noticed() -> None:
    names = ("_optimizer_step", "unscale_and_clip_grads", "independent_gradient_partition_epilogue")
    zero = SimpleNamespace(
        **dict.fromkeys(names),
        has_overflow=lambda: zero.local_overflow,
        param_buffer_of_bit16_for_cpu_offload_groups=[],
        norm_for_param_grads={1: torch.tensor(1.0)},
        local_overflow=False,
    )
    overlap._early_stages(zero, overlap._InPieces(None, CPU, 128), overlap._ToHost(CPU, 128))
    assert zero.has_overflow() is False
    zero.local_overflow = True  # as DeepSpeed's safe_set_full_grad reports
    assert zero.has_overflow() is True
    zero.local_overflow = False
    zero.norm_for_param_grads[2] = torch.tensor(float("inf"))
    assert zero.has_overflow() is True


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_pieces_are_clipped_stepped_and_sent_one_after_the_other(factor: float) -> None:
    steps = []

    def adam_update(number: int, weights: torch.Tensor, gradients: torch.Tensor, *moments: torch.Tensor) -> None:
        steps.append((number, weights.numel()))
        weights.sub_(gradients)

    pieces = overlap._InPieces(SimpleNamespace(adam_update=adam_update, destroy_adam="kept"), CPU, 128)
    weights, gradients = torch.linspace(1, 2, 300), torch.full((300,), 0.5)
    destination = torch.zeros(300, dtype=torch.bfloat16)
    pieces.destination = destination
    pieces.clip(torch.tensor(factor))
    expected = weights - factor * gradients
    pieces.adam_update(7, weights, gradients, torch.zeros(300), torch.zeros(300))
    assert steps == [(7, 128), (7, 128), (7, 44)]
    assert weights.equal(expected)
    assert destination.equal(expected.bfloat16())
    assert pieces.destroy_adam == "kept"


def test_weights_that_were_sent_are_not_copied_again() -> None:
    buffers = [torch.ones(4, dtype=torch.bfloat16)]
    overlap._replace_buffers(buffers)
    weights = torch.full((4,), 3.0)
    buffers[0].data.copy_(torch.zeros(4))
    weights.data.copy_(buffers[0].data, non_blocking=True)
    assert weights.tolist() == [3.0] * 4
