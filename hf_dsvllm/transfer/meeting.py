"""Where vLLM's workers find the trainer: a key-value store on loopback that holds the id of the communicator.

vLLM's side is `StatelessProcessGroup.create` and `PyNcclCommunicator(group)` (0.22 to 0.32): each worker connects to a
TCPStore, reads the pickled ncclUniqueId at `broadcast_from/0/0`, joins, and all-reduces one float.
"""

from __future__ import annotations

import datetime
import pickle
import socket
import threading
import time

import torch

__all__ = ["Meeting", "pickled_unique_id"]

POLL_S = 0.005
ID_KEY = "broadcast_from/0/0"
ID_MODULE, ID_MAKER = "vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId.from_buffer_copy"
LOOPBACK = "127.0.0.1"


def pickled_unique_id(identity: bytes) -> bytes:
    """A pickle that becomes vLLM's own ncclUniqueId object where it is read; vLLM need not be here to write it.

    Its opcodes are those of `pickle.dumps` (protocol 4) for the call `ncclUniqueId.from_buffer_copy(identity)`.
    """

    def text(value: str) -> bytes:
        encoded = value.encode()
        return pickle.SHORT_BINUNICODE + bytes([len(encoded)]) + encoded

    maker = text(ID_MODULE) + text(ID_MAKER) + pickle.STACK_GLOBAL
    argument = pickle.SHORT_BINBYTES + bytes([len(identity)]) + identity + pickle.TUPLE1
    return pickle.PROTO + b"\x04" + maker + argument + pickle.REDUCE + pickle.STOP


class Meeting:
    """One store on a port of its own; used for one attempt to connect, then dropped."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((LOOPBACK, 0))  # TCPStore by itself would listen on every interface
        listener.listen()
        self.port: int = listener.getsockname()[1]
        self._over = threading.Event()
        self._store = torch.distributed.TCPStore(
            host_name=LOOPBACK,
            port=self.port,
            world_size=world_size,
            is_master=True,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            use_libuv=False,
        )
        self._alone = self._store.num_keys()

    @property
    def someone_came(self) -> bool:
        """Whether a worker has connected: each one counts itself in the store."""
        return self._store.num_keys() > self._alone

    def wait_for_someone(self, deadline: float) -> bool:
        """Wait for the first worker; False if the meeting is called off or the deadline passes."""
        while not self.someone_came:
            if self._over.wait(POLL_S) or time.monotonic() > deadline:
                return False
        return True

    def announce(self, identity: bytes) -> None:
        """Tell the communicator's id to all who came and come."""
        self._store.set(ID_KEY, pickled_unique_id(identity))

    def call_off(self) -> None:
        """Nobody will come."""
        self._over.set()
