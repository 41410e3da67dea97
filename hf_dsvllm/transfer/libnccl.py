"""The few functions of NCCL that a broadcast needs, through ctypes on the library torch has loaded.

torch.distributed is no help here: the members of its groups belong to one torch world, and vLLM's workers do not.
Prototypes: nccl.h 2.x, unchanged since 2.0.
"""

from __future__ import annotations

import ctypes
from typing import Any

from hf_dsvllm.errors import EngineError

__all__ = ["UNIQUE_ID_BYTES", "Nccl", "UniqueId"]

UNIQUE_ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES
SUCCESS = 0
UINT8, FLOAT32, SUM = 1, 7, 0  # ncclDataType_t, ncclRedOp_t
LIBRARY = "libnccl.so.2"


class UniqueId(ctypes.Structure):
    """ncclUniqueId: what all members of a communicator must know."""

    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)


class Nccl:
    """Calls that raise instead of returning a code.  A communicator is an opaque pointer."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise EngineError(
                f"{LIBRARY} is not there ({error}), which torch for CUDA brings. Weights go to vLLM through files then."
            ) from None
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for name, arguments in {
            "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
            "ncclCommInitRank": [ctypes.POINTER(pointer), number, UniqueId, number],
            "ncclAllReduce": [pointer, pointer, size, number, number, pointer, pointer],
            "ncclBroadcast": [pointer, pointer, size, number, number, pointer, pointer],
            "ncclCommAbort": [pointer],
        }.items():
            getattr(self._library, name).argtypes = arguments

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != SUCCESS:
            said = (self._library.ncclGetErrorString(code) or b"").decode()
            raise EngineError(f"{name} failed with code {code} ({said}). NCCL_DEBUG=INFO tells more.")

    def unique_id(self) -> bytes:
        """A fresh id, made by the member with rank 0."""
        identity = UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(identity))
        return bytes(identity)

    def join(self, identity: bytes, *, rank: int, world_size: int) -> int:
        """Become a member on the current device; blocks until all are there.  The communicator."""
        communicator = ctypes.c_void_p()
        self._call(
            "ncclCommInitRank", ctypes.byref(communicator), world_size, UniqueId.from_buffer_copy(identity), rank
        )
        return int(communicator.value or 0)

    def add_one_float(self, address: int, communicator: int, stream: int) -> None:
        """All-reduce one float32 in place: vLLM's members do so right after joining and wait for the others."""
        self._call("ncclAllReduce", address, address, 1, FLOAT32, SUM, communicator, stream)

    def broadcast_bytes(self, address: int, count: int, communicator: int, stream: int) -> None:
        """Send `count` bytes from here, the member with rank 0, to all others."""
        self._call("ncclBroadcast", address, address, count, UINT8, 0, communicator, stream)

    def abort(self, communicator: int) -> None:
        """End a communicator whose members may be gone; what still runs on it is cut off."""
        self._call("ncclCommAbort", communicator)
