"""What vLLM's weight transfer wants to be told, release by release: the one table of its variants.

Read from the wheels 0.22, 0.24, 0.26, 0.27, 0.28 and 0.32 (vllm/distributed/weight_transfer/{ipc,nccl}_engine.py):

| | 0.22 - 0.26 | 0.27 | 0.28 - 0.32 |
| --- | --- | --- | --- |
| ipc, tensors one by one | plain | plain | plain |
| ipc, one packed buffer | `packed` with each update | `packed` at init | `packed` at init |
| nccl, one packed buffer | `packed` with each update | `packed` with each update | `packed` at init |

One worker decides itself, whatever its version says: `packed` is offered at init first, where those that do not know it
there refuse it before anything has changed.  The other way round it would be found out with half of the weights gone.
Several workers must not refuse anything (`packed_forms`), so that the table decides.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

__all__ = ["PackedIn", "TensorNames", "TransferBackend", "init_info", "packed_forms", "release", "update_info"]

TransferBackend: TypeAlias = Literal["ipc", "nccl"]
PackedIn: TypeAlias = Literal["init", "update"]

PACKED_FORMS: tuple[PackedIn, ...] = ("init", "update")  # in the order in which they can be tried without harm
PACKED_AT_INIT_SINCE: dict[TransferBackend, tuple[int, int]] = {"ipc": (0, 27), "nccl": (0, 28)}
# The receiver cuts a new buffer when one is fuller than this.  Each request is one buffer here, so it never must.
ONE_BUFFER_BYTES = 1 << 62


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Names, dtypes ("bfloat16") and shapes of the tensors of one request; `sizes_bytes` if they are packed."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes_bytes: tuple[int, ...] | None = None


def release(version: str) -> tuple[int, int] | None:
    """(major, minor) of a version such as 0.32.0+cpu, None for a build from a source checkout (0.1.dev20+g1f3a)."""
    found = None if ".dev" in version else re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def packed_forms(backend: TransferBackend, version: str, workers: int) -> tuple[PackedIn, ...]:
    """Where a server of `version` may be told that buffers are packed, in the order to try.

    Of several workers only one answer is read when they refuse a call; the others' wait in vLLM's queues, and the next
    call gets those in place of its own (v1/executor/multiproc_executor.py, get_response, 0.26 to 0.32; seen with four
    workers of 0.26).  So there is no second try: the table decides, and a build without a release counts as new.
    """
    if workers == 1:
        return PACKED_FORMS
    known = release(version)
    return ("update",) if known is not None and known < PACKED_AT_INIT_SINCE[backend] else ("init",)


def init_info(
    backend: TransferBackend, packed_in: PackedIn | None, rendezvous: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The body of /init_weight_transfer_engine; `packed_in` None for tensors one by one; a rendezvous for nccl."""
    packed = _packed(backend) if packed_in == "init" else {}
    return {**(rendezvous or {}), **packed}


def update_info(
    backend: TransferBackend,
    packed_in: PackedIn | None,
    tensors: TensorNames,
    *,
    handles: str | None = None,
) -> dict[str, Any]:
    """The body of one /update_weights; `handles` (ipc) is a base64 pickle of CUDA handles by GPU UUID."""
    body: dict[str, Any] = {
        "names": list(tensors.names),
        "dtype_names": list(tensors.dtypes),
        "shapes": [list(shape) for shape in tensors.shapes],
    }
    if packed_in == "update":
        body |= _packed(backend)
    if backend == "ipc":
        body["ipc_handles_pickled"] = handles
        if packed_in is not None:
            body["tensor_sizes"] = list(tensors.sizes_bytes or ())
    return body


def _packed(backend: TransferBackend) -> dict[str, Any]:
    if backend == "ipc":
        return {"packed": True}
    return {"packed": True, "packed_buffer_size_bytes": ONE_BUFFER_BYTES, "packed_num_buffers": 1}
