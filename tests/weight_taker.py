"""A small HTTP server that takes weights as vLLM does, release by release, and is strict about what it is told.

The keys of each release are those of the dataclasses in its vllm/distributed/weight_transfer: an unknown one is refused
with HTTP 500 and changes nothing, as there.  CUDA handles and NCCL are stood in for (`stand_in`), so that tensors
really travel and are compared.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import dataclasses
import datetime
import json
import pickle
import queue
import socketserver
import sys
import threading
import types
import urllib.parse
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dsvllm.engine.server import new_socket_folder
from hf_dsvllm.engine.spec import EngineSpec

GPU = "GPU-00000000-0000-0000-0000-000000000000"
RENDEZVOUS = {"master_address", "master_port", "rank_offset", "world_size"}
GEOMETRY = {"packed", "packed_buffer_size_bytes", "packed_num_buffers"}
TENSORS = {"names", "dtype_names", "shapes"}
IPC_TENSORS = TENSORS | {"ipc_handles_pickled", "tensor_sizes"}
# (backend, release): keys of init_info, keys of update_info
KEYS = {
    ("ipc", "0.22.0"): (set(), IPC_TENSORS | {"packed"}),
    ("ipc", "0.26.0"): (set(), IPC_TENSORS | {"packed"}),
    ("ipc", "0.27.0"): ({"packed"}, IPC_TENSORS),
    ("ipc", "0.32.0"): ({"packed"}, IPC_TENSORS),
    ("nccl", "0.22.0"): (RENDEZVOUS, TENSORS | GEOMETRY),
    ("nccl", "0.26.0"): (RENDEZVOUS, TENSORS | GEOMETRY),
    ("nccl", "0.27.0"): (RENDEZVOUS, TENSORS | GEOMETRY),
    ("nccl", "0.28.0"): (RENDEZVOUS | GEOMETRY, TENSORS),
    ("nccl", "0.32.0"): (RENDEZVOUS | GEOMETRY, TENSORS),
}
ROUTES = (
    "/health", "/version", "/get_world_size", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc",
    "/reset_prefix_cache", "/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/init_weight_transfer_engine",
    "/start_weight_update", "/update_weights", "/finish_weight_update",
)  # fmt: skip
OF_WORKERS = ("/v1/load_lora_adapter", "/collective_rpc", "/init_weight_transfer_engine", "/start_weight_update",
              "/update_weights", "/finish_weight_update")  # fmt: skip
WAIT_S = 30.0


class Refused(Exception):
    """Answered with HTTP 500 and this message."""


class FakeVllm:
    """The state of one server; `failing` maps a path to "refuse", "hang" or "drop" (the connection).

    With several `workers` a call that they refuse leaves the refusals of all but one for the calls that follow, as in
    vLLM's MultiprocExecutor.
    """

    def __init__(self, backend: str = "ipc", release: str = "0.32.0", *, says: str | None = None) -> None:
        self.backend, self.release, self.says = backend, release, says or release
        self.workers = 1
        self.routes = set(ROUTES)
        self.failing: dict[str, str] = {}
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.models = ["base"]
        self.release_hanging = threading.Event()
        self.start_afresh()

    def start_afresh(self) -> None:
        """What a restart does."""
        self.whole, self.updating, self.packed, self.connected = True, False, False, False
        self.asleep: set[str] = set()
        self.paused = False
        self.weights = {}
        self.left_behind: list[Refused] = []

    def answer(self, path: str, body: dict[str, Any], api_key: str | None) -> dict[str, Any]:
        parts = urllib.parse.urlsplit(path)
        self.asked.append(path)
        self.bodies.append(body)
        failure = self.failing.get(parts.path)
        if failure == "hang":
            self.release_hanging.wait(WAIT_S)
        if failure is not None:
            raise Refused(f"{parts.path} was told to fail")
        query = urllib.parse.parse_qs(parts.query)
        name = parts.path.strip("/").replace("/", "_").replace(".", "_")
        if parts.path in OF_WORKERS and self.left_behind:
            raise self.left_behind.pop()
        try:
            return getattr(self, f"on_{name}")(body, query) or {}
        except Refused as refusal:
            self.left_behind = [refusal] * (self.workers - 1) if parts.path in OF_WORKERS else self.left_behind
            raise

    # -- routes ----------------------------------------------------------------------------------------------------

    def on_health(self, body: Any, query: Any) -> Any:
        return {}

    def on_version(self, body: Any, query: Any) -> Any:
        return {"version": self.says}

    def on_openapi_json(self, body: Any, query: Any) -> Any:
        return {"paths": {route: {} for route in self.routes}}

    def on_get_world_size(self, body: Any, query: Any) -> Any:
        return {"world_size": self.workers}

    def on_v1_models(self, body: Any, query: Any) -> Any:
        return {"data": [{"id": name} for name in self.models]}

    def on_v1_load_lora_adapter(self, body: Any, query: Any) -> Any:
        if not self.whole:
            raise Refused("the base is gone")
        self.models.append(body["lora_name"])

    def on_v1_unload_lora_adapter(self, body: Any, query: Any) -> Any:
        self.models.remove(body["lora_name"])

    def on_collective_rpc(self, body: Any, query: Any) -> Any:
        if "weights" in self.asleep:
            raise Refused("the weights sleep")
        self.whole = True

    def on_reset_prefix_cache(self, body: Any, query: Any) -> Any:
        return {"success": "kv_cache" not in self.asleep}

    def on_sleep(self, body: Any, query: Any) -> Any:
        self.asleep = {"weights", "kv_cache"}
        self.whole = self.whole and query["level"] == ["1"]

    def on_wake_up(self, body: Any, query: Any) -> Any:
        self.asleep -= set(query.get("tags", ["weights", "kv_cache"]))

    def on_is_sleeping(self, body: Any, query: Any) -> Any:
        return {"is_sleeping": bool(self.asleep)}

    def on_pause(self, body: Any, query: Any) -> Any:
        self.paused = True

    def on_resume(self, body: Any, query: Any) -> Any:
        self.paused = False

    def on_init_weight_transfer_engine(self, body: Any, query: Any) -> Any:
        info = body["init_info"]
        self.known(info, 0)
        self.packed = info.get("packed", False)
        if self.backend == "nccl":
            NCCL.meet(info)
        self.connected = True

    def on_start_weight_update(self, body: Any, query: Any) -> Any:
        if "weights" in self.asleep or self.updating or not self.connected:
            raise Refused("not the moment for an update")
        self.updating, self.whole = True, False

    def on_update_weights(self, body: Any, query: Any) -> Any:
        info = body["update_info"]
        self.known(info, 1)
        if not self.updating:
            raise Refused("start_weight_update must be called before update_weights.")
        packed = info.get("packed", self.packed)
        received = NCCL.receive(info) if self.backend == "nccl" else from_handles(info, packed)
        assert packed or self.backend == "ipc"
        for name, tensor in zip(info["names"], received, strict=True):
            assert name not in self.weights, f"{name} came twice"
            self.weights[name] = tensor.clone()

    def on_finish_weight_update(self, body: Any, query: Any) -> Any:
        if not self.updating:
            raise Refused("finish_weight_update called without a matching start_weight_update.")
        self.updating, self.whole = False, True

    def known(self, info: dict[str, Any], which: int) -> None:
        unknown = set(info) - KEYS[self.backend, self.release][which]
        if unknown:
            raise Refused(f"__init__() got an unexpected keyword argument {sorted(unknown)[0]!r}")


def unpacked(data: torch.Tensor, info: dict[str, Any]) -> list[torch.Tensor]:
    """vLLM's unpack_tensor: views of a uint8 buffer, which must begin where their dtype can."""
    dtypes = [getattr(torch, name) for name in info["dtype_names"]]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(info["shapes"], dtypes, strict=True)]
    pieces = data[: sum(sizes)].split(sizes)
    return [
        piece.contiguous().view(dtype).view(*shape)
        for piece, dtype, shape in zip(pieces, dtypes, info["shapes"], strict=True)
    ]


# -- CUDA IPC ----------------------------------------------------------------------------------------------------------

EXPORTS: list[weakref.ref[torch.Tensor]] = []


def export(tensor: torch.Tensor) -> tuple[None, tuple[int]]:
    """In place of torch's reduce_tensor: like a CUDA handle, it does not keep the memory alive."""
    EXPORTS.append(weakref.ref(tensor))
    return None, (len(EXPORTS) - 1,)


def from_handles(info: dict[str, Any], packed: bool) -> list[torch.Tensor]:
    handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))

    def rebuilt(handle: dict[str, tuple[int]]) -> torch.Tensor:
        tensor = EXPORTS[handle[GPU][0]]()
        assert tensor is not None, "the memory behind a handle was freed before the answer"
        return tensor

    if not packed:
        return [rebuilt(handle) for handle in handles]
    tensors = unpacked(rebuilt(handles), info)
    assert [tensor.nbytes for tensor in tensors] == info["tensor_sizes"]
    return tensors


# -- NCCL --------------------------------------------------------------------------------------------------------------


class UniqueIdThere(ctypes.Structure):
    """vLLM's class, under vLLM's module name."""

    _fields_ = (("internal", ctypes.c_byte * 128),)


class FakeNccl:
    """Stands for libnccl on both ends: what the trainer broadcasts is what the worker receives."""

    identity = bytes(range(128))

    def __init__(self) -> None:
        self.wire: queue.Queue[bytes] = queue.Queue()
        self.joined = threading.Event()
        self.aborted = threading.Event()
        self.fails: str | None = None

    # the trainer's end, as transfer.libnccl.Nccl

    def unique_id(self) -> bytes:
        return self.identity

    def join(self, identity: bytes, *, rank: int, world_size: int) -> int:
        assert (identity, rank) == (self.identity, 0)
        self.joined.set()
        return 77

    def add_one_float(self, address: int, communicator: int, stream: int) -> None:
        assert communicator == 77

    def broadcast_bytes(self, address: int, count: int, communicator: int, stream: int) -> None:
        if self.fails == "hang":
            self.aborted.wait(WAIT_S)
            return
        self.wire.put(ctypes.string_at(address, count))

    def abort(self, communicator: int) -> None:
        self.aborted.set()

    # the worker's end, as StatelessProcessGroup.create and PyNcclCommunicator do it

    def meet(self, info: dict[str, Any]) -> None:
        self.wire = queue.Queue()
        store = torch.distributed.TCPStore(
            info["master_address"],
            info["master_port"],
            world_size=info["world_size"],
            is_master=False,
            timeout=datetime.timedelta(seconds=WAIT_S),
            use_libuv=False,
        )
        identity = pickle.loads(store.get("broadcast_from/0/0"))
        assert isinstance(identity, UniqueIdThere)
        assert bytes(identity) == self.identity
        if not self.joined.wait(WAIT_S):
            raise Refused("the trainer never joined")

    def receive(self, info: dict[str, Any]) -> list[torch.Tensor]:
        return unpacked(torch.frombuffer(bytearray(self.wire.get(timeout=WAIT_S)), dtype=torch.uint8), info)


NCCL = FakeNccl()


def stand_in(patch: pytest.MonkeyPatch) -> FakeNccl:
    """Replace the driver's calls in this process; returns the NCCL that both ends share."""
    global NCCL
    NCCL = FakeNccl()
    EXPORTS.clear()
    patch.setattr("hf_dsvllm.transfer.ipc.reduce_tensor", export)
    patch.setattr("hf_dsvllm.transfer.ipc.gpu_uuid", lambda: GPU)
    patch.setattr("hf_dsvllm.transfer.ipc.worker_uuids", lambda named, workers: (GPU, "GPU-1")[:workers])
    patch.setattr("hf_dsvllm.transfer.nccl.Nccl", lambda: NCCL)
    name = "vllm.distributed.device_communicators.pynccl_wrapper"
    module = types.ModuleType(name)
    module.ncclUniqueId = UniqueIdThere  # type: ignore[attr-defined]
    for parent in ("vllm", "vllm.distributed", "vllm.distributed.device_communicators"):
        patch.setitem(sys.modules, parent, types.ModuleType(parent))
    patch.setitem(sys.modules, name, module)
    return NCCL


# -- the server --------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    fake: FakeVllm

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        try:
            code, answer = 200, self.fake.answer(self.path, body, self.headers.get("Authorization"))
        except Exception as error:
            said = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            code, answer = 500, {"error": {"message": said}}
        data = json.dumps(answer).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client's deadline passed
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    do_GET = do_POST


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class PortServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True


@contextlib.contextmanager
def served(fake: FakeVllm, *, port: bool = False) -> Iterator[Path | str]:
    """Serve `fake` on a socket of its own, or on a loopback port; the address."""
    handler = type("Bound", (Handler,), {"fake": fake})
    folder = new_socket_folder()
    server: Any = PortServer(("127.0.0.1", 0), handler) if port else UnixServer(str(folder / "s"), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}" if port else folder / "s"
    finally:
        fake.release_hanging.set()
        server.shutdown()
        thread.join()
        server.server_close()
        (folder / "s").unlink(missing_ok=True)
        folder.rmdir()


@dataclasses.dataclass
class FakeServer:
    """The part of EngineServer that WeightSync uses."""

    fake: FakeVllm
    uds: Any
    spec: EngineSpec
    restarts: list[Any] = dataclasses.field(default_factory=list)
    adapter_prefix: str = ""
    alive: bool = True

    def restart(self, *, model: Any = None) -> None:
        self.restarts.append(model)
        self.fake.failing.clear()
        self.fake.start_afresh()

    def wait_ready(self, timeout_s: float = 900.0) -> None:
        del timeout_s


def gpu_spec(backend: str | None, **changes: Any) -> EngineSpec:
    """What a server on a GPU with weight transfer and sleep would have been started with."""
    settings: dict[str, Any] = {"model": Path("/models/base"), "python": Path(sys.executable), "device": "cuda"}
    settings |= {"weight_transfer": backend, "sleep_mode": True}
    return EngineSpec(**(settings | changes))
