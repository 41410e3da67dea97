"""An offloaded optimizer whose gradients are added up on the GPU and cross to the host once a step.

DeepSpeed (0.19.8) keeps the sum of several micro-batches' gradients in host memory: each micro-batch fetches what is
there, adds on the GPU and sends it back (stage_1_and_2.py, async_accumulate_grad_in_cpu_via_gpu; stage3.py,
partition_grads).  By formula that is 3.4 of the 18.8 seconds of a step of 8B on two H200s with eight micro-batches.
Both places take a sum that lies on the GPU as well: only where it lies is changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from hf_dsvllm.outcome import zero_settings

__all__ = ["keep_gradients", "why_not"]

PIECES = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


def why_not(trainer: Any) -> str | None:
    """Why gradients are not kept on the GPU; None where they can be."""
    if (zero_settings(trainer).get("offload_optimizer") or {}).get("device") != "cpu":
        return "no optimizer is offloaded to the CPU"
    if trainer.args.gradient_accumulation_steps == 1:
        return "every micro-batch is a step"
    return None


def keep_gradients(trainer: Any) -> None:
    """Do so once the trainer's engine is there."""
    trainer.add_callback(_KeepGradients(trainer))


class _KeepGradients(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer.deepspeed
        place = _third_stage if engine.zero_optimization_stage() == 3 else _early_stages
        place(engine.optimizer, torch.device(engine.device))


class _Sums(dict[int, torch.Tensor]):
    """DeepSpeed's buffers by parameter, each made when it is first asked for, on the GPU."""

    def __init__(self, like: Mapping[int, torch.Tensor], device: torch.device) -> None:
        super().__init__()
        self._like, self._device = like, device

    def __contains__(self, key: object) -> bool:
        return key in self._like

    def __missing__(self, key: int) -> torch.Tensor:
        like = self._like[key]
        made = self[key] = torch.zeros(like.numel(), dtype=like.dtype, device=self._device)
        return made


def _early_stages(optimizer: Any, device: torch.device) -> None:
    """bf16 master weights are summed in the gradients of the optimizer itself, which stay where they are."""
    if optimizer.low_precision_master_weights_and_grads:
        return
    parameters = (parameter for group in optimizer.bit16_groups for parameter in group)
    by_id = {optimizer.get_param_id(parameter): parameter for parameter in parameters}
    if not isinstance(optimizer.accumulated_grads_in_cpu, _Sums):
        optimizer.async_accumulate_grad_in_cpu_via_gpu = _without_waiting(optimizer)
    optimizer.accumulated_grads_in_cpu = _Sums(by_id, device)


def _without_waiting(optimizer: Any) -> Callable[[Any], None]:
    """DeepSpeed's way of adding a gradient to its sum, where the host waits for copies of those before: streams do."""
    from deepspeed.accelerator import get_accelerator

    add = optimizer.async_accumulate_grad_in_cpu_via_gpu

    def order() -> None:
        here = get_accelerator().current_stream()
        for stream, event in optimizer._pending_offload_events.items():
            if stream != here:
                here.wait_event(event)

    def accumulate(parameter: Any) -> None:
        optimizer._wait_for_offload_copies = order
        try:
            add(parameter)
        finally:
            del optimizer._wait_for_offload_copies

    return accumulate


def _third_stage(optimizer: Any, device: torch.device) -> None:
    from deepspeed.accelerator import get_accelerator

    on_host = optimizer.grad_partitions_flat_buffer
    on_gpu = torch.zeros_like(on_host, device=device)
    pieces: dict[int, torch.Tensor] = getattr(optimizer, PIECES)
    for key, piece in pieces.items():
        pieces[key] = on_gpu.narrow(0, piece.storage_offset() - on_host.storage_offset(), piece.numel())
    optimizer.grad_partitions_flat_buffer = on_gpu
    optimizer.inf_or_nan_tracker = optimizer.inf_or_nan_tracker.to(device)
    get_accelerator().unpin_memory(on_host)
