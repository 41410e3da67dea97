"""What `serve` would run, what it refuses, and that the child it runs is gone afterwards (with a stand-in for vLLM)."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_dsvllm import serve as serve_module
from hf_dsvllm.errors import EngineError, MissingDependencyError
from hf_dsvllm.serve import curl_command, detect_port_free, serve, vllm_command, vllm_environment

PYTHON = Path("/opt/vllm/bin/python")

# Stands for vLLM: answers /health and /v1/models and leaves a grandchild behind unless its group is ended.
FAKE_API_SERVER = """
import http.server, json, subprocess, sys
arguments = sys.argv[1:]
value = lambda flag: arguments[arguments.index(flag) + 1]
if "--fail" in arguments:
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"grandchild {child.pid}", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": value("--served-model-name")}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
http.server.HTTPServer((value("--host"), int(value("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "orders"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_adapter(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 12, "base_model_name_or_path": "/models/base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def after(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_an_export_is_served_under_its_folder_name(model: Path) -> None:
    line = vllm_command(model, python=PYTHON, device="cuda", port=8123, max_model_len=512, extra=["--seed", "1"])
    assert line[:3] == [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
    assert after(line, "--model") == str(model)
    assert after(line, "--served-model-name") == "orders"
    assert (after(line, "--host"), after(line, "--port")) == ("127.0.0.1", "8123")
    assert after(line, "--max-model-len") == "512"
    assert "--dtype" not in line
    assert line[-2:] == ["--seed", "1"]


def test_an_adapter_is_served_on_its_base(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    line = vllm_command(adapter, python=PYTHON, device="cuda", name="tuned")
    assert after(line, "--model") == "/models/base"
    assert after(line, "--max-lora-rank") == "16"
    assert after(line, "--lora-modules") == f"tuned={adapter}"
    assert "--enable-lora" in line


def test_a_snapshot_is_served_with_the_tokenizer_of_its_run(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "run" / "snapshots" / "step-3")
    write_run_record(tmp_path / "run", quantization=None)
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "tokenizer_config.json").write_text("{}")
    line = vllm_command(adapter, python=PYTHON, device="cuda")
    assert after(line, "--tokenizer") == str(tmp_path / "run" / "tokenizer")
    assert after(line, "--model") == "/models/recorded"


def write_run_record(run: Path, *, quantization: object) -> None:
    record = {"base_model": "/models/recorded", "adapter": "lora", "quantization": quantization, "dtype": "bfloat16"}
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_an_adapter_that_vllm_would_change_is_refused(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(EngineError, match=named):
        vllm_command(write_adapter(tmp_path / "adapter", **changes), python=PYTHON, device="cuda")


def test_a_qlora_adapter_is_refused_on_the_16_bit_base(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "run" / "snapshots" / "step-3")
    write_run_record(tmp_path / "run", quantization={"bnb_4bit_quant_type": "nf4"})
    with pytest.raises(EngineError, match="4 bit"):
        vllm_command(adapter, python=PYTHON, device="cuda")


def test_a_folder_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="hf-dsvllm export"):
        vllm_command(tmp_path, python=PYTHON, device="cuda")
    with pytest.raises(EngineError, match="is no folder"):
        vllm_command(tmp_path / "typo", python=PYTHON, device="cuda")


@pytest.mark.parametrize("avx512", [True, False])
def test_only_a_cpu_without_avx512_computes_in_float32(
    model: Path, monkeypatch: pytest.MonkeyPatch, avx512: bool
) -> None:
    monkeypatch.setattr(serve_module, "_cpu_has_avx512", lambda: avx512)
    assert ("--dtype" in vllm_command(model, python=PYTHON, device="cpu")) is not avx512


def test_the_environment_loses_launchers_and_unprotected_endpoints() -> None:
    given = {"RANK": "1", "MASTER_PORT": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": "secret", "HOME": "/h"}
    env = vllm_environment(given | {"VLLM_CPU_KVCACHE_SPACE": "7"}, device="cpu")
    assert not {"RANK", "MASTER_PORT", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"} & env.keys()
    assert (env["VLLM_API_KEY"], env["HOME"], env["VLLM_CPU_KVCACHE_SPACE"]) == ("secret", "/h", "7")


def test_the_curl_command_is_one_a_shell_understands() -> None:
    words = shlex.split(curl_command("http://127.0.0.1:8000", "it's", chat=True, keyed=True))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "it's"
    assert "Authorization: Bearer $VLLM_API_KEY" in words
    assert "prompt" in json.loads(shlex.split(curl_command("http://h", "m", chat=False, keyed=False))[-1])


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_taken_port_is_found_before_vllm_starts_and_a_free_one_is_named(model: Path, taken_port: int) -> None:
    assert not detect_port_free("127.0.0.1", taken_port)
    with pytest.raises(EngineError, match=r"in use.*(--port \d+, which is free|stop what listens)"):
        serve(model, port=taken_port, device="cpu")


def test_a_public_address_needs_a_key(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(EngineError, match="VLLM_API_KEY"):
        serve(model, host="0.0.0.0", device="cpu")


def test_print_only_prints_the_command_and_starts_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(model, device="cpu", python=PYTHON, print_only=True) == 0
    printed = capsys.readouterr().out
    assert f"{PYTHON} -m vllm.entrypoints.openai.api_server --model {model}" in printed
    assert "VLLM_CPU_KVCACHE_SPACE" in printed


def test_an_interpreter_without_vllm_is_a_missing_dependency(model: Path, free_port: int, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError):
        serve(model, port=free_port, device="cpu", python=tmp_path / "no-python")


@pytest.fixture
def fake_vllm(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH in which `vllm` is the stand-in."""
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    (package / "api_server.py").write_text(FAKE_API_SERVER)
    return tmp_path / "fake"


def start_serving(model: Path, fake_vllm: Path, port: int, extra: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    script = (
        "import sys; from pathlib import Path; from hf_dsvllm.serve import serve; "
        f"sys.exit(serve(Path({str(model)!r}), port={port}, device='cpu', extra={extra!r}))"
    )
    # A site folder of its own: the stand-in must win over an installed vLLM in the child alone.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(fake_vllm), os.getcwd()])}
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_serving_ends_with_a_signal_and_leaves_no_process(
    model: Path, fake_vllm: Path, free_port: int, number: signal.Signals
) -> None:
    process = start_serving(model, fake_vllm, free_port)
    try:
        seen: list[str] = []
        assert process.stdout is not None
        for text in process.stdout:
            seen.append(text)
            if "curl -s" in text:
                break
        assert any(text.startswith("Ready: orders answers at") for text in seen), seen
        grandchild = int(next(text for text in seen if text.startswith("grandchild")).split()[1])
        process.send_signal(number)
        code = process.wait(60)
        assert code == (-number if number == signal.SIGKILL else 0)
        for _ in range(600):
            if not Path(f"/proc/{grandchild}").exists() and detect_port_free("127.0.0.1", free_port):
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{grandchild}").exists()
        assert detect_port_free("127.0.0.1", free_port)
    finally:
        process.kill()
        process.wait()


def test_a_vllm_that_dies_at_once_is_an_error(model: Path, fake_vllm: Path, free_port: int) -> None:
    process = start_serving(model, fake_vllm, free_port, extra=("--fail",))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "vLLM did not start (exit code 3)" in output
