"""The door to the engine: a key, three routes, one name, shut while weights are swapped."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import stat
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from hf_dsvllm import forwarder as module
from hf_dsvllm.engine.server import new_socket_folder
from hf_dsvllm.errors import EngineError
from hf_dsvllm.forwarder import API_KEY, Forwarder, expose_key

BODY = {"model": "training", "prompt": "x"}


class Engine:
    """What the engine behind the door was asked, and how it answers."""

    def __init__(self, uds: Path) -> None:
        self.uds = uds
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, str, bytes]] = lambda body: (
            200,
            "application/json",
            json.dumps({"model": body["model"], "choices": [1]}).encode(),
        )


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.engine.asked.append((self.path, body))
        self.engine.headers.append({name.lower(): value for name, value in self.headers.items()})
        code, kind, data = self.engine.answer(body)
        with contextlib.suppress(BrokenPipeError):
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def engine() -> Iterator[Engine]:
    folder = new_socket_folder()
    engine = Engine(folder / "s")
    server = Server(str(engine.uds), type("Bound", (Handler,), {"engine": engine}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield engine
    server.shutdown()
    thread.join()
    server.server_close()
    engine.uds.unlink()
    folder.rmdir()


@pytest.fixture
def door() -> Iterator[Forwarder]:
    with Forwarder(key="secret") as door:
        yield door


def post(door: Forwarder, path: str = "/completions", body: Any = BODY, key: str = "secret") -> httpx.Response:
    return httpx.post(door.url + path, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30.0)


def test_a_request_reaches_the_engine_under_the_name_its_weights_have_now(door: Forwarder, engine: Engine) -> None:
    door.resume("step-40-3", engine.uds)
    answer = post(door)
    assert answer.json() == {"model": "training", "choices": [1]}
    assert engine.asked == [("/v1/completions", {"model": "step-40-3", "prompt": "x"})]
    assert "authorization" not in engine.headers[0]
    door.resume("step-50-4", engine.uds)
    post(door, body={"prompt": "no model named"})
    assert engine.asked[-1][1]["model"] == "step-50-4"


def test_a_remote_engine_is_asked_at_its_address_with_its_own_key(
    door: Forwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DSVLLM_API_KEY", "of the remote one")
    engine = Engine(Path())
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"engine": engine})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        door.resume("base", f"http://127.0.0.1:{server.server_address[1]}")
        assert post(door).json()["model"] == "training"
        server.shutdown()
        thread.join()
    assert [headers["authorization"] for headers in engine.headers] == ["Bearer of the remote one"]


def test_the_list_of_models_holds_one_name_and_needs_no_engine(door: Forwarder) -> None:
    answer = httpx.get(door.url + "/models", headers={"Authorization": "Bearer secret"})
    assert [model["id"] for model in answer.json()["data"]] == ["training"]


@pytest.mark.parametrize("key", ["", "wrong", "secre", "secretsecret", "sécret"])
def test_without_the_key_nothing_is_told(door: Forwarder, engine: Engine, key: str) -> None:
    door.resume("m", engine.uds)
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    assert httpx.get(door.url + "/models", headers=headers).status_code == 401
    assert httpx.post(door.url + "/completions", json=BODY, headers=headers).status_code == 401
    assert engine.asked == []


@pytest.mark.parametrize(
    "path", ["/load_lora_adapter", "/unload_lora_adapter", "/../collective_rpc", "/../sleep", "/completions/", "//x"]
)
def test_no_route_leads_to_weights_or_sleep(door: Forwarder, engine: Engine, path: str) -> None:
    door.resume("m", engine.uds)
    assert post(door, path).status_code == 404
    assert engine.asked == []


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [({"model": "step-40-3"}, 404, "its name is 'training'"), ([1], 400, "no JSON object")],
)
def test_what_cannot_be_answered_is_refused_in_openais_form(
    door: Forwarder, engine: Engine, body: Any, status: int, words: str
) -> None:
    door.resume("m", engine.uds)
    answer = post(door, body=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_door_that_is_shut_says_why_and_when_to_come_again(door: Forwarder, engine: Engine) -> None:
    assert post(door).status_code == 503
    door.resume("m", engine.uds)
    door.pause("the weights of step 50 are on their way")
    answer = post(door)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert "the weights of step 50 are on their way" in answer.json()["error"]["message"]
    assert engine.asked == []


def test_shutting_waits_for_an_answer_under_way(door: Forwarder, engine: Engine) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def slow(body: dict[str, Any]) -> tuple[int, str, bytes]:
        arrived.set()
        assert go_on.wait(20)
        return 200, "application/json", b'{"model": "m"}'

    engine.answer = slow
    door.resume("m", engine.uds)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(post(door)))
    asking.start()
    assert arrived.wait(20)
    pausing = threading.Thread(target=lambda: door.pause("later"))
    pausing.start()
    while post(door).status_code != 503:  # shut at once for those who come now
        pass
    assert pausing.is_alive()
    go_on.set()
    pausing.join(20)
    asking.join(20)
    assert [answer.status_code for answer in answers] == [200]


def test_an_answer_that_takes_too_long_is_broken_off(
    door: Forwarder, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def slow(body: dict[str, Any]) -> tuple[int, str, bytes]:
        arrived.set()
        assert go_on.wait(20)
        return 200, "application/json", b"{}"

    engine.answer = slow
    monkeypatch.setattr(module.Forwarder._shut, "__defaults__", (0.05,))
    door.resume("m", engine.uds)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(post(door)))
    asking.start()
    assert arrived.wait(20)
    door.pause("later")
    asking.join(20)
    go_on.set()
    assert [answer.status_code for answer in answers] == [503]
    assert "broken off" in answers[0].json()["error"]["message"]


def test_a_stream_is_passed_on_event_by_event_under_our_name(door: Forwarder, engine: Engine) -> None:
    events = [{"model": "step-1", "text": "a\u2028b"}, {"model": "step-1", "text": "c"}]
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    engine.answer = lambda body: (200, "text/event-stream; charset=utf-8", data)
    door.resume("step-1", engine.uds)
    text = post(door, "/chat/completions").text
    assert [json.loads(part[6:]) for part in text.split("\n\n")[:2]] == [
        event | {"model": "training"} for event in events
    ]
    assert text.endswith("data: [DONE]\n\n")


def test_the_engines_own_refusal_is_passed_on(door: Forwarder, engine: Engine) -> None:
    engine.answer = lambda body: (400, "application/json", b'{"error": {"message": "prompt too long"}}')
    door.resume("m", engine.uds)
    answer = post(door)
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "prompt too long"}})


def test_an_engine_that_is_gone_is_a_503(door: Forwarder, tmp_path: Path) -> None:
    door.resume("m", tmp_path / "nobody")
    assert post(door).status_code == 503


def test_closing_frees_the_port_and_may_happen_twice(free_port: int) -> None:
    door = Forwarder(key="k", port=free_port)
    assert door.url == f"http://127.0.0.1:{free_port}/v1"
    door.close()
    door.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 cannot be had"):
            Forwarder(key="k", port=port)
    with pytest.raises(EngineError, match="cannot be had"):
        Forwarder(key="k", port=70000)


def test_the_key_is_in_the_environment_or_in_a_file_of_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    file = tmp_path / "engine" / "expose.key"
    file.write_text("an old one, readable by all")
    key, where = expose_key(tmp_path)
    assert file.read_text() == key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert str(file) in where
    assert expose_key(tmp_path)[0] != key
    monkeypatch.setenv(API_KEY, "mine")
    assert expose_key(tmp_path) == ("mine", f"the key is that of {API_KEY}")
