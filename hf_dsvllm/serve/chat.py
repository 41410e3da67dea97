"""A talk in the terminal with a model behind any OpenAI-compatible address."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

import httpx
from rich.console import Console

from hf_dsvllm.errors import EngineError

__all__ = ["answer", "chat", "choose_model"]

Message = dict[str, str]
CONNECT_S = 10.0
HELP = "an empty line or Ctrl-D ends it, /reset forgets what was said"


def chat(
    url: str, *, model: str | None = None, system: str | None = None, max_tokens: int = 1024, temperature: float = 0.7
) -> None:
    """Read questions from the terminal and print the answers as they come, until an empty line or the end of input.

    The key is taken from VLLM_API_KEY.  Raises EngineError if the server cannot be reached or refuses.
    """
    console = Console(highlight=False)
    with _client(url) as client:
        name = choose_model(client, model)
        console.print(f"{name} at {client.base_url}; {HELP}", markup=False, style="dim")
        opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        messages = list(opening)
        while True:
            try:
                question = console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not question:
                return
            if question == "/reset":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": question})
            said = ""
            try:
                for piece in answer(client, name, messages, max_tokens=max_tokens, temperature=temperature):
                    said += piece
                    console.print(piece, end="", markup=False)
            except KeyboardInterrupt:
                said += " …"
            console.print()
            messages.append({"role": "assistant", "content": said})


def answer(
    client: httpx.Client, model: str, messages: Sequence[Message], *, max_tokens: int, temperature: float
) -> Iterator[str]:
    """The pieces of one answer, streamed as server-sent events."""
    body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
    try:
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            if not response.is_success:
                response.read()
                raise EngineError(f"The server refused the question ({response.status_code}): {response.text[:500]}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                    yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise EngineError(f"{client.base_url} broke off: {error}. Is the server still running?") from error


def choose_model(client: httpx.Client, wanted: str | None) -> str:
    """`wanted`, or the only model there; EngineError with their names if there is a choice."""
    try:
        response = client.get("/v1/models")
    except (httpx.HTTPError, UnicodeError) as error:  # httpx leaves it to Python to refuse some names of hosts
        raise EngineError(f"Nothing answers at {client.base_url}: {error}. Start it: hf-dsvllm serve PATH.") from error
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise EngineError(f"{client.base_url} wants a key: export VLLM_API_KEY=...")
    if not response.is_success:
        raise EngineError(
            f"{client.base_url}/v1/models answers {response.status_code}: is it an OpenAI-compatible server?"
        )
    names = [str(model["id"]) for model in response.json()["data"]]
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return str(wanted)
    asked = "--model is needed" if wanted is None else f"--model {wanted} is not there"
    raise EngineError(f"{asked}; {client.base_url} has {', '.join(names) or 'no model'}.")


def _client(url: str) -> httpx.Client:
    address = url if "://" in url else f"http://{url}"
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = address.rstrip("/").removesuffix("/v1")
    try:
        return httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_S))
    except (httpx.InvalidURL, UnicodeError) as error:
        raise EngineError(f"{url} is no address of a server: {error}. Give one like http://127.0.0.1:8000.") from error
