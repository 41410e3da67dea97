"""What one rank knows, on every rank; also where rank 0 takes longer than the Trainer's group would wait."""

from __future__ import annotations

import datetime
from typing import Any

import torch

__all__ = ["Ranks", "from_all", "from_main", "is_distributed"]


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def from_main(value: Any, **how: Any) -> Any:
    """Rank 0's `value` on every rank; collective.  Without a process group the value itself.

    `how`: group and device of `broadcast_object_list`.
    """
    if not is_distributed():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, **how)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of the ranks; collective."""
    if not is_distributed():
        return [value]
    box: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(box, value)
    return box


class Ranks:
    """Broadcasts over a gloo group of our own, made at the first use, which all ranks must reach together.

    The Trainer's NCCL group gives up after ten minutes (torch's default) and takes the run with it; an evaluation, a
    first vLLM start or an export may take longer.  Gloo also leaves the GPUs' queues alone.
    """

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: how long the other ranks wait for rank 0 before they fail."""
        self.patience_s = patience_s
        self._group: Any = None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; collective.  Without a process group the value itself."""
        if not is_distributed():
            return value
        if self._group is None:
            patience = datetime.timedelta(seconds=self.patience_s)
            self._group = torch.distributed.new_group(backend="gloo", timeout=patience)
        return from_main(value, group=self._group, device=torch.device("cpu"))
