"""What the ranks of a training run do to try streams of its weights; the results are files for pytest to look at.

OUT/<name>.stream.<rank>.pt has the streamed tensors, OUT/<name>.sends.<rank>.json what each send came to on that rank.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dsvllm.engine import EngineClient, WeightSync
from hf_dsvllm.errors import EngineError
from hf_dsvllm.live.stream import send, stream
from tests import weight_taker
from tests.weight_taker import FakeServer, FakeVllm, gpu_spec, served

BUCKET_BYTES = 1 << 14
TIMEOUT_S = 60.0
FAILING = (
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
)


def save(model: Any, out: Path, name: str) -> None:
    """Stream the weights (adapters merged, if there are any) and keep this rank's tensors."""
    merge = hasattr(model, "peft_config")
    state: dict[str, torch.Tensor] = {}
    for bucket in stream(model, dtype=torch.float32, bucket_bytes=BUCKET_BYTES, merge_adapters=merge):
        assert not state.keys() & dict(bucket).keys(), "a name came twice"
        state |= {key: tensor.clone() for key, tensor in bucket}
    torch.save(state, out / f"{name}.stream.{os.environ['RANK']}.pt")


def try_sends(model: Any, out: Path, name: str) -> None:
    """Send into stand-ins for vLLM: well, failing at each point, to several GPUs, and with a rank that fails alone."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        weight_taker.stand_in(patch)
        patch.setattr("hf_dsvllm.transfer.ipc.gpu_uuid", lambda: weight_taker.GPU if rank == 0 else f"GPU-{rank}")
        for backend in ("ipc", "nccl"):
            found[backend] = one_send(model, FakeVllm(backend))
            for path in FAILING:
                fake = FakeVllm(backend)
                fake.failing[path] = "refuse"
                found[f"{backend} {path}"] = one_send(model, fake)
        several = FakeVllm("ipc")
        several.workers = 2
        found["two GPUs"] = one_send(model, several)
        several = FakeVllm("ipc")
        several.workers, several.failing["/update_weights"] = 2, "refuse"
        before = len(weight_taker.EXPORTS)
        found["two GPUs: /update_weights"] = one_send(model, several)
        found["two GPUs: /update_weights"]["exports"] = len(weight_taker.EXPORTS) - before
        several = FakeVllm("ipc")
        several.workers = 2
        before = len(weight_taker.EXPORTS)
        with pytest.MonkeyPatch.context() as elsewhere:
            elsewhere.setattr("hf_dsvllm.transfer.ipc.worker_uuids", lambda named, workers: (weight_taker.GPU, "GPU-7"))
            found["elsewhere"] = one_send(model, several)
        found["elsewhere"]["exports"] = len(weight_taker.EXPORTS) - before
        if rank == 1:
            patch.setattr("hf_dsvllm.transfer.ipc.reduce_tensor", no_handle)
        several = FakeVllm("ipc")
        several.workers = 2
        found["rank 1 fails"] = one_send(model, several)
    (out / f"{name}.sends.{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def no_handle(tensor: torch.Tensor) -> Any:
    raise RuntimeError("no handle for this memory")


def one_send(model: Any, fake: FakeVllm) -> dict[str, Any]:
    """The outcome on this rank: `path` or `error`, on rank 0 also whether the weights arrived and the mark."""
    merge = hasattr(model, "peft_config")
    wanted = {
        name: tensor.clone()
        for bucket in stream(model, dtype=torch.bfloat16, merge_adapters=merge)
        for name, tensor in bucket
    }
    with contextlib.ExitStack() as stack:
        sync = None
        if os.environ["RANK"] == "0":
            uds = stack.enter_context(served(fake))
            client = stack.enter_context(contextlib.closing(EngineClient(uds, default_timeout_s=TIMEOUT_S)))
            sync = WeightSync(FakeServer(fake, uds, gpu_spec(fake.backend)), client)  # type: ignore[arg-type]
        outcome: dict[str, Any] = {}
        try:
            result = send(
                model,
                sync,
                step=3,
                dtype=torch.bfloat16,
                merge_adapters=merge,
                bucket_bytes=BUCKET_BYTES,
                timeout_s=TIMEOUT_S,
            )
            outcome["path"] = result.path_used
        except EngineError as error:
            outcome["error"] = str(error)
        if sync is not None:
            outcome["whole"] = fake.whole
            outcome["marked"] = sync.broken is not None
            equal = [torch.equal(fake.weights[key], wanted[key]) for key in wanted if key in fake.weights]
            outcome["arrived"] = len(equal) == len(wanted) and all(equal)
    return outcome
