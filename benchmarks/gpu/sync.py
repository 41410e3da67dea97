"""What it takes to bring the trainer's weights into vLLM, phase by phase, and proof that they arrived.

    torchrun --nproc_per_node 1 benchmarks/gpu/sync.py --placement shared --kind full --shape 8b --out result.json
    torchrun --nproc_per_node 1 benchmarks/gpu/sync.py --placement spare --zero 3 --shape 8b --out result.json
    torchrun --nproc_per_node 1 benchmarks/gpu/sync.py --device cpu --shape tiny --work FOLDER --out result.json

`shared`: vLLM on the first trainer's GPU, asleep between rounds, weights by CUDA IPC.  `spare`: vLLM on the first GPU
that no trainer uses, weights by NCCL, beside a bare NCCL broadcast and a device copy in the same run.  Without a GPU:
through a snapshot that is reloaded.  The model is random, of a real shape, and is changed between rounds; vLLM starts
with other random weights (--load-format dummy).  A round's proof: log-probabilities of fixed prompts, vLLM's against
the live model's, and for scale the same difference before the sync, with the weights of the round before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the other benchmarks

import torch
from standin import SHAPES, random_config, write_random_model, write_tokenizer

from hf_dsvllm.engine import EngineClient, EngineServer, EngineSpec, WeightSync
from hf_dsvllm.live import stream as live_weights
from hf_dsvllm.live.snapshot import publish
from hf_dsvllm.transfer.libnccl import Nccl

GIB = 1 << 30
PROMPTS, PROMPT_TOKENS = 4, 64
START_S, SEND_S = 400.0, 120.0
BARE_BYTES, BARE_REPEATS = GIB, 16
RANK = int(os.environ.get("RANK", "0"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--kind", default="full", choices=["full", "lora", "qlora"])
    parser.add_argument("--placement", default="shared", choices=["shared", "spare"])
    parser.add_argument("--zero", type=int, default=0, choices=[0, 2, 3], help="DeepSpeed stage of the trainer")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm_args", default="", help="more arguments for vLLM, as one string")
    parser.add_argument("--work", type=Path, default=Path("runs/sync"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", help="for the child: the id of the bare broadcast")
    args = parser.parse_args()
    if args.peer:
        broadcast_bare(bytes.fromhex(args.peer), rank=1)
        return
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if args.zero or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import deepspeed

        deepspeed.init_distributed("nccl" if args.device == "cuda" else "gloo")
    result: dict[str, Any] = {"case": describe(args)}
    if args.placement == "spare" and args.device == "cuda" and RANK == 0:
        result["bare"] = bare_speeds(spare_gpu())
    model = make_model(args)
    result["weights_gb"] = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) * 2 / 1e9
    with engine(args) as sync:
        result |= {"server": dataclasses.asdict(sync.server.spec) if sync else None, "rounds": []}
        for number in range(args.rounds):
            change(model, number)
            result["rounds"].append(one_round(model, sync, args, number))
            if RANK == 0:
                print(json.dumps(result["rounds"][-1]), flush=True)
        if sync is not None:
            result["vllm"] = sync.capabilities().version
            result["start_seconds"] = sync.server.load_seconds
    if RANK == 0:
        text = json.dumps(result, indent=2, default=str) + "\n"
        print(text)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text, encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What was run on what."""
    versions = {}
    for package in ("torch", "transformers", "deepspeed", "peft", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    given = {key: getattr(args, key) for key in ("shape", "kind", "placement", "zero", "device", "vllm_args")}
    return given | {"card": card, "versions": versions, "processes": int(os.environ.get("WORLD_SIZE", "1"))}


# -- the trainer's side ------------------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace) -> Any:
    """A random bf16 model (fp32 on CPUs) as a trainer holds it: plain, with LoRA, 4-bit with LoRA, under ZeRO."""
    from transformers import AutoModelForCausalLM

    if args.device == "cpu":
        folder = args.work / f"model-{args.shape}"
        if not folder.exists():
            write_random_model(SHAPES[args.shape], folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = random_config(SHAPES[args.shape])
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if args.kind == "qlora":
        quantise(model)
    if args.kind != "full":
        model = adapt(model)
    return under_deepspeed(model, args.zero) if args.zero else model.eval()


def quantise(model: Any) -> None:
    """Every linear layer but the output head to nf4, doubly quantised, as a QLoRA run loads it."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            weight = module.weight.data.cpu()
            packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.cuda())
    model.is_loaded_in_4bit = True  # by which PEFT knows


def adapt(model: Any) -> Any:
    """LoRA of rank 16 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def under_deepspeed(model: Any, stage: int) -> Any:
    """The module after DeepSpeed took it over: flat buffers (2) or shards (3)."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine.module.eval()


def change(model: Any, number: int) -> None:
    """Other weights for each round, the same on every rank: the trained ones, or all."""
    trained = [p for n, p in model.named_parameters() if "lora_B" in n] or list(model.parameters())
    generator = torch.Generator(device=trained[0].device).manual_seed(number)
    with torch.no_grad():
        for parameter in trained:
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.mul_(1.0 + 0.05 * (number + 1))
            elif parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.add_((noise * 0.01).to(parameter.dtype))


@torch.no_grad()
def log_probabilities(model: Any, prompts: list[list[int]]) -> list[list[float]]:
    """The trainer's own: log p of each token but the first; all ranks take part."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda" if torch.cuda.is_available() else "cpu")
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


# -- the engine's side -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine(args: argparse.Namespace) -> Iterator[WeightSync | None]:
    """Rank 0's vLLM, ready to answer; None on the other ranks."""
    if RANK != 0:
        yield None
        return
    args.work.mkdir(parents=True, exist_ok=True)
    server = EngineServer.start(spec_of(args), args.work)
    client = EngineClient(server.uds, default_timeout_s=SEND_S)
    try:
        server.wait_ready(START_S)
        yield WeightSync(server, client)
    finally:
        client.close()
        server.stop()


def spec_of(args: argparse.Namespace) -> EngineSpec:
    common: dict[str, Any] = {"python": Path(sys.executable), "max_model_len": 1024, "enforce_eager": True}
    if args.device == "cpu":
        return EngineSpec(model=args.work / f"model-{args.shape}", device="cpu", dtype="float32", **common)
    folder = args.work / f"config-{args.shape}"
    random_config(SHAPES[args.shape]).save_pretrained(folder)
    write_tokenizer(SHAPES[args.shape], folder)
    shared = args.placement == "shared"
    return EngineSpec(
        model=folder,
        device="cuda",
        dtype="bfloat16",
        kv_cache_bytes=2 * GIB,
        visible_devices=visible()[0] if shared else spare_gpu(),
        weight_transfer="ipc" if shared else "nccl",
        sleep_mode=shared,
        extra_args=("--load-format", "dummy", *shlex.split(args.vllm_args)),
        **common,
    )


def visible() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def spare_gpu() -> str:
    return visible()[int(os.environ.get("WORLD_SIZE", "1"))]


def one_round(model: Any, sync: WeightSync | None, args: argparse.Namespace, number: int) -> dict[str, Any]:
    """Rest, send, ask; seconds of each part, and the proof."""
    rng = torch.Generator().manual_seed(100)
    prompts = torch.randint(0, SHAPES[args.shape].vocabulary - 64, (PROMPTS, PROMPT_TOKENS), generator=rng).tolist()
    row: dict[str, Any] = {"round": number}
    trained = log_probabilities(model, prompts)
    if sync is not None:
        row["difference_before"] = difference(asked(sync, prompts), trained)
        row |= put_to_sleep(sync, args)
    started = time.monotonic()
    if args.device == "cpu":
        snapshot = publish(model, args.work, step=number, dtype=torch.float32)
        row["publish_seconds"] = time.monotonic() - started
        result = sync.push(snapshot.path, snapshot.kind, number) if sync is not None else None
    else:
        merged = args.kind != "full"
        result = live_weights.send(
            model, sync, step=number, dtype=torch.bfloat16, merge_adapters=merged, timeout_s=SEND_S
        )
    row["sync_seconds"] = time.monotonic() - started
    if sync is not None and result is not None:
        sync.client.generate(
            prompts[:1], model=result.model_name, max_new_tokens=1, temperature=0.0, seed=0, stop_token_ids=[]
        )
        row["to_first_token_seconds"] = time.monotonic() - started
        row |= {"path": result.path_used, "why": result.why, "phases": dict(result.phases)}
        row["difference_after"] = difference(asked(sync, prompts), trained)
    return row


def put_to_sleep(sync: WeightSync, args: argparse.Namespace) -> dict[str, Any]:
    if args.placement != "shared":
        return {}
    started = time.monotonic()
    why = sync.rest()
    row: dict[str, Any] = {"sleep_seconds": time.monotonic() - started, "awake_because": why}
    if args.device == "cuda":
        row["gpu_gib_of_others_while_asleep"] = gib_of_others()
    return row


def gib_of_others() -> float:
    """Memory of this GPU that is not ours: vLLM's, and the few hundred MiB of our own CUDA context."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / GIB


def asked(sync: WeightSync, prompts: list[list[int]]) -> list[list[float]]:
    return [sync.client.prompt_logprobs(prompt, sync.server.spec.served_name) for prompt in prompts]


def difference(left: list[list[float]], right: list[list[float]]) -> dict[str, float]:
    """|Δ log p| over all tokens of all prompts."""
    gaps = torch.tensor(left).sub(torch.tensor(right)).abs()
    return {"mean": gaps.mean().item(), "max": gaps.max().item()}


# -- what the hardware gives -------------------------------------------------------------------------------------------


def bare_speeds(gpu: str) -> dict[str, float]:
    """GB/s of NCCL broadcasts of 1 GiB to `gpu` with nothing around them, and of copies within this GPU."""
    nccl = Nccl()
    identity = nccl.unique_id()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    child = subprocess.Popen([sys.executable, __file__, "--peer", identity.hex()], env=environment)
    try:
        seconds = broadcast_bare(identity, rank=0)
        child.wait(60)
    finally:
        child.kill()
    source = torch.empty(BARE_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source))
    return {"nccl_gb_per_s": BARE_BYTES / seconds / 1e9, "device_copy_gb_per_s": BARE_BYTES / copy / 1e9}


def broadcast_bare(identity: bytes, *, rank: int) -> float:
    """Seconds of one broadcast from rank 0 to rank 1, through the calls the transfer uses."""
    torch.cuda.set_device(0)
    nccl = Nccl()
    buffer = torch.ones(BARE_BYTES, dtype=torch.uint8, device="cuda")
    communicator = nccl.join(identity, rank=rank, world_size=2)
    stream = torch.cuda.current_stream().cuda_stream
    one = torch.zeros(1, device="cuda")
    nccl.add_one_float(one.data_ptr(), communicator, stream)
    seconds = timed(lambda: nccl.broadcast_bytes(buffer.data_ptr(), buffer.nbytes, communicator, stream))
    nccl.abort(communicator)
    return seconds


def timed(work: Any) -> float:
    """Seconds of one `work` on the GPU: the mean of many after two to warm up."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(BARE_REPEATS):
        work()
    torch.cuda.synchronize()
    return (time.monotonic() - started) / BARE_REPEATS


if __name__ == "__main__":
    main()
