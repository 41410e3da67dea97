"""Pushing an export, with a stand-in for the hub on loopback: what arrives, and what a failure says."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

PUSH = """
import sys
from pathlib import Path
from hf_dsvllm.export.hub import push_to_hub
print(push_to_hub(Path(sys.argv[1]), "me/orders", token="hf_x"))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Answers the four calls of an upload and keeps what they bring."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: dict[str, object] = {}
        self.files: dict[str, bytes] = {}
        self.full = False


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer({"id": "me/orders", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert self.headers["Authorization"] == "Bearer hf_x"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer({"url": f"{self.address}/me/orders", "id": "me/orders"})
        elif "/preupload/" in self.path:
            wanted = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                      for file in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": wanted})
        elif "/commit/" in self.path and self.server.full:
            self.answer({"error": "Storage quota exceeded"}, status=403)
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.address}/me/orders/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer({})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "orders"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(200)))
    return folder


def push(export: Path, hub: Hub) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads its settings once, at import."""
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(export)], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_every_file_arrives_in_a_private_repository(export: Path, hub: Hub) -> None:
    done = push(export, hub)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("/me/orders")
    assert (hub.created["name"], hub.created["organization"]) == ("orders", "me")
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"  # two ages of the client
    assert hub.files == {file.name: file.read_bytes() for file in export.iterdir()}


def test_a_refused_push_says_that_the_export_stands_and_how_to_repeat_it(export: Path, hub: Hub) -> None:
    hub.full = True
    done = push(export, hub)
    assert done.returncode == 1
    assert "Storage quota exceeded" in done.stderr
    assert f"hf upload me/orders {export}" in done.stderr
