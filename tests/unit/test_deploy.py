"""Deployment files, held against the real schemas of Compose, Kubernetes and systemd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from hf_dsvllm.errors import EngineError
from hf_dsvllm.serve.command import PlannedServer
from hf_dsvllm.serve.deploy import deployment
from hf_dsvllm.serve.gateway import find_envoy
from hf_dsvllm.serve.plan import plan_servers
from hf_dsvllm.serve.share import Share
from tests.unit.test_serve import write_adapter
from tests.unit.test_serve_several import write_model


def plan(paths: Sequence[Path], shares: Sequence[Share | None] | None = None) -> list[PlannedServer]:
    servers = plan_servers(paths)
    chosen = shares or [None] * len(servers)
    return [PlannedServer(server=server, host="127.0.0.1", port=8001 + number, share=share)
            for number, (server, share) in enumerate(zip(servers, chosen, strict=True))]  # fmt: skip


@pytest.fixture
def two(tmp_path: Path) -> list[PlannedServer]:
    """An adapter on its base and a whole model, on one GPU."""
    base = write_model(tmp_path / "base")
    adapter = write_adapter(tmp_path / "Orders_v2", base_model_name_or_path=str(base))
    shares = [Share(gpus=(0,), utilization=0.4), Share(gpus=(0,), utilization=0.5)]
    return plan([adapter, write_model(tmp_path / "large")], shares)


@pytest.fixture
def apart(two: list[PlannedServer]) -> list[PlannedServer]:
    """The same with a GPU for each."""
    return [PlannedServer(server=each.server, host=each.host, port=each.port, share=None) for each in two]


def emit(target: str, planned: Sequence[PlannedServer], **settings: object) -> str:
    return deployment(target, planned, host="127.0.0.1", port=8080, **settings)


def compose_schema() -> dict[str, object]:
    import check_jsonschema

    file = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return schema


def test_compose_files_are_valid_and_start_in_order(two: list[PlannedServer], tmp_path: Path) -> None:
    document = yaml.safe_load(emit("compose", two, max_model_len=2048))
    jsonschema.validate(document, compose_schema())
    adapter, large, gateway = (document["services"][name] for name in ("vllm-orders-v2", "vllm-large", "gateway"))
    assert large["depends_on"] == {"vllm-orders-v2": {"condition": "service_healthy"}}
    assert "--lora-modules" in adapter["command"]
    assert "Orders_v2=/models/Orders_v2" in adapter["command"]
    assert {mount["source"] for mount in adapter["volumes"]} == {str(tmp_path / "base"), str(tmp_path / "Orders_v2")}
    assert str(tmp_path) not in " ".join(adapter["command"] + large["command"])
    assert large["command"][large["command"].index("--gpu-memory-utilization") + 1] == "0.5"
    assert "ports" not in large
    assert gateway["ports"] == ["127.0.0.1:8080:8000"]


def test_a_server_in_compose_waits_for_the_one_before_it_on_its_own_gpu(tmp_path: Path) -> None:
    shares = [Share(gpus=(gpu,), utilization=0.4) for gpu in (0, 1, 0, 1)]
    shares.insert(3, Share(gpus=(2,), utilization=None))
    planned = plan([write_model(tmp_path / name) for name in "abcde"], shares)
    services = yaml.safe_load(emit("compose", planned))["services"]
    waits = {name: list(services[f"vllm-{name}"].get("depends_on", ())) for name in "abcde"}
    assert waits == {"a": [], "b": [], "c": ["vllm-a"], "d": [], "e": ["vllm-b"]}


@pytest.mark.parametrize("target", ["compose", "k8s"])
def test_names_that_would_be_one_service_are_refused(tmp_path: Path, target: str) -> None:
    planned = plan([write_model(tmp_path / "m.1"), write_model(tmp_path / "m-1")])
    with pytest.raises(EngineError, match=r"m\.1 and m-1 would both be the service vllm-m-1"):
        emit(target, planned)
    assert len(yaml.safe_load(emit("ray", planned))["applications"][0]["args"]["llm_configs"]) == 2


def test_what_ray_has_no_place_for_is_refused(tmp_path: Path) -> None:
    models = [write_model(tmp_path / "small"), write_model(tmp_path / "large")]
    with pytest.raises(EngineError, match=r"--max-num-seqs 64 has no place"):
        emit("ray", plan(models), extra=["--max-num-seqs", "64"])
    with pytest.raises(EngineError, match="cannot share a GPU"):
        emit("ray", plan(models, [Share(gpus=(0,), utilization=0.4), Share(gpus=(0,), utilization=0.5)]))


def test_a_single_model_is_reached_through_the_gateway_alone(tmp_path: Path) -> None:
    planned = plan([write_model(tmp_path / "orders")])
    document = yaml.safe_load(emit("compose", planned))
    jsonschema.validate(document, compose_schema())
    assert list(document["services"]) == ["vllm-orders", "gateway"]
    assert "ports" not in document["services"]["vllm-orders"]
    assert document["services"]["gateway"]["ports"] == ["127.0.0.1:8080:8000"]
    config_map, server, service = yaml.safe_load_all(emit("k8s", planned))
    vllm, envoy = server["spec"]["template"]["spec"]["containers"]
    assert vllm["args"][vllm["args"].index("--host") + 1] == "127.0.0.1"
    assert "ports" not in vllm
    assert envoy["command"][-1] == "/etc/gateway/vllm-orders.yaml"
    assert list(config_map["data"]) == ["vllm-orders.yaml"]
    assert service["spec"]["ports"] == [{"name": "http", "port": 8080, "targetPort": 8000}]


def test_the_gateways_configuration_is_one_that_envoy_takes(
    two: list[PlannedServer], apart: list[PlannedServer], tmp_path: Path
) -> None:
    configs = {"compose": yaml.safe_load(emit("compose", two))["configs"]["gateway"]["content"]}
    configs |= next(yaml.safe_load_all(emit("k8s", apart)))["data"]
    assert list(configs) == ["compose", "vllm-orders-v2.yaml", "vllm-large.yaml", "gateway.yaml"]
    for name, content in configs.items():
        assert "${" not in content  # Compose would fill it in
        (tmp_path / "envoy.yaml").write_text(content)
        line = [find_envoy(), "--mode", "validate", "-c", str(tmp_path / "envoy.yaml")]
        env = {**os.environ, "VLLM_API_KEY": r'a|b&c\d"e$f'}
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, env=env)
        assert done.returncode == 0, (name, done.stderr[-2000:])


@pytest.mark.parametrize("target", ["compose", "k8s", "ray", "systemd"])
def test_no_file_takes_arguments_that_would_open_vllm(tmp_path: Path, target: str) -> None:
    with pytest.raises(EngineError, match="--host before the --"):
        emit(target, plan([write_model(tmp_path / "orders")]), extra=["--host", "0.0.0.0"])


@pytest.mark.parametrize("target", ["compose", "k8s"])
def test_no_command_of_a_container_holds_the_key(apart: list[PlannedServer], target: str) -> None:
    documents = yaml.safe_load_all(emit(target, apart))
    containers = [each for document in documents for each in [
        *document.get("services", {}).values(),
        *document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()),
    ]]  # fmt: skip
    assert len(containers) >= 3
    for container in containers:
        assert "VLLM_API_KEY" not in str(container.get("command")) + str(container.get("args"))
        assert "VLLM_API_KEY" in str(container.get("environment")) + str(container.get("env"))


def test_kubernetes_manifests_are_valid(apart: list[PlannedServer]) -> None:
    documents = list(yaml.safe_load_all(emit("k8s", apart)))
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    kinds = [(each["kind"], each["metadata"]["name"]) for each in documents]
    assert kinds == [
        ("ConfigMap", "gateway"), ("Deployment", "vllm-orders-v2"), ("Service", "vllm-orders-v2"),
        ("Deployment", "vllm-large"), ("Service", "vllm-large"), ("Deployment", "gateway"), ("Service", "gateway"),
    ]  # fmt: skip
    large = documents[3]["spec"]["template"]["spec"]["containers"][0]
    assert large["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert large["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "hf-dsvllm-key"


def test_models_that_share_a_gpu_are_not_for_kubernetes(two: list[PlannedServer]) -> None:
    with pytest.raises(EngineError, match="a GPU to one container at a time"):
        emit("k8s", two)


def test_a_ray_application_names_every_model(tmp_path: Path) -> None:
    planned = plan([write_model(tmp_path / "small"), write_model(tmp_path / "large")])
    text = emit("ray", planned, max_model_len=4096)
    document = yaml.safe_load(text)
    (application,) = document["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    models = application["args"]["llm_configs"]
    assert [model["model_loading_config"]["model_id"] for model in models] == ["small", "large"]
    assert models[0]["engine_kwargs"] == {"tensor_parallel_size": 1, "max_model_len": 4096}
    ServeDeploySchema.model_validate(document)


def test_adapters_are_not_for_ray(two: list[PlannedServer]) -> None:
    with pytest.raises(EngineError, match="cloud storage"):
        emit("ray", two)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_systemd_unit_is_one_that_systemd_takes(two: list[PlannedServer], tmp_path: Path) -> None:
    words = ["/srv/models/50% $new", "--port", "8080"]
    unit = tmp_path / "hf-dsvllm.service"
    unit.write_text(emit("systemd", two, serve_arguments=words))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "0700" in unit.read_text()
    complaints = [line for line in done.stderr.splitlines() if "hf-dsvllm.service" in line]
    assert complaints == []
    line = next(text for text in unit.read_text().splitlines() if text.startswith("ExecStart="))
    assert line == f"ExecStart={sys.executable} -m hf_dsvllm serve '/srv/models/50%% $$new' --port 8080"


@pytest.mark.parametrize("home", ["", "~/"])
def test_a_base_that_is_recorded_by_a_relative_path_is_found_from_anywhere(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = write_model(tmp_path / "models" / "q")
    planned = plan([write_adapter(tmp_path / "orders", base_model_name_or_path=f"{home}models/q")])
    assert planned[0].server.model == str(base)
    compose = emit("compose", planned)
    assert f"source: {base}\n" in compose
    for text in (compose, emit("k8s", planned)):
        assert "- /models/q\n" in text
        assert "- models/q\n" not in text
    start_in = "%S/hf-dsvllm" if home else str(tmp_path)
    assert f"\nWorkingDirectory={start_in}\n" in emit("systemd", planned, serve_arguments=[str(tmp_path / "orders")])


def test_adapters_share_a_base_however_their_configurations_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_model(tmp_path / "models" / "q")
    names = {"one": str(base), "two": "models/q"}
    adapters = [write_adapter(tmp_path / name, base_model_name_or_path=path) for name, path in names.items()]
    (planned,) = plan(adapters)
    assert planned.server.names == ("one", "two")
    assert planned.server.found_from == tmp_path


def test_a_base_on_the_hub_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (planned,) = plan([write_adapter(tmp_path / "orders", base_model_name_or_path="models/q", revision="v1")])
    assert (planned.server.model, planned.server.revision, planned.server.found_from) == ("models/q", "v1", None)
