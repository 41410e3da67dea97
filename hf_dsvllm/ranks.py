"""What rank 0 found out, on every rank, however long rank 0 took."""

from __future__ import annotations

import datetime
from typing import Any

import torch

__all__ = ["Ranks"]


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
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return value
        if self._group is None:
            patience = datetime.timedelta(seconds=self.patience_s)
            self._group = torch.distributed.new_group(backend="gloo", timeout=patience)
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]
