"""What can be shown of weight transfer without a GPU: the installed vLLM's own classes take what we send.

Exits with 0 if its worker's rendezvous reads our NCCL id, its dataclasses take our bodies in the form new releases know
and refuse the other one, its unpacking gives the tensors back, and its server has the routes.
"""

from __future__ import annotations

import base64
import pickle
import threading
import time

import torch
import vllm
from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
from vllm.entrypoints.rl.online.api_router import router

from hf_dsvllm.engine.bodies import PACKED_FORMS, init_info, update_info
from hf_dsvllm.engine.capabilities import TRANSFER_ROUTES
from hf_dsvllm.transfer.base import described, packed
from hf_dsvllm.transfer.meeting import Meeting

LIMIT_S = 60.0
RENDEZVOUS = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}


def main() -> None:
    meet()
    bucket = [("a", torch.arange(3).to(torch.uint8)), ("b", torch.randn(4, 5).bfloat16()), ("c", torch.randn(7))]
    buffer, ordered = packed(bucket)
    told = described(ordered, sizes=True)
    dtypes = [getattr(torch, name) for name in told.dtypes]
    back = dict(unpack_tensor(buffer, list(told.names), list(map(list, told.shapes)), dtypes, list(told.sizes_bytes)))
    assert all(torch.equal(back[name], tensor) for name, tensor in bucket)
    handles = base64.b64encode(pickle.dumps({"GPU-0": (1, 2)})).decode()
    for backend, engine in (
        ("ipc", ipc_engine.IPCWeightTransferEngine),
        ("nccl", nccl_engine.NCCLWeightTransferEngine),
    ):
        taken = []
        for form in PACKED_FORMS:
            rendezvous = RENDEZVOUS if backend == "nccl" else None
            update = update_info(backend, form, told, handles=handles if backend == "ipc" else None)
            try:
                engine.init_info_cls(**init_info(backend, form, rendezvous))
                engine.update_info_cls(**update)
            except TypeError:
                continue
            taken.append(form)
        assert taken == ["init"], (vllm.__version__, backend, taken)
    assert {route.path for route in router.routes} >= {*TRANSFER_ROUTES, "/get_world_size", "/pause", "/resume"}


def meet() -> None:
    """Our store and id, read by the code that a worker runs."""
    meeting = Meeting(2, LIMIT_S)
    identity = bytes(range(128))
    read: list[object] = []

    def work() -> None:
        group = StatelessProcessGroup.create(host="127.0.0.1", port=meeting.port, rank=1, world_size=2)
        read.append(group.broadcast_obj(None, src=0))

    worker = threading.Thread(target=work, daemon=True)
    assert not meeting.someone_came
    worker.start()
    assert meeting.wait_for_someone(time.monotonic() + LIMIT_S)
    meeting.announce(identity)
    worker.join(LIMIT_S)
    assert isinstance(read[0], ncclUniqueId)
    assert bytes(read[0]) == identity


if __name__ == "__main__":
    main()
