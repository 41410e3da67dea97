"""Pushes and sleep against a server that keeps count: what is woken when, what stays awake and why; remote servers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm.engine import EngineClient, EngineSpec, RemoteServer, WeightSync, command, environment, why_no_transfer
from hf_dsvllm.errors import EngineError
from tests.weight_taker import FakeServer, FakeVllm, gpu_spec, served

FOLDER = Path("/snapshots/step-1")


@contextlib.contextmanager
def syncing(fake: FakeVllm, **spec: Any) -> Iterator[WeightSync]:
    with served(fake) as uds:
        client = EngineClient(uds, default_timeout_s=30.0)
        yield WeightSync(FakeServer(fake, uds, gpu_spec(None, **spec)), client)  # type: ignore[arg-type]
        client.close()


def test_a_full_push_wakes_weights_reloads_wakes_the_cache_and_resets_it() -> None:
    fake = FakeVllm()
    with syncing(fake) as sync:
        assert sync.rest() is None
        result = sync.push(FOLDER, "full", 1)
    ours = [path for path in fake.asked if path not in ("/version", "/openapi.json", "/get_world_size")]
    assert ours == ["/sleep?level=2", "/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache",
                    "/is_sleeping", "/reset_prefix_cache"]  # fmt: skip
    assert (result.path_used, result.generation) == ("reload", 0)
    assert list(result.phases) == ["wake weights", "reload", "wake cache", "reset"]


def test_an_adapter_in_a_new_vllm_gets_its_base_again_after_sleep() -> None:
    fake = FakeVllm()
    with syncing(fake, max_lora_rank=8) as sync:
        sync.push(FOLDER, "adapter", 1)
        assert sync.rest() is None
        assert not fake.whole
        assert sync.push(FOLDER, "adapter", 2).model_name == "step-2-2"
    assert fake.models == ["base", "step-2-2"]
    assert {"method": "reload_weights", "kwargs": {"weights_path": "/models/base"}} in fake.bodies


def test_an_engine_of_an_older_vllm_that_serves_adapters_stays_awake_and_says_why() -> None:
    fake = FakeVllm("ipc", "0.26.0")
    with syncing(fake, max_lora_rank=8) as sync:
        assert "0.28 and newer can" in str(sync.rest())
        assert sync.rest(level=1) is None, "level 1 keeps the base"
        sync.push(FOLDER, "adapter", 1)
    assert not fake.asleep
    assert "/collective_rpc" not in fake.asked


def test_level_1_keeps_the_weights_so_answers_need_no_push() -> None:
    fake = FakeVllm()
    with syncing(fake) as sync:
        assert sync.rest(level=1) is None
        sync.wake_for_answers()
    assert fake.whole
    assert not fake.asleep


def test_what_wakes_before_its_stream_is_counted_in_it_and_not_woken_again() -> None:
    fake = FakeVllm()
    with syncing(fake) as sync:
        assert not sync.asleep
        sync.wake_early()  # nothing sleeps
        assert sync.rest() is None
        assert sync.asleep
        sync.wake_early()
        assert not sync.asleep
        sync.begin_stream()
        assert list(sync.phases) == ["wake weights"]
        sync.begin_stream()
        assert not sync.phases
    assert fake.asked.count("/wake_up?tags=weights") == 1


def test_resting_twice_is_once_and_waking_twice_is_once() -> None:
    fake = FakeVllm()
    with syncing(fake) as sync:
        assert sync.rest() is None
        assert sync.rest() is None
        sync.push(FOLDER, "full", 1)
        sync.wake_for_weights()
        sync.wake_for_answers()
    assert [path for path in fake.asked if "sleep?" in path or "wake" in path] == [
        "/sleep?level=2",
        "/wake_up?tags=weights",
        "/wake_up?tags=kv_cache",
    ]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"device": "cpu", "sleep_mode": False}, "CPUs refuses to sleep"),
        ({"sleep_mode": False}, "without --enable-sleep-mode"),
    ],
)
def test_an_engine_that_cannot_sleep_stays_awake_with_the_reason(spec: dict[str, Any], why: str) -> None:
    fake = FakeVllm()
    with syncing(fake, **spec) as sync:
        assert why in str(sync.rest())
        sync.push(FOLDER, "full", 1)
    assert not any("wake_up" in path or "/sleep" in path for path in fake.asked)


def test_without_development_mode_the_missing_setting_is_named() -> None:
    fake = FakeVllm()
    fake.routes = {"/health", "/version", "/v1/models"}
    with syncing(fake, weight_transfer="ipc") as sync:
        found = sync.capabilities()
    assert (found.sleeps, found.reloads, found.transfer, found.hot_loads) == (False, False, None, False)
    assert "VLLM_SERVER_DEV_MODE=1" in found.lacks["transfer"]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in found.lacks["hot-load"]


def test_a_server_that_hides_its_routes_is_an_error_with_the_flag_to_leave_out() -> None:
    fake = FakeVllm()
    fake.failing["/openapi.json"] = "refuse"
    with syncing(fake) as sync, pytest.raises(EngineError, match="without --disable-fastapi-docs"):
        sync.capabilities()


def test_a_failed_reload_restarts_from_the_folder_and_counts_a_generation() -> None:
    fake = FakeVllm()
    fake.failing["/collective_rpc"] = "refuse"
    with syncing(fake) as sync:
        assert sync.rest() is None
        result = sync.push(FOLDER, "full", 1)
        assert (result.path_used, result.generation) == ("restart", 1)
        assert sync.push(FOLDER, "full", 2).generation == 1
        assert sync.server.restarts == [FOLDER]  # type: ignore[union-attr]


def test_a_restart_by_somebody_else_is_noticed_by_its_new_socket() -> None:
    asleep, fresh = FakeVllm(), FakeVllm(release="0.26.0")
    with syncing(asleep) as sync, served(fresh) as other:
        assert sync.rest() is None
        sync.server.uds = other  # type: ignore[union-attr, misc]
        assert sync.capabilities().version == "0.26.0"
        sync.wake_for_answers()
        assert sync.push(FOLDER, "full", 1).generation == 1
    assert "/wake_up?tags=weights" not in fresh.asked


# -- what is started ---------------------------------------------------------------------------------------------------


def test_transfer_and_sleep_reach_the_command_and_only_ipc_opens_pickles() -> None:
    ipc, nccl = gpu_spec("ipc"), gpu_spec("nccl", data_parallel_size=2, sleep_mode=False)
    line = command(ipc, Path("/s"))
    assert line[line.index("--weight-transfer-config") + 1] == '{"backend": "ipc"}'
    assert "--enable-sleep-mode" in line
    assert "--data-parallel-size" not in line
    assert environment(ipc, {})["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    line = command(nccl, Path("/s"))
    assert line[line.index("--data-parallel-size") + 1] == "2"
    assert "--enable-sleep-mode" not in line
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment(nccl, {})


@pytest.mark.parametrize("changes", [{"sleep_mode": True}, {"weight_transfer": "ipc"}])
def test_a_cpu_engine_with_either_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="need an engine on GPUs"):
        EngineSpec(model="m", python=Path(sys.executable), device="cpu", **changes)


def fake_python(folder: Path, answer: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{answer}'\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("version", "ray", "why"),
    [("0.26.0", "false", "imports ray"), ("0.26.0", "true", None), ("0.27.1", "false", None), ("", "false", None)],
)
def test_a_vllm_that_would_not_start_for_want_of_ray_is_known_before(
    version: str, ray: str, why: str | None, tmp_path: Path
) -> None:
    python = fake_python(tmp_path, f'{{"version": "{version}", "ray": {ray}}}')
    said = why_no_transfer(python, "ipc")
    assert said is None if why is None else why in str(said)
    assert why_no_transfer(python, "nccl") is None


def test_a_python_that_cannot_be_asked_is_a_reason_too(tmp_path: Path) -> None:
    assert "could not be asked" in str(why_no_transfer(tmp_path / "none", "ipc"))
    assert why_no_transfer(Path(sys.executable), "nccl") is None


# -- somebody else's server --------------------------------------------------------------------------------------------


def test_a_remote_server_gets_adapters_under_names_of_our_own_and_forgets_them_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DSVLLM_API_KEY", "secret")
    fake = FakeVllm()
    fake.models = ["their-model", "their-adapter"]
    keys = []
    answer = fake.answer
    monkeypatch.setattr(fake, "answer", lambda path, body, key: (keys.append(key), answer(path, body, key))[1])
    with served(fake, port=True) as url:
        server = RemoteServer(f"{url}/v1")
        server.wait_ready(10.0)
        assert (server.alive, server.spec.served_name, server.uds) == (True, "their-model", url)
        sync = WeightSync(server, EngineClient(server.uds))
        loaded = [sync.push(FOLDER, "adapter", step).model_name for step in (1, 2)]
        assert fake.models == ["their-model", "their-adapter", loaded[1]]
        assert "without --enable-sleep-mode" in str(sync.rest())
        assert sync.stream_path()[0] is None
        server.stop()
        server.stop()
        sync.client.close()
    assert fake.models == ["their-model", "their-adapter"]
    assert all(name.startswith("dsvllm-") for name in loaded)
    assert set(keys) == {"Bearer secret"}


def test_a_remote_server_is_never_restarted() -> None:
    fake = FakeVllm()
    fake.failing["/collective_rpc"] = "refuse"
    with served(fake, port=True) as url:
        server = RemoteServer(str(url))
        server.wait_ready(10.0)
        sync = WeightSync(server, EngineClient(server.uds))
        with pytest.raises(EngineError, match="not ours to restart"):
            sync.push(FOLDER, "full", 1)
        sync.client.close()


def test_a_remote_server_without_adapters_says_so_before_anything_is_sent() -> None:
    fake = FakeVllm()
    fake.routes -= {"/v1/load_lora_adapter"}
    with served(fake, port=True) as url:
        server = RemoteServer(str(url))
        server.wait_ready(10.0)
        with pytest.raises(EngineError, match="started without LoRA"):
            WeightSync(server, EngineClient(server.uds)).push(FOLDER, "adapter", 1)


def test_a_remote_server_that_is_not_there_is_an_error_after_its_deadline(free_port: int) -> None:
    server = RemoteServer(f"http://127.0.0.1:{free_port}")
    assert not server.alive
    with pytest.raises(EngineError, match=r"did not answer within 0 s"):
        server.wait_ready(0.1)
    server.stop()
