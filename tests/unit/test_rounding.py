"""AdamW on bf16 weights learns what it learns on fp32 ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_dsvllm import rounding

GROUP: dict[str, Any] = {"betas": (0.9, 0.999), "lr": 1e-5, "weight_decay": 0.01, "eps": 1e-8}


def test_the_mean_of_what_is_rounded_is_what_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.02, -0.02003, 1.0, -3.1415927, 1e-30, 0.0]).repeat(100_000, 1)
    rounded = rounding.round_stochastically(exact, torch.empty_like(exact, dtype=torch.bfloat16), generator)
    near = exact.abs() * 2**-7
    assert ((rounded.float() - exact).abs() <= near).all()
    assert rounded.float().mean(dim=0) == pytest.approx(exact[0].tolist(), rel=2e-5)
    assert len(rounded[:, 1].unique()) == 2
    assert len(rounded[:, 2].unique()) == 1, "what bf16 holds stays"


def test_what_is_not_finite_stays_so() -> None:
    exact = torch.tensor([float("inf"), float("-inf"), float("nan")])
    rounded = rounding.round_stochastically(exact, torch.empty(3, dtype=torch.bfloat16))
    assert rounded[:2].tolist() == [float("inf"), float("-inf")]
    assert rounded[2].isnan()


@pytest.mark.parametrize("piece", [1 << 23, 1000])
def test_updates_below_a_step_of_bf16_are_learnt(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    start = torch.full((10_007,), 0.02).bfloat16()
    kinds = (torch.bfloat16, torch.bfloat16, torch.float32)
    stepped, usual, wide = (torch.nn.Parameter(start.to(kind, copy=True)) for kind in kinds)
    plain, exact = (torch.optim.AdamW([each], **GROUP) for each in (usual, wide))
    state: dict[str, Any] = {}
    for number in range(60):
        gradient = torch.randn(start.shape, generator=generator) * (1e-3 if number < 30 else 1e-4) + 5e-4
        for each in (stepped, usual, wide):
            each.grad = gradient.to(each.dtype)
        rounding.step(stepped, state, GROUP, generator)
        plain.step()
        exact.step()
    moved, expected = (stepped.float() - start.float()).mean().item(), (wide - start.float()).mean().item()
    assert moved == pytest.approx(expected, rel=0.05)
    assert usual.equal(start), "AdamW on bf16 weights moves nothing"
    assert int(state["step"]) == 60
    for name in rounding.STATES:
        assert state[name].float().mean().item() == pytest.approx(exact.state[wide][name].mean().item(), rel=0.03)


def test_a_step_draws_its_own_numbers_whatever_came_before() -> None:
    found = []
    for steps in ((0, 1), (1,)):
        weights = torch.nn.Parameter(torch.full((4096,), 0.02).bfloat16())
        optimizer = torch.optim.AdamW([weights], **GROUP)
        chosen = rounding._Step(optimizer, seed=7, rank=1)
        for number in steps:
            with torch.no_grad():
                weights.fill_(0.02)
            optimizer.state[weights] = {
                "step": torch.tensor(float(number)),
                **{name: torch.full_like(weights, 1e-4) for name in rounding.STATES},
            }
            weights.grad = torch.full_like(weights, 1e-3)
            chosen()
        found.append(weights.detach().clone())
    assert found[0].equal(found[1])
