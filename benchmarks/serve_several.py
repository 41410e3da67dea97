"""Several exports on one address under load: `python benchmarks/serve_several.py NAME=PATH … --out result.json`.

Starts `hf-dsvllm serve` on the paths, sends concurrent chat requests to every model through the one address with the
`openai` client (with httpx where that is not installed), and writes seconds until each model was ready, tokens per
second of each model alone and of all at once.  With `--alone` each path also gets a server to itself: so an adapter on
its base is compared with the merged model of the same run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="exports and adapters, NAME=PATH")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--requests", type=int, default=64, help="for each model")
    parser.add_argument("--concurrent", type=int, default=32, help="for each model")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--max_model_len", type=int, default=2048)
    parser.add_argument("--vllm_args", default="", help="more arguments for vLLM, as one string")
    parser.add_argument("--alone", action="store_true", help="serve and load each path by itself, too")
    parser.add_argument("--ready_s", type=float, default=420)
    args = parser.parse_args()
    rounds = [args.paths, *([[path] for path in args.paths] if args.alone else [])]
    result = {"host": host(), "requests": args.requests, "concurrent": args.concurrent, "answer_tokens": args.tokens,
              "rounds": [one_round(paths, args) for paths in rounds]}  # fmt: skip
    print(json.dumps(result, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def one_round(paths: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Serve `paths` together, load them, stop."""
    command = [sys.executable, "-m", "hf_dsvllm", "serve", *paths, "--port", str(args.port)]
    command += ["--max_model_len", str(args.max_model_len), "--", *args.vllm_args.split()]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    started = time.perf_counter()
    names = [path.partition("=")[0] if "=" in path else Path(path).name for path in paths]
    log = Path(f"{args.out or 'serve'}.{'-'.join(names)}.log")
    with log.open("w+", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=env)
        try:
            ready = wait_ready(process, log, names, started, args.ready_s)
            if "error" in ready:
                return {"models": names, **ready}
            url = f"http://127.0.0.1:{args.port}/v1"
            first = {name: first_token(url, name) for name in names}
            alone = {name: load(url, [name], args) for name in names}
            together = load(url, names, args) if len(names) > 1 else None
        finally:
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    return {"models": names, "ready_seconds": ready, "first_answer_seconds": first, "alone": alone,
            "together": together, "exit_code": code}  # fmt: skip


def wait_ready(
    process: subprocess.Popen[str], log: Path, names: Sequence[str], started: float, limit: float
) -> dict[str, Any]:
    while time.perf_counter() - started < limit:
        text = log.read_text(encoding="utf-8", errors="replace")
        if all(re.search(rf"^Ready: {re.escape(name)} answers", text, re.MULTILINE) for name in names):
            return {"all": round(time.perf_counter() - started, 1)}
        if process.poll() is not None:
            return {"error": text[-2000:]}
        time.sleep(0.2)
    return {"error": f"not ready after {limit} s: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}"}


def load(url: str, names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Concurrent requests to all `names` at once; tokens per second of each and of all."""
    ask = asker(url)
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.concurrent * len(names)) as pool:
        asked = {name: [pool.submit(ask, name, number, args.tokens) for number in range(args.requests)]
                 for name in names}  # fmt: skip
        tokens = {name: sum(future.result() for future in futures) for name, futures in asked.items()}
    seconds = time.perf_counter() - started
    rates = {name: round(count / seconds, 1) for name, count in tokens.items()}
    return {"seconds": round(seconds, 2), "tokens_per_second": rates, "all": round(sum(tokens.values()) / seconds, 1)}


def first_token(url: str, name: str) -> float:
    started = time.perf_counter()
    asker(url)(name, 0, 1)
    return round(time.perf_counter() - started, 2)


def asker(url: str) -> Callable[[str, int, int], int]:
    """A function that asks one question and returns how many tokens came back."""

    def body(name: str, number: int, tokens: int) -> dict[str, Any]:
        words = " ".join(f"t{(number * 37 + each) % 900}" for each in range(128))
        return {"model": name, "messages": [{"role": "user", "content": words}], "max_tokens": tokens,
                "temperature": 0.0}  # fmt: skip

    try:
        from openai import OpenAI
    except ImportError:
        import httpx

        plain = httpx.Client(base_url=url, timeout=600, trust_env=False, limits=httpx.Limits(max_connections=None))

        def by_httpx(name: str, number: int, tokens: int) -> int:
            answer = plain.post("/chat/completions", json=body(name, number, tokens) | {"ignore_eos": True})
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

        return by_httpx
    client = OpenAI(base_url=url, api_key=os.environ.get("VLLM_API_KEY", "none"), timeout=600)

    def by_openai(name: str, number: int, tokens: int) -> int:
        answer = client.chat.completions.create(**body(name, number, tokens), extra_body={"ignore_eos": True})
        assert answer.usage is not None
        return answer.usage.completion_tokens

    return by_openai


def host() -> str:
    from hf_dsvllm.hardware import detect

    return detect().describe()


if __name__ == "__main__":
    main()
