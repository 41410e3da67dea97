"""Exports and adapters -> the right vLLM servers, run in the foreground until Ctrl-C, behind one address.

Several servers, and one that is not for loopback alone, listen behind the gateway.  Runs under the same supervisor as
the engine beside a training run, so nothing is left behind however this process ends.
The development endpoints and runtime adapter loading, which change weights without a key, stay off here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import ipaddress
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_dsvllm.engine.spec import API_SERVER, SCRUBBED, SCRUBBED_PREFIXES, api_server, find_vllm
from hf_dsvllm.errors import EngineError
from hf_dsvllm.hardware import detect
from hf_dsvllm.serve.gateway import find_envoy, gateway_config
from hf_dsvllm.serve.life import Supervised, supervised, wait_end, wait_ready
from hf_dsvllm.serve.plan import Server, plan_servers
from hf_dsvllm.serve.share import Share, need_of, share_gpus

__all__ = [
    "PlannedServer",
    "check_extra",
    "curl_command",
    "detect_device",
    "detect_port_free",
    "plan_serving",
    "serve",
    "vllm_command",
    "vllm_environment",
]

Device = Literal["cuda", "cpu"]
READY_S = 1800.0  # a 70B model read from a network disk takes a quarter of an hour
GATEWAY_READY_S = 30.0
PORTS_TRIED = 100
LOOPBACK = "127.0.0.1"
# Arguments of vLLM that would make it public, keyless, or another than the one waited for -> what to do instead.
OURS = {
    "--host": "--host before the --",
    "--port": "--port before the --",
    "--uds": "--host and --port before the --",
    "--served-model-name": "--name before the --, or NAME=PATH",
    "--model": "PATH before the --",
    "--lora-modules": "the adapters as PATH before the --",
    "--api-key": "export VLLM_API_KEY=...",
    "--root-path": "a prefix in a proxy of your own; with this one vLLM asks for no key",
    "--ssl-keyfile": "TLS in a proxy of your own",
    "--ssl-certfile": "TLS in a proxy of your own",
    "--config": "its settings one by one after the --",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedServer:
    """One vLLM process to be started: what it serves, where it listens, and its part of the GPUs (None: no choice)."""

    server: Server
    host: str
    port: int
    share: Share | None

    def command(
        self, *, python: Path | str, device: Device, max_model_len: int | None, extra: Sequence[str]
    ) -> list[str]:
        """vLLM's command line.  The module is run rather than `vllm serve`, which fails in the CPU distribution."""
        check_extra(extra)
        line = [str(python), *API_SERVER, *self.server.model_arguments()]
        line += ["--host", self.host, "--port", str(self.port)]
        if device == "cpu" and not _cpu_has_avx512():
            line += ["--dtype", "float32"]  # bf16 is emulated on such CPUs and several times slower
        # auto (vLLM 0.14 on): the model's own length, or what the cache can hold; the model's alone would be refused.
        line += ["--max-model-len", "auto" if max_model_len is None else str(max_model_len)]
        if self.share is not None and len(self.share.gpus) > 1:
            line += ["--tensor-parallel-size", str(len(self.share.gpus))]
        if self.share is not None and self.share.utilization is not None:
            line += ["--gpu-memory-utilization", str(self.share.utilization)]
        return [*line, *extra]

    def added_environment(self) -> dict[str, str]:
        """The GPUs it may see."""
        if self.share is None:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.share.gpus))}


def serve(
    paths: Path | Sequence[str | Path],
    *,
    python: Path | None = None,
    host: str = LOOPBACK,
    port: int = 8000,
    name: str | None = None,
    max_model_len: int | None = None,
    device: Device | None = None,
    extra: Sequence[str] = (),
    print_only: bool = False,
    ready_timeout_s: float = READY_S,
) -> int:
    """Serve exports and adapters over vLLM's OpenAI API until SIGINT or SIGTERM; returns an exit code.

    Each of `paths` is PATH or NAME=PATH.  `python` is the interpreter that has vLLM (default: this one), `device` is
    found out if not given, `extra` goes to every vLLM as it is.  Prints a curl command for each model once it answers.
    With `print_only` the plain commands are printed and nothing started.  Raises EngineError before anything starts for
    a taken port, a public address without VLLM_API_KEY, `extra` that is not vLLM's to decide, models that do not fit,
    or a folder vLLM cannot serve, and if vLLM fails to start; MissingDependencyError without vLLM or a needed Envoy.
    """
    chosen = device or detect_device()
    interpreter = Path(sys.executable) if python is None else python
    planned = plan_serving(paths, host=host, port=port, name=name, device=chosen)
    env = vllm_environment(os.environ, device=chosen)
    lines = [each.command(python=interpreter, device=chosen, max_model_len=max_model_len, extra=extra)
             for each in planned]  # fmt: skip
    key = env.get("VLLM_API_KEY")
    _check_key(host, key)
    gateway_line = _gateway_line(planned, host, port, keyed=bool(key)) if _is_gated(len(planned), host) else None
    if print_only:
        _print_commands(planned, lines, env, gateway_line)
        return 0
    _check_port(host, port)
    find_vllm(interpreter, device=chosen)
    envoy = None if gateway_line is None else find_envoy()
    with contextlib.ExitStack() as stack:
        running: list[Supervised] = []
        for each, line in zip(planned, lines, strict=True):
            line[1 : 1 + len(API_SERVER)] = api_server(chosen, len(each.share.gpus) if each.share is not None else 1)
            # One after the other: vLLM measures the memory that is free while it starts.
            what = f"vLLM of {' and '.join(each.server.names)}"
            running.append(stack.enter_context(supervised(line, env | each.added_environment(), what)))
            if not wait_ready(running, _url(each.host, each.port), each.server.names, key, ready_timeout_s):
                return wait_end(running)
        if envoy is not None and gateway_line is not None:
            running.append(stack.enter_context(supervised([envoy, *gateway_line], env, "The gateway")))
            names = [called for each in planned for called in each.server.names]
            if not wait_ready(running, _url(host, port), names, key, GATEWAY_READY_S, health=False):
                return wait_end(running)
        _print_ready(planned, _url(host, port), keyed=bool(key))
        return wait_end(running)


def plan_serving(
    paths: Path | Sequence[str | Path], *, host: str, port: int, name: str | None, device: Device
) -> tuple[PlannedServer, ...]:
    """The vLLM processes for `paths`: one alone on `host`:`port` if that is loopback, else all behind the gateway."""
    servers = plan_servers([paths] if isinstance(paths, Path) else paths, name)
    shares: Sequence[Share | None] = [None] * len(servers)
    if len(servers) == 1:
        shares = [_share_of_one(servers[0], device)]
        if not _is_gated(1, host):
            return (PlannedServer(server=servers[0], host=host, port=port, share=shares[0]),)
    elif device == "cuda":
        needs = [need_of(server.model, " and ".join(server.names), server.revision) for server in servers]
        shares = share_gpus(needs, detect().gpus)
    ports = _free_ports(port, len(servers))
    return tuple(
        PlannedServer(server=server, host=LOOPBACK, port=own, share=share)
        for server, own, share in zip(servers, ports, shares, strict=True)
    )


def _share_of_one(server: Server, device: Device) -> Share | None:
    """Tensor parallelism where one GPU is too small; None where vLLM's own defaults do."""
    gpus = detect().gpus if device == "cuda" else ()
    if len(gpus) < 2:
        return None
    with contextlib.suppress(EngineError):  # an architecture we cannot size, or a model vLLM will refuse better itself
        share = share_gpus([need_of(server.model, server.names[0], server.revision)], gpus)[0]
        return share if len(share.gpus) > 1 else None
    return None


def _free_ports(taken: int, count: int) -> list[int]:
    """Ports on loopback for the servers behind the gateway, counted from the gateway's."""
    free: list[int] = []
    for port in range(taken + 1, min(taken + PORTS_TRIED + count, 65536)):
        if len(free) == count:
            break
        if detect_port_free(LOOPBACK, port):
            free.append(port)
    if len(free) < count:
        raise EngineError(f"No {count} free ports above {taken} for the servers behind it; choose another --port.")
    return free


def _is_gated(servers: int, host: str) -> bool:
    """Whether the gateway stands in front: for one address of several, and since vLLM's key leaves prompts open."""
    return servers > 1 or not _is_loopback(host)


def _gateway_line(planned: Sequence[PlannedServer], host: str, port: int, *, keyed: bool) -> list[str]:
    """Envoy's arguments with its whole configuration, in which there is no key."""
    backends = [(each.server.names, each.host, each.port) for each in planned]
    config = json.dumps(gateway_config(backends, host=_numeric(host), port=port, keyed=keyed))
    return ["--config-yaml", config, "--log-level", "warning", "--use-dynamic-base-id", "--concurrency", "2"]


def _numeric(host: str) -> str:
    """Envoy listens on addresses, not on names."""
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    raise EngineError(f"--host {host} is no address of this machine; 0.0.0.0 is every one it has.")


def _print_commands(
    planned: Sequence[PlannedServer],
    lines: Sequence[Sequence[str]],
    env: Mapping[str, str],
    gateway_line: Sequence[str] | None,
) -> None:
    """The same by hand: one vLLM a line, and the gateway if there is one."""
    for each, line in zip(planned, lines, strict=True):
        whole = {**env, **each.added_environment()}
        added = {name: value for name, value in sorted(whole.items())
                 if os.environ.get(name) != value and name.startswith(("VLLM_", "CUDA_"))}  # fmt: skip
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in added.items()), shlex.join(line)]))
    if gateway_line is not None:
        print(shlex.join(["envoy", *gateway_line]))


def _print_ready(planned: Sequence[PlannedServer], url: str, *, keyed: bool) -> None:
    for each in planned:
        for called in each.server.names:
            curl = curl_command(url, called, chat=each.server.chat, keyed=keyed)
            print(f"\nReady: {called} answers at {url}/v1 (Ctrl-C ends it). Try:\n\n  {curl}\n", flush=True)


def vllm_command(
    path: Path,
    *,
    python: Path,
    host: str = LOOPBACK,
    port: int = 8000,
    name: str | None = None,
    max_model_len: int | None = None,
    device: Device | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """vLLM's command line for an export folder, or for an adapter folder on its base."""
    (server,) = plan_servers([path], name)
    planned = PlannedServer(server=server, host=host, port=port, share=None)
    return planned.command(python=python, device=device or detect_device(), max_model_len=max_model_len, extra=extra)


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


def check_extra(extra: Sequence[str]) -> None:
    """EngineError for words after -- that serve itself settles, as vLLM may spell it: `_` for `-`, cut short."""
    refused = []
    for word in extra:
        given = re.split(r"[=.]", word)[0].replace("_", "-")
        meant = given if given in OURS else next((flag for flag in OURS if flag.startswith(given)), None)
        if meant is not None and len(given) > len("--"):
            refused.append(f"{given} (instead: {OURS[meant]})")
    if refused:
        raise EngineError(f"After -- vLLM cannot be given what serve itself settles: {', '.join(refused)}.")


def _check_key(host: str, key: str | None) -> None:
    if not _is_loopback(host) and not key:
        raise EngineError(
            f"--host {host} lets every machine that reaches this one use the model: set a key first, "
            "`export VLLM_API_KEY=...`, or stay on 127.0.0.1."
        )


def _check_port(host: str, port: int) -> None:
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
