"""Talking to the vLLM process: token ids in, token ids out; weights by path or handle; sleep.  HTTP over a Unix socket,
or over the network to a server that somebody else runs.

Every call has a deadline, and every failure is an EngineError that carries the server's own message.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from hf_dsvllm.errors import EngineError

__all__ = ["API_KEY_VARIABLE", "PROMPTS_IN_FLIGHT", "Completion", "EngineClient", "EngineRefusal", "key_header"]

PROMPTS_PER_REQUEST = 64  # vLLM caps a request at 1024 prompts from 0.26; 64 to 256 keep it busy and errors cheap
# As many as vLLM answers at a time on a large GPU.  Four gave 70 % of the speed of all 512 prompts at once (8B in eager
# mode, one H200, vLLM 0.26): a request's short answers wait for its long ones.
REQUESTS_IN_FLIGHT = 16
PROMPTS_IN_FLIGHT = PROMPTS_PER_REQUEST * REQUESTS_IN_FLIGHT
COPY_HEADER = "X-data-parallel-rank"  # vLLM: which copy of a data-parallel engine answers
RESET_TRIES = 50
RESET_PAUSE_S = 0.1
API_KEY_VARIABLE = "HF_DSVLLM_API_KEY"  # of a server at a URL; our own listens on a socket only we can enter


class EngineRefusal(EngineError):
    """The server answered, with an HTTP error: it lives, and doing the same again will not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


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

    def __init__(self, address: Path | str, default_timeout_s: float = 600.0) -> None:
        """`address` is a Unix socket, or an http(s) URL; `default_timeout_s` bounds every call that names no other."""
        self.default_timeout_s = default_timeout_s
        self._deadline = math.inf
        self._http = open_http(address)

    def connect(self, address: Path | str) -> None:
        """Talk to the server at another address from now on (a restarted server has a new socket)."""
        self._http.close()
        self._http = open_http(address)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @contextlib.contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """No call in the block outlives `deadline`, by time.monotonic, whatever timeout it has."""
        before, self._deadline = self._deadline, deadline
        try:
            yield
        finally:
            self._deadline = before

    def health(self) -> bool:
        """Whether the server answers and its engine lives; never raises."""
        try:
            return self._http.get("/health", timeout=5.0).status_code == httpx.codes.OK
        except (httpx.HTTPError, RuntimeError):  # RuntimeError: closed meanwhile
            return False

    def version(self) -> str:
        """vLLM's version."""
        return str(self._call("GET", "/version")["version"])

    def routes(self) -> frozenset[str]:
        """The paths the server serves, by its own description; EngineRefusal from one that keeps it to itself."""
        return frozenset(self._call("GET", "/openapi.json").get("paths", {}))

    def world_size(self, *, of_one_copy: bool = False) -> int:
        """How many workers (GPUs) the server has: tensor x pipeline parallel, times the copies (data parallel)."""
        path = "/get_world_size?include_dp=false" if of_one_copy else "/get_world_size"
        return int(self._call("GET", path)["world_size"])

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
        stop: Sequence[str] = (),
        top_p: float = 1.0,
        n: int = 1,
        logprobs: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Completion]:
        """Answer every prompt (token ids) `n` times, in the order of the prompts, within `timeout_s` for all together.

        `stop` strings end an answer too, and its `text`; its `token_ids` hold them.
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
            "stop": list(stop),
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

    def prompt_logprobs(
        self, prompt_ids: Sequence[int], model: str, *, copy: int | None = None, timeout_s: float | None = None
    ) -> list[float]:
        """log p(token | tokens before) for every token of the prompt but the first: len(prompt_ids) - 1 numbers.

        `copy` names the copy of the engine that is asked (data parallel); None: whichever is free.
        """
        body = {
            "model": model,
            "prompt": list(prompt_ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "stream": False,
        }
        headers = {} if copy is None else {COPY_HEADER: str(copy)}
        answer = self._call("POST", "/v1/completions", body, timeout_s=timeout_s, headers=headers)
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

    def reset_prefix_cache(self, *, copies: int = 1) -> None:
        """Forget cached prefixes, which belong to the old weights; repeated until the server says it did.

        A server that says nothing (before it reported success) always succeeds while no request runs, as here.  Of
        several copies of an engine only the first one's word is passed on, so each is told to let requests that still
        run begin anew: then it cannot but succeed, or fail aloud.
        """
        path = "/reset_prefix_cache" if copies == 1 else "/reset_prefix_cache?reset_running_requests=true"
        for _ in range(RESET_TRIES):
            if self._call("POST", path).get("success", True):
                return
            time.sleep(RESET_PAUSE_S)
        raise EngineError(
            f"vLLM did not reset its prefix cache in {RESET_TRIES} tries, so answers could come from old weights. "
            "Requests that still run block it; stop other users of this server."
        )

    def sleep(self, level: int, *, timeout_s: float | None = None) -> None:
        """Free the GPU: level 1 keeps the weights in host memory, level 2 throws them away; the cache goes either way.

        Nothing else on the device may allocate meanwhile: vLLM asserts that free memory grew.
        """
        self._call("POST", f"/sleep?level={level}", {}, timeout_s=timeout_s)

    def wake_up(self, tags: Sequence[str] = (), *, timeout_s: float | None = None) -> None:
        """Take the memory back: `tags` "weights" and "kv_cache" by themselves, everything without tags."""
        query = "&".join(f"tags={tag}" for tag in tags)
        self._call("POST", f"/wake_up?{query}" if query else "/wake_up", {}, timeout_s=timeout_s)

    def is_sleeping(self) -> bool:
        """Whether anything of the engine is still asleep (/health does not show it)."""
        return bool(self._call("GET", "/is_sleeping")["is_sleeping"])

    def pause(self, *, timeout_s: float | None = None) -> None:
        """Let running requests end and hold new ones back, so that none meets half-written weights."""
        self._call("POST", "/pause?mode=wait", {}, timeout_s=timeout_s)

    def resume(self, *, timeout_s: float | None = None) -> None:
        """Answer requests again."""
        self._call("POST", "/resume", {}, timeout_s=timeout_s)

    def init_weight_transfer(self, init_info: Mapping[str, Any], *, timeout_s: float | None = None) -> None:
        """Connect the workers to the sender; with NCCL it returns when both ends have met."""
        self._call("POST", "/init_weight_transfer_engine", {"init_info": dict(init_info)}, timeout_s=timeout_s)

    def start_weight_update(self, *, timeout_s: float | None = None) -> None:
        """From here to `finish_weight_update` parameters are being replaced: a failure between leaves none whole."""
        # Up to 0.25 the body is read (and must be JSON), later it is ignored.
        self._call("POST", "/start_weight_update", {"is_checkpoint_format": True}, timeout_s=timeout_s)

    def update_weights(self, update_info: Mapping[str, Any], *, timeout_s: float | None = None) -> None:
        """Have the workers take the tensors that `update_info` describes (see `engine.bodies`)."""
        self._call("POST", "/update_weights", {"update_info": dict(update_info)}, timeout_s=timeout_s)

    def finish_weight_update(self, *, timeout_s: float | None = None) -> None:
        """All tensors are there: post-process what waited for them."""
        self._call("POST", "/finish_weight_update", {}, timeout_s=timeout_s)

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        deadline: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """One request; the decoded JSON object, or {} for an answer without one."""
        limit_s = self.default_timeout_s if timeout_s is None else timeout_s
        if deadline is not None:
            limit_s = deadline - time.monotonic()
        limit_s = min(limit_s, self._deadline - time.monotonic())
        if limit_s <= 0:
            raise EngineError(
                f"{method} {path} was not sent: its deadline had passed. Raise the timeout or ask for less."
            )
        try:
            response = self._http.request(method, path, json=body, timeout=limit_s, headers=dict(headers or {}))
        except httpx.TimeoutException:
            raise EngineError(
                f"{method} {path} had no answer within {limit_s:.1f} s. Raise the timeout, ask for less, or see the "
                "engine's log in the run folder (engine/vllm-<n>.log)."
            ) from None
        except RuntimeError:
            if not self._http.is_closed:
                raise
            raise EngineError(f"{method} {path} was not sent: evaluation has ended and the client is closed.") from None
        except httpx.HTTPError as error:
            raise EngineError(
                f"{method} {path} failed: {error or type(error).__name__}. The vLLM process is probably gone; its log "
                "in the run folder (engine/vllm-<n>.log) says why."
            ) from None
        if response.status_code != httpx.codes.OK:
            message = f"{method} {path}: vLLM answered {response.status_code}: {server_message(response)}"
            raise EngineRefusal(message, response.status_code)
        try:
            decoded = response.json()
        except ValueError:
            return {}
        return decoded if isinstance(decoded, dict) else {}


def open_http(address: Path | str) -> httpx.Client:
    """An HTTP client; a connection per request, since the server drops idle ones at any moment.

    A URL gets the key in HF_DSVLLM_API_KEY, which thus stands in no command line and no file of the run.
    """
    limits = httpx.Limits(max_keepalive_connections=0)
    if isinstance(address, Path):
        # A Unix socket has no TLS, whose context would take 30 ms to make.
        transport = httpx.HTTPTransport(uds=str(address), limits=limits, verify=False)
        return httpx.Client(transport=transport, base_url="http://engine")
    return httpx.Client(base_url=address.rstrip("/"), headers=key_header(), limits=limits, follow_redirects=False)


def key_header() -> dict[str, str]:
    """The header with the key of a server at a URL; empty where the environment has none."""
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


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
