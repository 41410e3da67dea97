"""Stands for vLLM in the fault tests: its processes, its routes, its way to die; ready in a tenth of a second.

    python -I -S killable_vllm.py --model FOLDER --uds SOCKET [--enable-lora …]

API server → engine core → worker are processes of one session, as vLLM's are: the core does not notice that its API
server was killed, and the API server leaves when its core has died.  Answers tell which weights they come from.

The folder $HF_DSVLLM_FAKE steers it.  At a point POINT (start, load, generate), the n-th time since the folder was
made, it writes POINT.n with its processes' numbers; if `hold.POINT.n` is there it waits until `go.POINT.n` is.  Files
named `bad-arguments`, `out-of-memory`, `deaf` (never healthy) spoil every start while they are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import socketserver
import sys
import threading
import time
from pathlib import Path

CONTROL = Path(os.environ["HF_DSVLLM_FAKE"])
POLL_S = 0.01
LOCK = threading.Lock()
PIDS: dict[str, int] = {}
WEIGHTS: dict[str, str] = {}  # by the name to ask for


def at(point: str) -> None:
    """Tell that this point is reached, and wait if told to."""
    with LOCK:
        number = 0
        while (CONTROL / f"{point}.{number}").exists():
            number += 1
        draft = CONTROL / f".{point}.{number}"
        draft.write_text(json.dumps({"api": os.getpid(), **PIDS}), encoding="ascii")
        draft.rename(CONTROL / f"{point}.{number}")
    if (CONTROL / f"hold.{point}.{number}").exists():
        while not (CONTROL / f"go.{point}.{number}").exists():
            time.sleep(POLL_S)
        if core_is_gone():  # vLLM's API server answers nothing without its core
            os._exit(1)


def core_is_gone() -> bool:
    """Whether the core was killed meanwhile, reaped or not."""
    try:
        return Path(f"/proc/{PIDS['core']}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] in "ZX"
    except (OSError, KeyError):
        return True


def main() -> None:
    options = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    if (CONTROL / "bad-arguments").exists():
        sys.exit("api_server.py: error: unrecognized arguments: --nonsense 1")
    if (CONTROL / "out-of-memory").exists():
        sys.exit("ValueError: Available memory on node 0 is less than requested memory for kv (32768.0 GiB).")
    WEIGHTS["base"] = digest(Path(options["--model"]))
    fork_core()
    at("start")
    server = Server(options["--uds"], Handler)
    threading.Thread(target=leave_with_the_core, daemon=True).start()
    server.serve_forever()


def fork_core() -> None:
    """Engine core and worker; the core leaves when its worker has died."""
    read_end, write_end = os.pipe()
    core = os.fork()
    if core == 0:
        worker = os.fork()
        if worker == 0:
            while True:
                time.sleep(60)
        os.write(write_end, f"{worker}\n".encode())
        os.waitpid(worker, 0)
        os._exit(1)
    os.close(write_end)
    PIDS.update(core=core, worker=int(os.read(read_end, 32)))


def leave_with_the_core() -> None:
    os.waitpid(PIDS["core"], 0)
    print("(APIServer) EngineDeadError: EngineCore encountered an issue.", flush=True)
    os._exit(1)


def digest(folder: Path) -> str:
    """A name for the weights in a folder; ValueError for a file that is not whole."""
    (file,) = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    blob = file.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    tensors = json.loads(blob[8 : 8 + length])
    end = max(value["data_offsets"][1] for name, value in tensors.items() if name != "__metadata__")
    if len(blob) != 8 + length + end:
        raise ValueError("SafetensorError: MetadataIncompleteBuffer")
    return hashlib.sha256(blob).hexdigest()


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class Handler(http.server.BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return "trainer"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, code: int, body: dict[str, object]) -> None:
        blob = json.dumps(body).encode()
        with contextlib.suppress(OSError):  # the trainer may be gone
            self.send_response(code)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            self.wfile.write(blob)

    def do_GET(self) -> None:
        if (CONTROL / "deaf").exists():
            time.sleep(3600)
        self.reply(200, {"version": "0.32.0", "data": [{"id": name} for name in WEIGHTS]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        try:
            self.reply(200, self.answer(body))
        except (OSError, ValueError, KeyError) as error:
            self.reply(500, {"error": {"message": f"{type(error).__name__}: {error}"}})

    def answer(self, body: dict) -> dict[str, object]:
        if self.path == "/collective_rpc" and body["method"] == "reload_weights":
            at("load")
            WEIGHTS["base"] = digest(Path(body["kwargs"]["weights_path"]))
        elif self.path == "/v1/load_lora_adapter":
            at("load")
            WEIGHTS[body["lora_name"]] = digest(Path(body["lora_path"]))
        elif self.path == "/v1/unload_lora_adapter":
            del WEIGHTS[body["lora_name"]]
        elif self.path == "/v1/completions":
            at("generate")
            text = WEIGHTS[body["model"]][:8]
            tokens = [4 + byte for byte in text.encode()]
            return {
                "choices": [
                    {"index": index, "token_ids": tokens, "text": text, "finish_reason": "length", "logprobs": None}
                    for index in range(len(body["prompt"]))
                ]
            }
        return {"success": True}


if __name__ == "__main__":
    main()
