"""One address in front of vLLM servers, by Envoy: the `model` of a request's JSON decides which one answers.

In front of one server it is what makes a key safe: vLLM checks its key under /v1 and a few other paths, and answers
prompts without it elsewhere (/invocations; serve/middleware/authenticate.py, 0.26 to 0.32).  Here /v1 is all there is,
beside health and metrics.  Envoy is a program of its own (from its vendors, or `pip install "hf-dsvllm[gateway]"`).  It
has no admin port here and passes `Authorization` on, so that vLLM checks the key itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import MissingDependencyError

__all__ = ["Backend", "find_envoy", "gateway_config"]

BODY_BYTES = 64 << 20  # largest request: the model's name may stand at its end
CONNECT_S = 5
PAGES = ("health", "metrics")
ENVOY = "type.googleapis.com/envoy.extensions.filters"
SERVED = "served"
# The key is in Envoy's environment alone: in no file and on no command line.  Without it Envoy does not start.
ASK_KEY = """
local bearer = "Bearer " .. os.getenv("VLLM_API_KEY")
function envoy_on_request(request)
  if request:headers():get("authorization") ~= bearer then
    request:respond({[":status"] = "401", ["content-type"] = "application/json"}, '{"error": "Unauthorized"}')
  end
end
"""

Backend = tuple[Sequence[str], str, int]  # names of the models, host, port


def find_envoy() -> str:
    """The program, on PATH or beside this interpreter; MissingDependencyError with what to install."""
    beside = Path(sys.executable).with_name("envoy")
    found = shutil.which("envoy") or (str(beside) if beside.is_file() else None)
    if found is None:
        raise MissingDependencyError(
            "Several models on one address, and any model on another address than loopback, need Envoy in front of "
            'vLLM, which is not installed: `pip install "hf-dsvllm[gateway]"`, or put an envoy of your own on PATH.'
        )
    return found


def gateway_config(backends: Sequence[Backend], *, host: str, port: int, keyed: bool) -> dict[str, Any]:
    """Envoy's bootstrap configuration for an address that routes to `backends` by model name.

    `/v1/models` lists all models, if `keyed` for whoever has the VLLM_API_KEY of Envoy's environment;
    `/servers/NAME/health` and `…/metrics` are those of the server of model NAME; an unknown model is OpenAI's 404.
    With one backend all of /v1 is passed to it without a look at the body, and /health and /metrics are its own.
    """
    several = [
        {"name": "envoy.filters.http.lua", "typed_config": {"@type": f"{ENVOY}.http.lua.v3.Lua"}},
        {"name": "envoy.filters.http.json_to_metadata", "typed_config": _model_reader()},
    ]
    router = {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{ENVOY}.http.router.v3.Router"}}
    routes = _routes_by_model(backends, keyed) if len(backends) > 1 else _routes_of_one()
    manager = {
        "@type": f"{ENVOY}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "stream_idle_timeout": "0s",  # a long answer may take its time
        "upgrade_configs": [{"upgrade_type": "websocket"}],  # /v1/realtime
        "http_filters": [*(several if len(backends) > 1 else ()), router],
        "route_config": {
            "max_direct_response_body_size_bytes": BODY_BYTES,
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [*routes, *_other_routes(backends)]}],
        },
    }
    listener = {
        "name": "gateway",
        "address": _address(host, port),
        "per_connection_buffer_limit_bytes": BODY_BYTES,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    clusters = [_cluster(number, backend) for number, backend in enumerate(backends)]
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def _model_reader() -> dict[str, Any]:
    value = {"metadata_namespace": SERVED, "key": "model"}
    return {
        "@type": f"{ENVOY}.http.json_to_metadata.v3.JsonToMetadata",
        "request_rules": {
            "rules": [
                {
                    "selectors": [{"key": "model"}],
                    "on_present": value,
                    "on_missing": value | {"value": ""},
                    "on_error": value | {"value": ""},
                }
            ],
            "allow_content_types_regex": {"regex": "application/json.*"},
        },
    }


def _routes_of_one() -> list[dict[str, Any]]:
    matches = ({"prefix": "/v1/"}, *({"path": f"/{page}"} for page in PAGES))
    return [{"match": match, "route": _to(0)} for match in matches]


def _routes_by_model(backends: Sequence[Backend], keyed: bool) -> list[dict[str, Any]]:
    listed = {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vllm"}
                                         for names, _, _ in backends for name in names]}  # fmt: skip
    models = {"match": {"path": "/v1/models"}, **_answer(200, listed)}
    if keyed:
        asking = {"@type": f"{ENVOY}.http.lua.v3.LuaPerRoute", "source_code": {"inline_string": ASK_KEY}}
        models["typed_per_filter_config"] = {"envoy.filters.http.lua": asking}
    routes = [models]
    for number, (names, _, _) in enumerate(backends):
        for name in names:
            asked = [{"filter": SERVED, "path": [{"key": "model"}], "value": {"string_match": {"exact": name}}}]
            routes.append({"match": {"prefix": "/v1/", "dynamic_metadata": asked}, "route": _to(number)})
    return routes


def _other_routes(backends: Sequence[Backend]) -> list[dict[str, Any]]:
    routes: list[dict[str, Any]] = [
        {"match": {"path": f"/servers/{name}/{page}"}, "route": _to(number) | {"prefix_rewrite": f"/{page}"}}
        for number, (names, _, _) in enumerate(backends) for name in names for page in PAGES
    ]  # fmt: skip
    known = ", ".join(name for names, _, _ in backends for name in names)
    error = {"message": f"No such model or page here. Models: {known}.", "type": "NotFoundError", "code": 404}
    return [*routes, {"match": {"prefix": "/"}, **_answer(404, {"error": error})}]


def _to(number: int) -> dict[str, Any]:
    return {"cluster": f"server-{number}", "timeout": "0s"}


def _answer(status: int, body: object) -> dict[str, Any]:
    kind = {"header": {"key": "content-type", "value": "application/json"}}
    return {
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(body)}},
        "response_headers_to_add": [kind | {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
    }


def _cluster(number: int, backend: Backend) -> dict[str, Any]:
    _, host, port = backend
    numeric = host.replace(".", "").isdigit() or ":" in host
    name = f"server-{number}"
    return {
        "name": name,
        "type": "STATIC" if numeric else "STRICT_DNS",
        "connect_timeout": f"{CONNECT_S}s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, port)}}]}],
        },
    }


def _address(host: str, port: int) -> dict[str, Any]:
    both = {"ipv4_compat": True} if host == "::" else {}  # as a server on :: does, IPv4 too
    return {"socket_address": {"address": host, "port_value": port} | both}
