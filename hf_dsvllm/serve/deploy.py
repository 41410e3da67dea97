"""What `serve` would run, as files for a cluster: Docker Compose, Kubernetes, Ray Serve, systemd.

Only the gateway can be reached in Compose, and in Kubernetes each vLLM through an Envoy in its own pod: vLLM itself
answers prompts without its key beside /v1.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_dsvllm.errors import EngineError
from hf_dsvllm.export.source import Target
from hf_dsvllm.serve.command import LOOPBACK, PlannedServer, check_extra
from hf_dsvllm.serve.gateway import Backend, gateway_config

__all__ = ["deployment"]

VLLM_IMAGE = "vllm/vllm-openai:v0.32.0"
ENVOY_IMAGE = "envoyproxy/envoy:v1.40.0"
PORT = 8000  # inside a container
BEHIND = 8001  # vLLM's in a pod, where the Envoy beside it has PORT
MODELS = "/models"
SECRET = "hf-dsvllm-key"
HEALTHY = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"
READY_S = 1800
SETTINGS = "/etc/gateway"


def deployment(
    target: Target,
    planned: Sequence[PlannedServer],
    *,
    host: str,
    port: int,
    max_model_len: int | None = None,
    extra: Sequence[str] = (),
    serve_arguments: Sequence[str] = (),
) -> str:
    """The text of one deployment file for servers planned by `plan_serving`.

    Every form asks for a key in VLLM_API_KEY, since a container cannot tell a private network from a public one.
    `serve_arguments` are those of `hf-dsvllm serve`, which the systemd unit runs.  EngineError for what a target lacks.
    """
    check_extra(extra)
    if target in ("compose", "k8s"):
        _check_services(planned)
    makers: Mapping[Target, Callable[[], str]] = {
        "compose": lambda: _compose(planned, host, port, max_model_len, extra),
        "k8s": lambda: _kubernetes(planned, port, max_model_len, extra),
        "ray": lambda: _ray(planned, host, port, max_model_len, extra),
        "systemd": lambda: _systemd(planned, serve_arguments),
    }
    return makers[target]()


def _compose(
    planned: Sequence[PlannedServer], host: str, port: int, max_model_len: int | None, extra: Sequence[str]
) -> str:
    services: dict[str, Any] = {}
    key = {"VLLM_API_KEY": "${VLLM_API_KEY:?set a key}"}
    on_gpu: dict[tuple[int, ...], PlannedServer] = {}  # the last one on a shared GPU
    for each in planned:
        mounts, line = _inside(each, max_model_len, extra, "0.0.0.0", PORT)
        services[_service(each)] = {
            "image": VLLM_IMAGE,
            "command": line,
            "environment": key | {"VLLM_NO_USAGE_STATS": "1"},
            "volumes": [{"type": "bind", "source": source, "target": inside, "read_only": True}
                        for source, inside in mounts.items()],
            "ipc": "host",
            "restart": "unless-stopped",
            "healthcheck": {
                "test": ["CMD", "python3", "-c", HEALTHY], "interval": "5s", "start_period": f"{READY_S}s",
            },
            "deploy": {"resources": {"reservations": {"devices": [
                {"driver": "nvidia", "capabilities": ["gpu"], **_devices(each)}]}}},
        }  # fmt: skip
        if each.share is not None and _shares_gpu(each):  # vLLM measures the memory that is free while it starts
            if before := on_gpu.get(each.share.gpus):
                services[_service(each)]["depends_on"] = {_service(before): {"condition": "service_healthy"}}
            on_gpu[each.share.gpus] = each
    services["gateway"] = {
        "image": ENVOY_IMAGE,
        "command": ["envoy", "-c", f"{SETTINGS}/gateway.yaml"],
        "environment": key,
        "configs": [{"source": "gateway", "target": f"{SETTINGS}/gateway.yaml"}],
        "ports": [f"{host}:{port}:{PORT}"],
        "restart": "unless-stopped",
        "depends_on": {_service(each): {"condition": "service_healthy"} for each in planned},
    }
    configs = {"gateway": {"content": _gateway(_by_service(planned))}}
    return _yaml({"name": "hf-dsvllm", "services": services, "configs": configs})


def _kubernetes(planned: Sequence[PlannedServer], port: int, max_model_len: int | None, extra: Sequence[str]) -> str:
    if any(_shares_gpu(each) for each in planned):
        raise EngineError(
            "Kubernetes gives a GPU to one container at a time, and these models would share one: plan on a host with "
            "a GPU for each, or use --emit compose."
        )
    documents: list[dict[str, Any]] = []
    settings: dict[str, str] = {}
    key = {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": SECRET, "key": "VLLM_API_KEY"}}}
    for each in planned:
        mounts, line = _inside(each, max_model_len, extra, LOOPBACK, BEHIND)
        del mounts  # a claim named `models` holds the folders under their names
        gpus = 1 if each.share is None else len(each.share.gpus)
        container = {
            "name": "vllm",
            "image": VLLM_IMAGE,
            "args": line,
            "env": [key, {"name": "VLLM_NO_USAGE_STATS", "value": "1"}],
            "resources": {"limits": {"nvidia.com/gpu": gpus}},
            "startupProbe": _probe() | {"failureThreshold": READY_S // 10, "periodSeconds": 10},
            "readinessProbe": _probe() | {"periodSeconds": 10},
            "livenessProbe": _probe() | {"periodSeconds": 30},
            "volumeMounts": [
                {"name": "models", "mountPath": MODELS, "readOnly": True},
                {"name": "shm", "mountPath": "/dev/shm"},
            ],
        }
        volumes = [
            {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ]
        name = _service(each)
        settings[f"{name}.yaml"] = _gateway([(each.server.names, LOOPBACK, BEHIND)])
        outside = PORT if len(planned) > 1 else port
        documents += [
            _deployment(name, [container, _envoy(name, key)], volumes), _kube_service(name, outside, PORT),
        ]  # fmt: skip
    if len(planned) > 1:
        settings["gateway.yaml"] = _gateway(_by_service(planned))
        documents += [_deployment("gateway", [_envoy("gateway", key)], []), _kube_service("gateway", port, PORT)]
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "gateway"}, "data": settings}
    head = (
        f"# The folders of the models lie on the claim `models` under their names. The key:\n"
        f"#   kubectl create secret generic {SECRET} --from-literal=VLLM_API_KEY=...\n"
        f"# Each vLLM listens on its pod's loopback, and the Envoy beside it passes on what the key guards.\n"
    )
    return head + "---\n".join(_yaml(document) for document in (config_map, *documents))


def _envoy(name: str, key: dict[str, Any]) -> dict[str, Any]:
    """The container of an Envoy that is configured by `name`.yaml of the ConfigMap."""
    return {
        "name": "envoy",
        "image": ENVOY_IMAGE,
        "command": ["envoy", "-c", f"{SETTINGS}/{name}.yaml"],
        "env": [key],
        "ports": [{"containerPort": PORT, "name": "http"}],
        "volumeMounts": [{"name": "gateway", "mountPath": SETTINGS}],
    }


def _deployment(name: str, containers: list[dict[str, Any]], volumes: list[dict[str, Any]]) -> dict[str, Any]:
    """One pod; every one has an Envoy with its ConfigMap."""
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "hf-dsvllm"}
    volumes = [*volumes, {"name": "gateway", "configMap": {"name": "gateway"}}]
    spec = {"containers": containers, "volumes": volumes, "automountServiceAccountToken": False}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a second copy would wait for the first one's GPU
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def _kube_service(name: str, port: int, inside: int) -> dict[str, Any]:
    ports = [{"name": "http", "port": port, "targetPort": inside}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"type": "ClusterIP", "selector": {"app.kubernetes.io/name": name}, "ports": ports},
    }


def _ray(
    planned: Sequence[PlannedServer], host: str, port: int, max_model_len: int | None, extra: Sequence[str]
) -> str:
    problems = []
    if extra:
        problems.append(
            f"Ray Serve starts vLLM without a command line, so {shlex.join(extra)} has no place in its file: write it "
            "there under engine_kwargs, in the names of vllm.AsyncEngineArgs."
        )
    if any(_shares_gpu(each) for each in planned):
        problems.append(
            "Ray Serve starts its models at once, and vLLM measures the memory that is free while it starts, so two "
            "cannot share a GPU: plan on a host with a GPU for each, or use --emit compose."
        )
    if any(each.server.adapters for each in planned):
        problems.append(
            "Ray Serve loads adapters from cloud storage by itself: make exports with everything merged for it "
            "(`hf-dsvllm export ADAPTER --out PATH`)."
        )
    if problems:
        raise EngineError("\n".join(problems))
    configs = []
    for each in planned:
        engine: dict[str, Any] = {"tensor_parallel_size": 1 if each.share is None else len(each.share.gpus)}
        if max_model_len is not None:
            engine["max_model_len"] = max_model_len
        configs.append(
            {
                "model_loading_config": {"model_id": each.server.name, "model_source": each.server.model},
                "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
                "engine_kwargs": engine,
            }
        )
    application = {
        "name": "hf-dsvllm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": configs},
    }
    head = (
        "# Ray Serve knows no API key: whoever reaches its port uses the models. Keep it on a private network, or on\n"
        "# loopback behind a proxy of your own that asks for a key. Start it: serve deploy FILE\n"
    )
    return head + _yaml({"http_options": {"host": host, "port": port}, "applications": [application]})


def _systemd(planned: Sequence[PlannedServer], serve_arguments: Sequence[str]) -> str:
    """One unit that runs `hf-dsvllm serve`, which starts the servers in order and ends them together."""
    names = " ".join(name for each in planned for name in each.server.names)
    line = " ".join(_unit_word(word) for word in (sys.executable, "-m", "hf_dsvllm", "serve", *serve_arguments))
    # Where a base is recorded by a relative path, that is one from here alone.
    found_from = next((each.server.found_from for each in planned if each.server.found_from is not None), None)
    start_in = "%S/hf-dsvllm" if found_from is None else str(found_from).replace("%", "%%")
    return f"""\
[Unit]
Description=hf-dsvllm serve {names}
Wants=network-online.target
After=network-online.target

[Service]
# VLLM_API_KEY=... goes into this file, readable by root alone
EnvironmentFile=-/etc/hf-dsvllm/environment
ExecStart={line}
# A user of its own reads only what every user may: not an environment or a model below a home of mode 0700.
# Keep both under /opt or /srv, or write User=YOU instead of the next line.
DynamicUser=yes
SupplementaryGroups=video
StateDirectory=hf-dsvllm
Environment=HOME=%S/hf-dsvllm XDG_STATE_HOME=%S/hf-dsvllm
WorkingDirectory={start_in}
Restart=on-failure
RestartSec=10
KillSignal=SIGINT
TimeoutStopSec=60
NoNewPrivileges=yes
ProtectSystem=strict
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""


def _inside(
    each: PlannedServer, max_model_len: int | None, extra: Sequence[str], host: str, port: int
) -> tuple[dict[str, str], list[str]]:
    """Folders to mount, and vLLM's arguments with the address and the paths that they have in the container."""
    line = each.command(python="", device="cuda", max_model_len=max_model_len, extra=extra)[3:]
    folders = [Path(each.server.model), *(adapter.path for adapter in each.server.adapters)]
    if each.server.tokenizer is not None:
        folders.append(each.server.tokenizer)
    mounts = {str(folder): f"{MODELS}/{folder.name}" for folder in folders if folder.is_absolute()}
    if len(set(mounts.values())) < len(mounts):
        raise EngineError(f"Two of the folders {', '.join(mounts)} have one name; in a container they would be one.")
    for source, inside in sorted(mounts.items(), key=lambda pair: -len(pair[0])):
        line = [re.sub(rf"(^|=){re.escape(source)}$", rf"\1{inside}", word) for word in line]
    line[line.index("--host") + 1] = host
    line[line.index("--port") + 1] = str(port)
    return mounts, line


def _by_service(planned: Sequence[PlannedServer]) -> list[Backend]:
    return [(each.server.names, _service(each), PORT) for each in planned]


def _gateway(backends: Sequence[Backend]) -> str:
    return _yaml(gateway_config(backends, host="0.0.0.0", port=PORT, keyed=True))


def _devices(each: PlannedServer) -> dict[str, Any]:
    return {"count": 1} if each.share is None else {"device_ids": [str(gpu) for gpu in each.share.gpus]}


def _shares_gpu(each: PlannedServer) -> bool:
    return each.share is not None and each.share.utilization is not None


def _service(each: PlannedServer) -> str:
    """A name that Compose, Kubernetes and DNS allow."""
    plain = re.sub(r"[^a-z0-9]+", "-", each.server.names[0].lower()).strip("-")
    return f"vllm-{plain}"[:63].rstrip("-")


def _check_services(planned: Sequence[PlannedServer]) -> None:
    """Names that differ only in what a service's name cannot have would become one service."""
    named: dict[str, str] = {}
    for each in planned:
        other = named.setdefault(_service(each), each.server.names[0])
        if other != each.server.names[0]:
            raise EngineError(
                f"{other} and {each.server.names[0]} would both be the service {_service(each)}: give one another "
                "name, NAME=PATH."
            )


def _probe() -> dict[str, Any]:
    return {"httpGet": {"path": "/health", "port": PORT}}


def _unit_word(word: str) -> str:
    """systemd expands % and $ in a command line."""
    return shlex.quote(word).replace("%", "%%").replace("$", "$$")


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(document), sort_keys=False, width=110)
