"""The client against a small HTTP server on a Unix socket: batches, order, deadlines, the server's own words."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm.engine import EngineClient
from hf_dsvllm.engine.server import new_socket_folder
from hf_dsvllm.errors import EngineError

Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


class Fake:
    """What the server was asked, and how it answers."""

    def __init__(self, uds: Path) -> None:
        self.uds = uds
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Answer = lambda path, body: (404, {"error": {"message": "not set"}})


class Handler(BaseHTTPRequestHandler):
    fake: Fake

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.fake.asked.append((self.path, body))
        self.fake.headers.append(dict(self.headers.items()))
        code, answer = self.fake.answer(self.path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        with contextlib.suppress(BrokenPipeError):  # the client's deadline passed
            self.end_headers()
            self.wfile.write(data)

    do_GET = do_POST


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def fake() -> Iterator[Fake]:
    folder = new_socket_folder()
    fake = Fake(folder / "s")
    server = Server(str(fake.uds), type("Bound", (Handler,), {"fake": fake}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()
    fake.uds.unlink()
    folder.rmdir()


@pytest.fixture
def client(fake: Fake) -> Iterator[EngineClient]:
    client = EngineClient(fake.uds, default_timeout_s=30.0)
    yield client
    client.close()


def echo(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Answer each prompt with its own tokens, choices in reverse order."""
    prompts = [prompt for prompt in body["prompt"] for _ in range(body["n"])]
    choices = [
        {"index": index, "token_ids": prompt, "text": str(prompt), "finish_reason": "stop", "logprobs": None}
        for index, prompt in enumerate(prompts)
    ]
    return 200, {"choices": choices[::-1]}


def generate(client: EngineClient, prompts: list[list[int]], **changes: Any) -> list[Any]:
    settings: dict[str, Any] = {"model": "base", "max_new_tokens": 5, "temperature": 0.0, "seed": 1}
    return client.generate(prompts, stop_token_ids=[2], **(settings | changes))


def test_prompts_are_split_into_requests_and_answers_keep_their_order(fake: Fake, client: EngineClient) -> None:
    fake.answer = echo
    prompts = [[number, number + 1] for number in range(300)]
    answers = generate(client, prompts, n=2)
    assert [(one.prompt_index, one.sample_index) for one in answers] == [(i, j) for i in range(300) for j in (0, 1)]
    assert [list(one.token_ids) for one in answers] == [prompt for prompt in prompts for _ in (0, 1)]
    assert sorted(len(body["prompt"]) for _, body in fake.asked) == [44, 64, 64, 64, 64]


def test_every_sampling_field_is_sent(fake: Fake, client: EngineClient) -> None:
    fake.answer = echo
    generate(client, [[1]], temperature=0.7, top_p=0.9)
    _, body = fake.asked[0]
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 1}
    expected |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "max_tokens": 5, "stop_token_ids": [2]}
    assert expected.items() <= body.items()


def test_no_prompts_need_no_request(fake: Fake, client: EngineClient) -> None:
    assert generate(client, []) == []
    assert fake.asked == []


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"message": "no such model"}},
        {"detail": "no such model"},
        b"no such model",
        {"message": "no such model"},
    ],
)
def test_an_error_carries_the_servers_own_message(fake: Fake, client: EngineClient, answer: Any) -> None:
    fake.answer = lambda path, body: (404, answer)
    with pytest.raises(EngineError, match=r"/v1/completions: vLLM answered 404: no such model"):
        generate(client, [[1]])


def test_missing_answers_are_an_error(fake: Fake, client: EngineClient) -> None:
    fake.answer = lambda path, body: (200, {"choices": echo(path, body)[1]["choices"][1:]})
    with pytest.raises(EngineError, match="sent 2 answers for 3 prompts x 1 samples"):
        generate(client, [[1], [2], [3]])


def test_a_call_past_its_deadline_is_an_error(fake: Fake, client: EngineClient) -> None:
    release = threading.Event()

    def late(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        release.wait(30.0)
        return 200, {}

    fake.answer = late
    try:
        with pytest.raises(EngineError, match=r"no answer within|deadline had passed"):
            generate(client, [[1]] * 1000, timeout_s=0.2)
    finally:
        release.set()


def test_a_server_that_is_gone_is_an_error_and_not_healthy(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "absent")
    assert not client.health()
    with pytest.raises(EngineError, match="vLLM process is probably gone"):
        client.version()


def test_the_prefix_cache_is_reset_until_the_server_says_so(fake: Fake, client: EngineClient) -> None:
    fake.answer = lambda path, body: (200, {"success": len(fake.asked) >= 3})
    client.reset_prefix_cache()
    assert [path for path, _ in fake.asked] == ["/reset_prefix_cache"] * 3


def test_of_several_copies_each_is_told_to_reset_whatever_runs(fake: Fake, client: EngineClient) -> None:
    fake.answer = lambda path, body: (200, {"success": True})
    client.reset_prefix_cache(copies=2)
    assert [path for path, _ in fake.asked] == ["/reset_prefix_cache?reset_running_requests=true"]


def test_a_copy_can_be_asked_by_itself(fake: Fake, client: EngineClient) -> None:
    answer = {"choices": [{"prompt_logprobs": [None, {"7": {"logprob": -1.5}}]}]}
    fake.answer = lambda path, body: (200, answer)
    assert client.prompt_logprobs([5, 7], "base", copy=1) == client.prompt_logprobs([5, 7], "base") == [-1.5]
    assert [headers.get("X-data-parallel-rank") for headers in fake.headers] == ["1", None]


def test_a_server_that_reports_no_success_is_asked_once(fake: Fake, client: EngineClient) -> None:
    fake.answer = lambda path, body: (200, b"")
    client.reset_prefix_cache()
    assert len(fake.asked) == 1


def test_a_prefix_cache_that_is_never_reset_is_an_error(
    fake: Fake, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_dsvllm.engine.client.RESET_PAUSE_S", 0.0)
    fake.answer = lambda path, body: (200, {"success": False})
    with pytest.raises(EngineError, match="did not reset its prefix cache"):
        client.reset_prefix_cache()


def test_an_adapter_is_never_loaded_in_place(fake: Fake, client: EngineClient, tmp_path: Path) -> None:
    fake.answer = lambda path, body: (200, b"Success")
    client.load_adapter("step-1-1", tmp_path)
    assert fake.asked == [("/v1/load_lora_adapter", {"lora_name": "step-1-1", "lora_path": str(tmp_path)})]
