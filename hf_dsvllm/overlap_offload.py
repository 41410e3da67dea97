"""An offloaded optimizer whose copies go on behind other work: gradients behind the backward pass, weights behind Adam.

DeepSpeed (0.19.8) copies gradients to the host on the stream that reduces them, for which the backward pass waits
bucket by bucket (stage_1_and_2.py, average_tensor), and asks the GPU after each gradient whether it is finite.  Its
step then passes over all of them to clip, over everything in Adam, over all weights to round them, and sends those
after that (stage3.py rounds into new, pageable memory).  Here gradients have a stream of their own, and a step takes
the weights piece by piece: what one pass leaves in the cache the next one finds there, and a piece is on its way to
the GPU, which rounds it, while Adam works on the next.  The same numbers to the last bit: the same operations on the
same elements.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from hf_dsvllm.features import PIECE, SLOT, SLOTS
from hf_dsvllm.outcome import zero_settings

__all__ = ["overlap", "why_not"]

logger = logging.getLogger(__name__)


def why_not(trainer: Any) -> str | None:
    """Why copies do not overlap; None where they can."""
    offloaded = zero_settings(trainer).get("offload_optimizer") or {}
    if offloaded.get("device") != "cpu":
        return "no optimizer is offloaded to the CPU"
    if offloaded.get("super_offload") or zero_settings(trainer).get("zenflow"):
        return "SuperOffload and ZenFlow have steps of their own"
    ratio = offloaded.get("ratio")
    if ratio is not None and ratio < 1:
        return "a part of the optimizer is on the GPU (offload_optimizer.ratio)"
    return None


def overlap(trainer: Any) -> None:
    """Do so once the trainer's engine is there."""
    trainer.add_callback(_Overlap(trainer))


class _Overlap(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        engine = self.trainer.deepspeed
        zero, device = engine.optimizer, torch.device(engine.device)
        adam = getattr(zero, "optimizer", None)
        if type(adam) is not DeepSpeedCPUAdam:
            logger.warning("overlap_offload is left out: %s is not DeepSpeedCPUAdam", type(adam).__name__)
            return
        if isinstance(adam.ds_opt_adam, _InPieces):
            return
        third = engine.zero_optimization_stage() == 3
        flat = zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups
        share = sum(each.numel() for each in flat)
        pieces = adam.ds_opt_adam = _InPieces(adam.ds_opt_adam, device, min(PIECE, share))
        (_third_stage if third else _early_stages)(zero, pieces, _ToHost(device, min(SLOT, share)))


class _InPieces:
    """DeepSpeed's compiled Adam, called piece by piece: clipped before, sent after.

    Pieces are multiples of 128 elements, which the compiled loop takes at a time: what is left over is so at the end.
    """

    def __init__(self, compiled: Any, device: torch.device, piece: int) -> None:
        self._compiled, self._piece = compiled, piece
        self._staging = torch.empty(piece if device.type == "cuda" else 0, dtype=torch.float32, device=device)
        self.factor: torch.Tensor | None = None
        self.destination: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def adam_update(self, *settings: Any) -> None:
        """`DeepSpeedCPUAdam.step`'s call: (…, weights, gradients, first moments, second moments), flat, fp32."""
        settings, arrays = settings[:-4], settings[-4:]
        for start in range(0, arrays[0].numel(), self._piece):
            count = min(self._piece, arrays[0].numel() - start)
            weights, gradients, *moments = (array.narrow(0, start, count) for array in arrays)
            if self.factor is not None:
                gradients.mul_(self.factor)
            self._compiled.adam_update(*settings, weights, gradients, *moments)
            if self.destination is not None:
                self.send(weights, self.destination.narrow(0, start, count))

    def send(self, weights: torch.Tensor, destination: torch.Tensor) -> None:
        """To where the model has them, rounded to its dtype there."""
        if destination.device.type == "cuda" and destination.dtype != weights.dtype:
            weights = self._staging.narrow(0, 0, weights.numel()).copy_(weights, non_blocking=True)
        destination.copy_(weights, non_blocking=True)

    def sent(self) -> None:
        """Wait until the last weights are there: ZeRO-3 gathers on a stream that waits for nothing else."""
        if self.destination is not None and self.destination.device.type == "cuda":
            torch.cuda.current_stream(self.destination.device).synchronize()
        self.destination = None

    def clip(self, factor: torch.Tensor) -> None:
        """By what the gradients of the next call are to be multiplied."""
        self.factor = None if factor.item() == 1 else factor


class _ToHost:
    """Gradients on their way to host memory, on a stream of their own, through a ring of buffers."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device, self._size = device, size
        self._slots: list[torch.Tensor] = []
        self._left: list[torch.cuda.Event | None] = [None] * SLOTS
        self._next = 0

    def send(self, gradient: torch.Tensor, destination: torch.Tensor) -> None:
        """`gradient`, flat, may be overwritten by what the current stream does next."""
        if self.stream is None or gradient.device.type != "cuda":
            destination.copy_(gradient)
            return
        for source, target in zip(gradient.split(self._size), destination.split(self._size), strict=True):
            self._send(source, target)

    def _send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        assert self.stream is not None
        here, index = torch.cuda.current_stream(self._device), self._next
        self._next = (index + 1) % SLOTS
        if len(self._slots) <= index:
            self._slots.append(torch.empty(self._size, dtype=torch.float32, device=self._device))
        slot = self._slots[index].view(target.dtype).narrow(0, 0, source.numel())
        left = self._left[index]
        if left is not None:
            here.wait_event(left)
        slot.copy_(source)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            target.copy_(slot, non_blocking=True)
            self._left[index] = self.stream.record_event()

    def wait(self) -> None:
        """Until all of them are there."""
        if self.stream is not None:
            self.stream.synchronize()


def _early_stages(zero: Any, pieces: _InPieces, to_host: _ToHost) -> None:
    step, clip, check, epilogue = (
        zero._optimizer_step,
        zero.unscale_and_clip_grads,
        zero.has_overflow,
        zero.independent_gradient_partition_epilogue,
    )

    def send_gradient(parameter: Any) -> None:
        group, offset, start, count = zero.grad_position[zero.get_param_id(parameter)]
        gradient = zero.get_param_gradient_attribute(parameter)
        flat = zero.single_partition_of_fp32_groups[group].grad.view(-1)
        to_host.send(gradient.view(-1).narrow(0, offset, count), flat.narrow(0, start, count))
        if to_host.stream is not None:
            zero._record_gradient_stream(gradient, torch.cuda.current_stream(gradient.device))
        zero.clear_grad_attribute(parameter)

    def has_overflow(*args: Any, **kwargs: Any) -> bool:
        """A norm in fp64 is finite where all elements are: what was asked of each gradient is asked once."""
        norms = list(zero.norm_for_param_grads.values())
        zero.local_overflow = zero.local_overflow or (bool(norms) and not bool(torch.stack(norms).isfinite().all()))
        return bool(check(*args, **kwargs))

    def clip_later(groups: Any, norm: torch.Tensor | None) -> None:
        to_host.wait()
        pieces.clip(_factor(lambda probe: clip([probe], norm)))

    def step_and_send(group: int) -> None:
        rank = torch.distributed.get_rank(group=zero.real_dp_process_group[group])
        pieces.destination = zero.parallel_partitioned_bit16_groups[group][rank].data
        step(group)
        pieces.destination = None

    def epilogue_then_wait() -> None:
        epilogue()
        to_host.wait()

    _replace_buffers(zero.param_buffer_of_bit16_for_cpu_offload_groups)
    zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu = send_gradient
    zero.update_offload_overflow_tracker_for_param_grad = lambda parameter: None
    zero.has_overflow = has_overflow
    zero.unscale_and_clip_grads = clip_later
    zero._optimizer_step = step_and_send
    zero.independent_gradient_partition_epilogue = epilogue_then_wait


def _replace_buffers(buffers: list[torch.Tensor]) -> None:
    """The host's bf16 copies of the weights are not needed."""
    from deepspeed.accelerator import get_accelerator

    for index, buffer in enumerate(buffers):
        get_accelerator().unpin_memory(buffer)
        buffers[index] = torch.empty(0).as_subclass(_Sent)


def _third_stage(zero: Any, pieces: _InPieces, to_host: _ToHost) -> None:
    step, put_back, epilogue = (
        zero._optimizer_step,
        zero._reassign_or_swap_out_partitioned_parameters,
        zero.independent_gradient_partition_epilogue,
    )
    clip = type(zero).unscale_and_clip_grads

    def send_gradient(parameter: Any, gradient: torch.Tensor, *of_nvme: Any) -> None:
        key = zero.get_param_id(parameter)
        group, start, _ = zero.grad_position[key]
        zero.norm_for_param_grads[key] = zero._constant_buffered_norm2(gradient)
        to_host.send(gradient, zero.fp32_partitioned_groups_flat[group].grad.narrow(0, start, gradient.numel()))

    def clip_later(group: int, norm: torch.Tensor) -> None:
        to_host.wait()

        def of(probe: torch.Tensor) -> None:
            flat = {group: types.SimpleNamespace(grad=probe)}
            stand_in = types.SimpleNamespace(
                loss_scale=zero.loss_scale, clip_grad=zero.clip_grad, fp32_partitioned_groups_flat=flat
            )
            clip(stand_in, group, norm)

        pieces.clip(_factor(of))

    def step_and_send(group: int) -> None:
        flat = zero.fp16_partitioned_groups_flat[group]
        pieces.destination = None if flat is None else flat.data
        step(group)

    def put_in_place(group: int) -> None:
        if pieces.destination is None:
            put_back(group)
        else:
            pieces.sent()
            zero._unflatten_partitioned_parameters(group)

    def epilogue_then_wait() -> None:
        epilogue()
        to_host.wait()

    zero._offload_grad_partition_at_boundary = send_gradient
    zero.unscale_and_clip_grads = clip_later
    zero._optimizer_step = step_and_send
    zero._reassign_or_swap_out_partitioned_parameters = put_in_place
    zero.independent_gradient_partition_epilogue = epilogue_then_wait


def _factor(clip: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """What DeepSpeed's clipping multiplies gradients by, by letting it clip a one."""
    probe = torch.ones(1)
    clip(probe)
    return probe[0]


class _Sent(torch.Tensor):
    """In place of the host's bf16 copy of weights that are on the GPU already: nothing is copied into it or from it."""

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            return args[0]
        return super().__torch_function__(func, kinds, args, kwargs)
