"""The talk in the terminal, with a stand-in for the server."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hf_dsvllm.errors import EngineError
from hf_dsvllm.serve.chat import chat


class Server(http.server.ThreadingHTTPServer):
    """Answers with the number of messages it was sent, word by word."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = ["orders"]
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.send_response(200 if body["max_tokens"] < 5000 else 400)
        self.end_headers()
        if body["max_tokens"] >= 5000:
            self.wfile.write(b"max_tokens is too large")
            return
        for word in ("You said ", f"{len(body['messages'])} things", ""):
            event = {"choices": [{"delta": {"content": word}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def say(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    lines = iter(words)
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))


def test_a_talk_remembers_what_was_said_until_it_is_reset(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "Hello", "Again", "/reset", "New", "")
    chat(f"{server.url}/v1", system="Be brief.")
    assert [len(body["messages"]) for body in server.asked] == [2, 4, 2]
    assert server.asked[1]["messages"][2] == {"role": "assistant", "content": "You said 2 things"}
    assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    printed = capsys.readouterr().out
    assert "orders at" in printed
    assert "You said 4 things" in printed


def test_the_choice_between_models_is_the_users(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.models = ["small", "large"]
    with pytest.raises(EngineError, match=r"--model is needed; .* has small, large"):
        chat(server.url)
    with pytest.raises(EngineError, match="--model medium is not there"):
        chat(server.url, model="medium")
    say(monkeypatch, "Hello", "")
    chat(server.url, model="large")
    assert server.asked[0]["model"] == "large"


def test_what_goes_wrong_is_said_with_its_fix(server: Server, monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    say(monkeypatch, "Hello")
    with pytest.raises(EngineError, match=r"refused the question \(400\): max_tokens is too large"):
        chat(server.url, max_tokens=9000)
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(EngineError, match="export VLLM_API_KEY"):
        chat(server.url)
    with pytest.raises(EngineError, match="hf-dsvllm serve PATH"):
        chat(f"127.0.0.1:{free_port}")


@pytest.mark.parametrize("url", ["http://127.0.0.1:80a", "127.0.0.1:80a", "http://[::1", "http://a\x01b"])
def test_what_is_no_address_is_one_error(url: str) -> None:
    with pytest.raises(EngineError, match=r"is no address of a server: .*http://127.0.0.1:8000"):
        chat(url)


def test_the_name_of_a_host_that_python_refuses_is_one_error() -> None:
    with pytest.raises(EngineError, match=r"Nothing answers at http://two\.\.dots"):
        chat("http://two..dots")
