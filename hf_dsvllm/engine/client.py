"""Talking to the vLLM process: token ids in, token ids out; weights and adapters by path.  HTTP over a Unix socket.

Every call has a deadline, and every failure is an EngineError that carries the server's own message.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from hf_dsvllm.errors import EngineError

__all__ = ["Completion", "EngineClient"]

PROMPTS_PER_REQUEST = 64  # vLLM caps a request at 1024 prompts from 0.26; 64 to 256 keep it busy and errors cheap
REQUESTS_IN_FLIGHT = 4
RESET_TRIES = 50
RESET_PAUSE_S = 0.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer to prompt number `prompt_index`; `sample_index` counts 0..n-1.

    `token_ids` end with the stop token when `finish_reason` is "stop"; `text` leaves special tokens out.
    `logprobs` are those of the sampled tokens (natural logarithm), None unless asked for.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] | None


class EngineClient:
    """A client of one server; several threads may use it."""

    def __init__(self, uds: Path, default_timeout_s: float = 600.0) -> None:
        """`default_timeout_s` is the deadline of every call that names no other."""
        self.default_timeout_s = default_timeout_s
        self._http = open_http(uds)

    def connect(self, uds: Path) -> None:
        """Talk to the server on another socket from now on (a restarted server has a new one)."""
        self._http.close()
        self._http = open_http(uds)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> bool:
        """Whether the server answers and its engine lives; never raises."""
        try:
            return self._http.get("/health", timeout=5.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def version(self) -> str:
        """vLLM's version."""
        return str(self._call("GET", "/version")["version"])

    def loaded_models(self) -> tuple[str, ...]:
        """The names that can be asked for: the base model and the loaded adapters."""
        return tuple(str(model["id"]) for model in self._call("GET", "/v1/models")["data"])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        model: str,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
        stop_token_ids: Sequence[int],
        top_p: float = 1.0,
        n: int = 1,
        logprobs: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Completion]:
        """Answer every prompt (token ids) `n` times, in the order of the prompts, within `timeout_s` for all together.

        Every sampling field is sent, so that no default of the server or the model decides; besides `stop_token_ids`
        the model's end-of-text token stops.  With a `seed` every prompt gets its own generator seeded alike: an answer
        does not depend on its neighbours; temperature 0 is greedy.
        """
        sampling: dict[str, Any] = {
            "model": model,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": -1,
            "min_p": 0.0,
            "n": n,
            "seed": seed,
            "stop": [],
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": False,
            "min_tokens": 0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": logprobs,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": False,
            "echo": False,
            "stream": False,
            "return_token_ids": True,
        }
        deadline = time.monotonic() + (self.default_timeout_s if timeout_s is None else timeout_s)

        def ask(first: int) -> list[Completion]:
            batch = [list(prompt) for prompt in prompts[first : first + PROMPTS_PER_REQUEST]]
            answer = self._call("POST", "/v1/completions", {**sampling, "prompt": batch}, deadline=deadline)
            return completions_of(answer, first=first, prompts=len(batch), n=n)

        starts = range(0, len(prompts), PROMPTS_PER_REQUEST)
        pool = concurrent.futures.ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="dsvllm-ask")
        futures = [pool.submit(ask, first) for first in starts]
        try:
            return [completion for future in futures for completion in future.result()]
        except Exception:
            pool.shutdown(cancel_futures=True)  # the rest have the same deadline; the next call finds an idle server
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for nobody

    def prompt_logprobs(self, prompt_ids: Sequence[int], model: str, *, timeout_s: float | None = None) -> list[float]:
        """log p(token | tokens before) for every token of the prompt but the first: len(prompt_ids) - 1 numbers."""
        body = {
            "model": model,
            "prompt": list(prompt_ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "stream": False,
        }
        answer = self._call("POST", "/v1/completions", body, timeout_s=timeout_s)
        entries = answer["choices"][0]["prompt_logprobs"]
        return [float(entry[str(token)]["logprob"]) for token, entry in zip(prompt_ids[1:], entries[1:], strict=True)]

    def load_adapter(self, name: str, path: Path) -> None:
        """Load the PEFT adapter folder `path` under a name that is not in use; the folder must stay until unloaded."""
        # Never load_inplace: with it vLLM reads the adapter from disk on every step.
        self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path.absolute())})

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; its folder is not needed afterwards."""
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def reload_weights(self, path: Path) -> None:
        """Replace the base weights by the safetensors in the folder `path`.

        `reset_prefix_cache` has to follow, on CPU `repack_shared_weights` before it; `WeightSync.push` does all that.
        """
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(path.absolute())}}
        self._call("POST", "/collective_rpc", body)

    def repack_shared_weights(self) -> None:
        """On CPU, after `reload_weights`: pack a tied output head again (see inside_vllm/dsvllm_worker.py)."""
        self._call("POST", "/collective_rpc", {"method": "dsvllm_repack_shared_weights"})

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, which belong to the old weights; repeated until the server says it did.

        A server that says nothing (before it reported success) always succeeds while no request runs, as here.
        """
        for _ in range(RESET_TRIES):
            if self._call("POST", "/reset_prefix_cache").get("success", True):
                return
            time.sleep(RESET_PAUSE_S)
        raise EngineError(
            f"vLLM did not reset its prefix cache in {RESET_TRIES} tries, so answers could come from old weights. "
            "Requests that still run block it; stop other users of this server."
        )

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        deadline: float | None = None,
    ) -> dict[str, Any]:
        """One request; the decoded JSON object, or {} for an answer without one."""
        limit_s = self.default_timeout_s if timeout_s is None else timeout_s
        if deadline is not None:
            limit_s = deadline - time.monotonic()
        if limit_s <= 0:
            raise EngineError(
                f"{method} {path} was not sent: its deadline had passed. Raise the timeout or ask for less."
            )
        try:
            response = self._http.request(method, path, json=body, timeout=limit_s)
        except httpx.TimeoutException:
            raise EngineError(
                f"{method} {path} had no answer within {limit_s:.1f} s. Raise the timeout, ask for less, or see the "
                "engine's log in the run folder (engine/vllm-<n>.log)."
            ) from None
        except httpx.HTTPError as error:
            raise EngineError(
                f"{method} {path} failed: {error or type(error).__name__}. The vLLM process is probably gone; its log "
                "in the run folder (engine/vllm-<n>.log) says why."
            ) from None
        if response.status_code != httpx.codes.OK:
            raise EngineError(f"{method} {path}: vLLM answered {response.status_code}: {server_message(response)}")
        try:
            decoded = response.json()
        except ValueError:
            return {}
        return decoded if isinstance(decoded, dict) else {}


def open_http(uds: Path) -> httpx.Client:
    """An HTTP client on a Unix socket; a connection per request, since the server drops idle ones at any moment."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(uds), limits=limits), base_url="http://engine")


def server_message(response: httpx.Response) -> str:
    """The server's own words: its error message if it sent one in the OpenAI or FastAPI form, else the body."""
    try:
        body = response.json()
        error = body.get("error", body)
        message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    return str(message or response.text[:2000] or "(no message)")


def completions_of(answer: dict[str, Any], *, first: int, prompts: int, n: int) -> list[Completion]:
    """The choices of one answer in the order of its prompts; EngineError unless there are prompts x n of them."""
    choices = sorted(answer.get("choices", ()), key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(prompts * n)):
        raise EngineError(f"vLLM sent {len(choices)} answers for {prompts} prompts x {n} samples.")
    return [
        Completion(
            prompt_index=first + choice["index"] // n,
            sample_index=choice["index"] % n,
            token_ids=tuple(choice["token_ids"]),
            text=choice["text"],
            finish_reason=choice["finish_reason"],
            logprobs=tuple(choice["logprobs"]["token_logprobs"]) if choice.get("logprobs") else None,
        )
        for choice in choices
    ]
