"""An export or an adapter -> the right vLLM command line, run in the foreground until Ctrl-C.

Runs under the same supervisor as the engine beside a training run, so nothing is left behind however this process ends.
The development endpoints and runtime adapter loading, which change weights without a key, stay off here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import ipaddress
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx

from hf_dsvllm.engine import supervisor
from hf_dsvllm.engine.registry import record_path
from hf_dsvllm.engine.server import (
    API_SERVER,
    FORKING_API_SERVER,
    SCRUBBED,
    SCRUBBED_PREFIXES,
    find_vllm,
    lora_rank_bound,
)
from hf_dsvllm.errors import EngineError
from hf_dsvllm.source import find_record, has_chat_template

__all__ = ["curl_command", "detect_device", "detect_port_free", "serve", "vllm_command", "vllm_environment"]

Device = Literal["cuda", "cpu"]
READY_S = 1800.0  # a 70B model read from a network disk takes a quarter of an hour
POLL_S = 0.5
PORTS_TRIED = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """What a path turns out to be: a model folder, or a base with one adapter on it."""

    model: str
    adapter: Path | None
    rank: int | None
    tokenizer: Path | None
    chat: bool


def serve(
    path: Path,
    *,
    python: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_model_len: int | None = None,
    device: Device | None = None,
    extra: Sequence[str] = (),
    print_only: bool = False,
    ready_timeout_s: float = READY_S,
) -> int:
    """Serve an export or adapter folder over vLLM's OpenAI API until SIGINT or SIGTERM; returns an exit code.

    `python` is the interpreter that has vLLM (default: this one), `device` is found out if not given, `extra` goes to
    vLLM as it is.  Prints a curl command once the model answers.  With `print_only` the plain command is printed and
    nothing started.  Raises EngineError before vLLM starts for a taken port, a public address without VLLM_API_KEY, or
    a folder vLLM cannot serve, and if vLLM fails to start.
    """
    chosen = device or detect_device()
    served_name = name or path.absolute().name
    interpreter = Path(sys.executable) if python is None else python
    line = vllm_command(
        path,
        python=interpreter,
        host=host,
        port=port,
        name=served_name,
        max_model_len=max_model_len,
        device=chosen,
        extra=extra,
    )
    env = vllm_environment(os.environ, device=chosen)
    if print_only:
        added = {key: value for key, value in env.items() if os.environ.get(key) != value and key.startswith("VLLM_")}
        print(" ".join([*(f"{key}={shlex.quote(value)}" for key, value in sorted(added.items())), shlex.join(line)]))
        return 0
    _check_address(host, port, env, extra)
    find_vllm(interpreter, device=chosen)
    if chosen == "cpu":
        line[1 : 1 + len(API_SERVER)] = FORKING_API_SERVER
    keyed = bool(env.get("VLLM_API_KEY"))
    curl = curl_command(_url(host, port), served_name, chat=_target(path).chat, keyed=keyed)
    with _supervised(line, env) as process:
        if _wait_ready(process, _url(host, port), served_name, env.get("VLLM_API_KEY"), ready_timeout_s):
            print(
                f"\nReady: {served_name} answers at {_url(host, port)}/v1 (Ctrl-C ends it). Try:\n\n  {curl}\n",
                flush=True,
            )
        return _wait_end(process)


def vllm_command(
    path: Path,
    *,
    python: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_model_len: int | None = None,
    device: Device | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """vLLM's command line for an export folder, or for an adapter folder on its base.

    The module is run rather than `vllm serve`, which fails in the CPU distribution.
    """
    target = _target(path)
    served_name = name or path.absolute().name
    line = [str(python), *API_SERVER, "--model", target.model]
    line += ["--host", host, "--port", str(port)]
    if target.tokenizer is not None:
        line += ["--tokenizer", str(target.tokenizer)]
    if target.adapter is None:
        line += ["--served-model-name", served_name]
    else:
        assert target.rank is not None
        line += ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(lora_rank_bound(target.rank))]
        line += ["--lora-modules", f"{served_name}={target.adapter}"]
    if (device or detect_device()) == "cpu" and not _cpu_has_avx512():
        line += ["--dtype", "float32"]  # bf16 is emulated on such CPUs and several times slower
    if max_model_len is not None:
        line += ["--max-model-len", str(max_model_len)]
    return [*line, *extra]


def vllm_environment(base_env: Mapping[str, str], *, device: Device) -> dict[str, str]:
    """`base_env` without a launcher's variables and without vLLM's unprotected endpoints, plus the CPU settings.

    VLLM_API_KEY and VLLM_CPU_* given by the user stay as they are.
    """
    unwanted = (SCRUBBED - {"VLLM_API_KEY"}) | {"VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"}
    env = {
        key: value for key, value in base_env.items() if key not in unwanted and not key.startswith(SCRUBBED_PREFIXES)
    }
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONSAFEPATH": "1", "SPT_NOENV": "1"}
    if device == "cpu":
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; unset, vLLM takes a large share of the machine's memory
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return env


def curl_command(url: str, name: str, *, chat: bool, keyed: bool) -> str:
    """A command for the terminal that asks the served model one question."""
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    body = json.dumps({"model": name, **question, "max_tokens": 64})
    endpoint = "chat/completions" if chat else "completions"
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if keyed else ""
    return f"curl -s {url}/v1/{endpoint} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def detect_port_free(host: str, port: int) -> bool:
    """Whether a server could listen on `host`:`port` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def detect_device() -> Device:
    """`cuda` if an NVIDIA device is there and not hidden by CUDA_VISIBLE_DEVICES."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "cuda" if glob.glob("/dev/nvidia[0-9]*") and not hidden else "cpu"


def _cpu_has_avx512() -> bool:
    """From /proc/cpuinfo; True where there are no x86 flags to read, since only x86 without AVX512 needs care."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for text in file:
            if text.startswith("flags"):
                return "avx512f" in text.split()
    return True


def _target(path: Path) -> _Target:
    if not path.is_dir():
        raise EngineError(f"{path} is no folder: name an export (`hf-dsvllm export RUN --out PATH`) or an adapter.")
    if (path / "adapter_config.json").is_file():
        return _adapter_target(path)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return _Target(
            model=str(path.absolute()), adapter=None, rank=None, tokenizer=None, chat=has_chat_template(path)
        )
    hint = "it is a run folder" if (path / "run.json").is_file() else "it has no config.json with safetensors"
    raise EngineError(
        f"{path} cannot be served: {hint} and no adapter_config.json. Make an export of it: "
        f"`hf-dsvllm export {path} --out {path / 'export'}`."
    )


def _adapter_target(path: Path) -> _Target:
    """An adapter on its recorded base; refused where vLLM would serve something else than was trained."""
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    record = find_record(path)
    reasons = [f"{key}={config[key]!r}" for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
    # Up to 0.31 vLLM ignores these without a word.
    reasons += [f"{key}={config[key]!r}" for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r}")
    if record is not None and record.quantization is not None:
        reasons.append("a base in 4 bit (QLoRA); on the 16-bit base it is another model")
    if reasons:
        raise EngineError(
            f"vLLM cannot serve the adapter in {path} as it was trained: it has {', '.join(reasons)}. "
            "Make an export, which has it merged: `hf-dsvllm export RUN --out PATH`, then serve that."
        )
    base = record.base_model if record is not None else config.get("base_model_name_or_path")
    if not base:
        raise EngineError(
            f"{path}/adapter_config.json names no base model; make an export with --base PATH and serve it."
        )
    places = [*([] if record is None else [record.folder / "tokenizer"]), path]
    tokenizer = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    return _Target(
        model=str(base),
        adapter=path.absolute(),
        rank=int(config["r"]),
        tokenizer=None if tokenizer is None else tokenizer.absolute(),
        chat=has_chat_template(tokenizer or Path(str(base))),
    )


def _check_address(host: str, port: int, env: Mapping[str, str], extra: Sequence[str]) -> None:
    if not _is_loopback(host) and not env.get("VLLM_API_KEY") and "--api-key" not in extra:
        raise EngineError(
            f"--host {host} lets every machine that reaches this one use the model: set a key first, "
            "`export VLLM_API_KEY=...`, or stay on 127.0.0.1."
        )
    if not detect_port_free(host, port):
        last = min(port + PORTS_TRIED, 65535)
        free = next((other for other in range(port + 1, last + 1) if detect_port_free(host, other)), None)
        fix = "stop what listens there" if free is None else f"use --port {free}, which is free"
        raise EngineError(f"{host}:{port} is in use (or not an address of this machine); {fix}.")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _url(host: str, port: int) -> str:
    """The address to ask: a server on every interface is asked on loopback."""
    known = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return f"http://{known.get(host, f'[{host}]' if ':' in host else host)}:{port}"


@contextlib.contextmanager
def _supervised(line: Sequence[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run vLLM under the supervisor with our output; SIGINT and SIGTERM are passed on; nothing is left afterwards."""
    engine_id = uuid.uuid4().hex[:16]
    read_end, write_end = os.pipe()
    command = [sys.executable, "-I", "-S", supervisor.__file__, "--death_fd", str(read_end)]
    command += ["--owner_pid", str(os.getpid()), "--engine_id", engine_id]
    command += ["--record", str(record_path(engine_id)), "--", *line]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=dict(env), pass_fds=(read_end,), start_new_session=True
    )
    os.close(read_end)
    try:
        with _passing_signals(process):
            yield process
    finally:
        os.close(write_end)  # end of file: the supervisor's sign to finish
        process.wait()


@contextlib.contextmanager
def _passing_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Only the main thread can have signal handlers; elsewhere the caller ends us by other means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _frame: process.send_signal(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_ready(process: subprocess.Popen[bytes], url: str, name: str, key: str | None, timeout_s: float) -> bool:
    """True once /health answers and /v1/models lists `name`; False if we were asked to stop meanwhile."""
    deadline = time.monotonic() + timeout_s
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                if _was_asked(process.returncode):
                    return False
                raise EngineError(f"vLLM did not start (exit code {process.returncode}); its output above says why.")
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/health").is_success and name in _model_names(client.get("/v1/models")):
                    return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    raise EngineError(f"vLLM was not ready after {timeout_s:.0f} s; its output above says what it waits for.")


def _model_names(answer: httpx.Response) -> list[str]:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise EngineError("The server refuses VLLM_API_KEY: a key given by --api-key differs; use the variable alone.")
    return [model["id"] for model in answer.raise_for_status().json()["data"]]


def _wait_end(process: subprocess.Popen[bytes]) -> int:
    code = process.wait()
    return 0 if _was_asked(code) else code


def _was_asked(code: int) -> bool:
    """vLLM ends with 0 or by the signal we passed on."""
    return code in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
