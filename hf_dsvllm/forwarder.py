"""A door to the engine for other programs: loopback HTTP with a key in front, the engine's Unix socket behind.

lm-evaluation-harness asks through one that lives as long as its run, a user's own OpenAI client through the one of
`--gen_eval_expose`.  Three routes lead through it and no other: nobody can load weights, or put the engine to sleep.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import httpx

from hf_dsvllm.engine.client import key_header
from hf_dsvllm.errors import EngineError

__all__ = ["API_KEY", "MODEL", "Forwarder", "expose_key"]

MODEL = "training"  # the one name, whatever adapter the weights of this step are called in the engine
API_KEY = "HF_DSVLLM_EXPOSE_API_KEY"
ASKED = ("/v1/completions", "/v1/chat/completions")
LISTED = "/v1/models"
RETRY_AFTER_S = 5
DRAIN_S = 10.0  # for answers under way before weights are swapped; then they are broken off
READ_S = 600.0
START_S = 10.0
KEY_BYTES = 24


def expose_key(run_dir: Path) -> tuple[str, str]:
    """The key of `--gen_eval_expose` and where its user finds it: in the environment, or in a file of mode 0600."""
    given = os.environ.get(API_KEY)
    if given:
        return given, f"the key is that of {API_KEY}"
    file = run_dir / "engine" / "expose.key"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # an old one may be readable by others
    key = secrets.token_urlsafe(KEY_BYTES)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as handle:
        handle.write(key)
    return key, f"the key is in {file}"


class Forwarder:
    """An HTTP server on a thread of its own; shut (503) until `resume` says which model stands behind it."""

    def __init__(self, *, key: str, port: int = 0) -> None:
        """Listen on 127.0.0.1:`port` (0: any free one).  Raises EngineError for a port that is taken."""
        import uvicorn

        self._listener = listen(port)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._key = key
        self._why = "the engine is not ready yet"
        self._engine: tuple[str, httpx.AsyncClient] | None = None
        self._answering: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        # Without log_config the root logger is left alone; requests come and go in silence.
        config = uvicorn.Config(
            self._app, interface="asgi3", log_config=None, log_level="critical", access_log=False, lifespan="off",
            ws="none", timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="dsvllm-forwarder", daemon=True)
        self._thread.start()

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, model: str, address: Path | str) -> None:
        """Answer from now on with `model` of the engine on a Unix socket, or at a URL."""
        self._run(self._open(model, address))

    def pause(self, why: str) -> None:
        """Answer 503 with `why` from now on; returns when no request is under way any more (`DRAIN_S` at most)."""
        self._run(self._shut(why))

    def close(self) -> None:
        """End the server and free the port; safe to call twice."""
        if not self._thread.is_alive():
            return
        self._run(self._shut("training has ended", wait_s=0))
        self._server.should_exit = True
        self._thread.join(START_S)
        self._listener.close()

    # -- in its thread ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._server.serve(sockets=[self._listener]))
        finally:
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(DRAIN_S + START_S)

    async def _open(self, model: str, address: Path | str) -> None:
        await self._forget()
        # A connection per request: the engine drops idle ones at any moment.
        limits = httpx.Limits(max_keepalive_connections=0, max_connections=None)
        if isinstance(address, Path):
            transport = httpx.AsyncHTTPTransport(uds=str(address), limits=limits)
            http = httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=READ_S)
        else:
            http = httpx.AsyncClient(base_url=address, headers=key_header(), limits=limits, timeout=READ_S)
        self._engine = (model, http)

    async def _shut(self, why: str, wait_s: float = DRAIN_S) -> None:
        self._why = why
        engine, self._engine = self._engine, None
        left = {task for task in self._answering if not task.done()}
        if left:
            _, left = await asyncio.wait(left, timeout=wait_s)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1.0)
        if engine is not None:
            await engine[1].aclose()

    async def _forget(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine[1].aclose()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request

        if scope["type"] != "http":
            return
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            response = await self._answer(Request(scope, receive))
            await response(scope, receive, send)
        finally:
            self._answering.discard(task)

    async def _answer(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        given = request.headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, f"Bearer {self._key}".encode()):
            return refusal(401, "the API key is missing or wrong")
        path, method = request.url.path, request.method
        if path == LISTED and method == "GET":
            entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": "hf-dsvllm"}
            return JSONResponse({"object": "list", "data": [entry]})
        if path not in ASKED or method != "POST":
            return refusal(404, f"{method} {path} leads nowhere; there are GET {LISTED} and POST {', '.join(ASKED)}")
        try:
            body = json.loads(await request.body())
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return refusal(400, "the body is no JSON object")
        if body.get("model", MODEL) != MODEL:
            return refusal(404, f"there is no model {body['model']!r}; its name is {MODEL!r}")
        if self._engine is None:
            return refusal(503, self._why)
        return await forward(*self._engine, path, body)


async def forward(model: str, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    """The engine's answer to `body`, its model called by our name; as a stream where it is one."""
    from starlette.responses import Response, StreamingResponse

    try:
        request = http.build_request("POST", path, json={**body, "model": model})
        answer = await http.send(request, stream=True)
        kind = answer.headers.get("content-type", "application/json")
        if kind.startswith("text/event-stream"):
            return StreamingResponse(renamed_events(answer), media_type=kind)
        try:
            content = await answer.aread()
        finally:
            await answer.aclose()
    except httpx.HTTPError as error:
        return refusal(503, f"the engine does not answer ({type(error).__name__}); it may be restarting")
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        return refusal(503, "broken off: new weights are on their way")
    return Response(renamed(content), status_code=answer.status_code, media_type=kind)


async def renamed_events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of an event stream."""
    try:
        async for line in answer.aiter_lines():
            head, found, data = line.partition("data: {")
            yield (f"data: {renamed(('{' + data).encode()).decode()}" if found and not head else line).encode() + b"\n"
    finally:
        await answer.aclose()


def renamed(content: bytes) -> bytes:
    """A JSON object that names its model, with our name for it; anything else as it is."""
    try:
        value = json.loads(content)
    except ValueError:
        return content
    if not isinstance(value, dict) or "model" not in value:
        return content
    return json.dumps(value | {"model": MODEL}, ensure_ascii=False).encode()


def refusal(status: int, message: str) -> Any:
    """An error in OpenAI's form; 503 says when to come again."""
    from starlette.responses import JSONResponse

    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == httpx.codes.SERVICE_UNAVAILABLE else None
    error = {"message": f"hf-dsvllm: {message}", "type": "hf_dsvllm", "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def listen(port: int) -> socket.socket:
    """A listening socket on loopback."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise EngineError(
            f"port {port} of 127.0.0.1 cannot be had ({error}); name another one, or 0 for any."
        ) from None
    return listener
