"""Signs in bits, and the bound of the variance that 1-bit optimizers divide by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_dsvllm.onebit import FLOOR, bound_variance, pack_signs, supply_packer, unpack_signs


def test_signs_survive_packing() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, float("inf"), -float("inf"), *([-2.0] * 7), 3.0])
    packed = pack_signs(values)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0b11101010, 0b00000001]
    assert unpack_signs(packed).tolist() == [1, 1, 1, -1, 1, -1, 1, -1, *([-1] * 7), 1]
    many = torch.randn(8 * 1001, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_signs(pack_signs(many)), torch.where(many >= 0, 1.0, -1.0))


def test_deepspeeds_own_operation_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import op_builder

    class Compiled:
        """As DeepSpeed has it on XPUs."""

    monkeypatch.setattr(op_builder, "PackbitsBuilder", Compiled, raising=False)
    monkeypatch.setattr(get_accelerator(), "get_op_builder", lambda name: Compiled, raising=False)
    supply_packer()
    assert op_builder.PackbitsBuilder is Compiled
    monkeypatch.setattr(get_accelerator(), "get_op_builder", lambda name: None)  # CUDA
    supply_packer()
    packer = op_builder.PackbitsBuilder().load()
    assert packer.unpackbits(packer.packbits(torch.ones(8), 8, 0), 1, 0).tolist() == [1.0] * 8


class OneBit(torch.optim.Optimizer):
    """The names that DeepSpeed's optimizers use, and the variances at each step."""

    adam_freeze_key = False

    def __init__(self, variance: list[float], **more: Any) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(len(variance)))
        super().__init__([self.weight], {})
        self.state[self.weight] = {"exp_avg_sq": torch.tensor(variance), **more}
        self.seen: list[list[float]] = []

    def step(self) -> None:  # type: ignore[override]
        self.seen.append(self.state[self.weight]["exp_avg_sq"].tolist())


def test_variances_are_bounded_once_before_the_first_step_with_signs() -> None:
    variance = [0.0, 1e-12, 4.0, 8.0]
    optimizer = OneBit(variance, exp_avg_sq_fresh=torch.zeros(4))
    bound_variance(optimizer)
    optimizer.step()
    assert optimizer.seen[-1] == pytest.approx(variance, rel=1e-6, abs=0)
    optimizer.adam_freeze_key = True
    optimizer.step()
    floor = 3.0 * FLOOR
    assert optimizer.seen[-1] == pytest.approx([floor, floor, 4.0, 8.0])
    assert optimizer.state[optimizer.weight]["exp_avg_sq_fresh"].tolist() == pytest.approx([floor] * 4)
    optimizer.state[optimizer.weight]["exp_avg_sq"].zero_()
    optimizer.step()
    assert optimizer.seen[-1] == [0.0] * 4  # once


def test_zero_one_adam_is_bounded_as_soon_as_a_step_does_without_the_exact_gradient() -> None:
    optimizer = OneBit([0.0, 1.0], var_interval=1)
    bound_variance(optimizer)
    optimizer.step()
    assert optimizer.seen[-1] == [0.0, 1.0]
    optimizer.state[optimizer.weight]["var_interval"] = 2
    optimizer.step()
    assert optimizer.seen[-1] == pytest.approx([0.5 * FLOOR, 1.0])
