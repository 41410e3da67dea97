"""Speed and memory of exports against what users do by hand, on the same files in the same run.

    python benchmarks/export_speed.py write --shape 8b --kind lora --work FOLDER
    python benchmarks/export_speed.py merge --shape 8b --kind lora --work FOLDER --out result.json
    torchrun --nproc_per_node 4 benchmarks/export_speed.py checkpoint --shape 8b --work FOLDER
    python benchmarks/export_speed.py zero --shape 8b --work FOLDER --out result.json

`write` makes a random model of a real shape and a random adapter, `merge` exports them (made if need be) with this
package and with PEFT's merge_and_unload and save_pretrained, then compares every tensor in steps of bf16.  Of QLoRA
there are two ways by hand: merged into the 4-bit base it was trained on, as most do it (the result is 4 bit and not
compared), and into the base dequantised before.  `checkpoint` writes a ZeRO-3 checkpoint after one step of Adam, or,
with --no_moments, of plain SGD, whose checkpoint holds the fp32 weights alone and which fits one GPU with 8B;
`zero` converts it with this package and with DeepSpeed's zero_to_fp32, and compares every tensor.  Each way runs in a
process of its own; imports, the start of CUDA and the proof by logits are not counted (the proof has a row of its own).
FOLDER decides what is measured: /dev/shm is memory, another place is its disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from export_measures import disk_rate, host, sync_folder, use_memory, watched

ROOT = Path(__file__).resolve().parent.parent
SHARD = "5GB"
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
       "bnb_4bit_quant_storage": "uint8"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "merge", "checkpoint", "zero", "child"])
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--kind", default="lora", choices=["lora", "qlora"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", help="for the child: which way of doing it")
    parser.add_argument("--no_proof", action="store_true", help="leave out the row with the comparison of logits")
    parser.add_argument(
        "--only_ours", action="store_true", help="leave out PEFT's row, where the disk is what is measured"
    )
    parser.add_argument(
        "--no_compare", action="store_true", help="leave out the comparison of tensors, which reads both results"
    )
    parser.add_argument("--no_moments", action="store_true", help="a checkpoint of plain SGD instead of Adam")
    args = parser.parse_args()
    if args.what == "child":
        print(json.dumps(WAYS[args.way](args)), flush=True)
    elif args.what == "write":
        write_run(args)
    elif args.what == "checkpoint":
        write_checkpoint(args)
    else:
        result = measure_merge(args) if args.what == "merge" else measure_zero(args)
        print(json.dumps(result, indent=2))
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# -- merge


def measure_merge(args: argparse.Namespace) -> dict[str, Any]:
    run = write_run(args)
    results = [args.work / name for name in ("out-ours", "out-peft")]
    for folder in results:
        shutil.rmtree(folder, ignore_errors=True)
    by_hand = [] if args.only_ours else [*(["merge-peft-4bit"] if args.kind == "qlora" else []), "merge-peft"]
    rows = {way: child(args, way) for way in ("merge-ours", *by_hand)}
    if by_hand and not args.no_compare:
        rows["equal"] = child(args, "merge-equal")
    for folder in results:
        shutil.rmtree(folder, ignore_errors=True)
    if not args.no_proof:
        rows["merge-proven"] = child(args, "merge-proven")
    ours = rows["merge-ours"]
    rate = disk_rate(args.work)
    return {
        "shape": args.shape, "kind": args.kind, "work": str(args.work), "host": host(), "run": run.name, "rows": rows,
        "disk_gb_per_s": rate,
        "times_faster": {way: round(rows[way]["seconds"] / ours["seconds"], 2) for way in by_hand},
        "written_gb_per_s": ours.get("written_gb_per_s"), "share_of_disk_rate": round(ours["gb_per_s"] / rate, 2),
    }  # fmt: skip


def write_run(args: argparse.Namespace) -> Path:
    """A base in files of 5 GB, and a run folder with a random adapter; made once for a shape and kind."""
    import torch
    from peft import LoraConfig, get_peft_model
    from standin import SHAPES, write_random_model
    from transformers import AutoConfig, AutoModelForCausalLM

    base, run = args.work / f"base-{args.shape}", args.work / f"run-{args.shape}-{args.kind}"
    if not base.exists():
        write_random_model(SHAPES[args.shape], base)
    if run.exists():
        return run
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16)
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        )
    adapter = run / "snapshots" / "step-1"
    adapter.mkdir(parents=True)
    torch.manual_seed(1)
    state = {name.replace(".default", ""): torch.randn(parameter.shape) * 0.01
             for name, parameter in model.named_parameters() if "lora_" in name}  # fmt: skip
    from safetensors.torch import save_file

    save_file(state, adapter / "adapter_model.safetensors")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.peft_config["default"].save_pretrained(adapter)
    pointer = {"path": "step-1", "step": 1, "kind": "adapter"}
    (run / "snapshots" / "latest.json").write_text(json.dumps(pointer), encoding="utf-8")
    record = {"base_model": str(base), "preset": args.kind, "adapter": args.kind, "dtype": "bfloat16",
              "quantization": NF4 if args.kind == "qlora" else None}  # fmt: skip
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run


def merge_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Everything an export does but the comparison of logits: hashes, merge, writing, manifest, flush, rename.

    `gb_per_s` counts all of it, `written_gb_per_s` merging and writing alone.
    """
    import torch

    from hf_dsvllm.export import make as export

    run, out = args.work / f"run-{args.shape}-{args.kind}", args.work / "out-ours"
    warm_up()
    export._where_to_compare = lambda *_: ("cpu", "left out of this measurement")
    with watched() as seen:
        report = export.export_model(run, out, progress=False)
    return seen | {
        "gb_per_s": round(report.weights_bytes / seen["seconds"] / 1e9, 2), "write_seconds": report.write_seconds,
        "written_gb_per_s": round(report.weights_bytes / report.write_seconds / 1e9, 2),
        "gb": round(report.weights_bytes / 1e9, 2), "merged_on": report.merged_on, "cuda": torch.cuda.is_available(),
    }  # fmt: skip


def merge_proven(args: argparse.Namespace) -> dict[str, Any]:
    """The whole export with its proof."""
    from hf_dsvllm.export.make import export_model

    run, out = args.work / f"run-{args.shape}-{args.kind}", args.work / "out-proven"
    warm_up()
    with watched() as seen:
        report = export_model(run, out, progress=False)
    shutil.rmtree(out)
    found = report.verification
    figures = None
    if found is not None:
        figures = {"mean_abs_difference": found.mean_abs_difference, "reference_std": found.reference_std,
                   "greedy_agreement": found.greedy_agreement, "adapter_share": found.adapter_share}  # fmt: skip
    return seen | {"verification": figures, "skipped": report.verification_skipped}


def merge_peft(args: argparse.Namespace) -> dict[str, Any]:
    """What PEFT's documentation says: load in bf16, merge_and_unload, save_pretrained.

    A QLoRA base is loaded in 4 bit and dequantised before, so that the result is 16 bit and can be compared.
    """
    return by_hand(args, "out-peft", dequantise=args.kind == "qlora")


def merge_peft_4bit(args: argparse.Namespace) -> dict[str, Any]:
    """merge_and_unload on the 4-bit base, and save that: the result is rounded to 4 bit once more."""
    row = by_hand(args, "out-peft-4bit", dequantise=False)
    shutil.rmtree(args.work / "out-peft-4bit")
    return row


def by_hand(args: argparse.Namespace, name: str, *, dequantise: bool) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base, run, out = args.work / f"base-{args.shape}", args.work / f"run-{args.shape}-{args.kind}", args.work / name
    warm_up()
    settings: dict[str, Any] = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    if args.kind == "qlora":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **NF4)
    with watched() as seen:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **settings)
        model = model.dequantize() if dequantise else model
        model = PeftModel.from_pretrained(model, run / "snapshots" / "step-1").merge_and_unload()
        model.save_pretrained(out, max_shard_size=SHARD)
        AutoTokenizer.from_pretrained(base).save_pretrained(out)
        sync_folder(out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return seen | {"gb_per_s": round(size / seen["seconds"] / 1e9, 2), "gb": round(size / 1e9, 2)}


def merge_equal(args: argparse.Namespace) -> dict[str, Any]:
    """Every tensor of both, in steps between neighbouring bf16 numbers; PEFT adds the delta in bf16, we in fp32."""
    import torch

    from hf_dsvllm.tensors.weights import TensorFolder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # 16 CPUs took 75 s for 8B

    steps: dict[str, int] = {}
    equal = total = 0
    with TensorFolder(args.work / "out-ours") as ours, TensorFolder(args.work / "out-peft") as theirs:
        shared = sorted(set(ours.names) & set(theirs.names))
        for name in shared:
            apart = bf16_steps(ours.get(name, device), theirs.get(name, device))
            steps[name] = int(apart.max())
            equal += int((apart == 0).sum())
            total += apart.numel()
        alone = sorted(set(ours.names) ^ set(theirs.names))
    worst = max(steps, key=lambda name: steps[name])
    return {"tensors": len(shared), "within_one_step": sum(each <= 1 for each in steps.values()),
            "equal_numbers": round(equal / total, 6), "most_steps": steps[worst], "most_steps_in": worst,
            "only_one_has": alone}  # fmt: skip


def bf16_steps(one: Any, other: Any) -> Any:
    """How many bf16 numbers lie between, for each element; 0 and -0 are one number."""
    import torch

    def place(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(one) - place(other)).abs()


# -- ZeRO


def write_checkpoint(args: argparse.Namespace) -> None:
    """One step by random gradients under ZeRO-3 with Adam: the moments are beside the fp32 weights, as in real ones.

    More processes than GPUs share them through gloo (NCCL wants a GPU each): the same files of as many ranks.
    """
    import deepspeed
    import torch
    from standin import SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM

    on_gpu, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    shared = on_gpu and int(os.environ["WORLD_SIZE"]) > gpus
    if shared:
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % gpus)  # DeepSpeed takes it for the device
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if on_gpu and not shared else "gloo")
    rank = int(os.environ["RANK"])
    config = zero_config(SHAPES[args.shape])
    settings = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3}, "checkpoint": {"tag_validation": "Ignore"},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    optimizer = (torch.optim.SGD if args.no_moments else torch.optim.AdamW)(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for number, part in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
        part.grad = torch.randn_like(part)
        engine.optimizer._optimizer_step(number)
        part.grad = None
    checkpoint = args.work / f"zero-{args.shape}" / "checkpoint-1"
    engine.save_checkpoint(str(checkpoint), tag="global_step1")
    if rank == 0:
        model.config.save_pretrained(checkpoint)
    torch.distributed.barrier()


def zero_config(shape: Any) -> dict[str, Any]:
    """Untied whatever the shape says: DeepSpeed's own writer fails on tied weights."""
    return {
        "model_type": "qwen3", "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "vocab_size": shape.vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip


def measure_zero(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("zero-ours", "zero-deepspeed"):
        shutil.rmtree(args.work / f"out-{name}", ignore_errors=True)
    rows = {way: child(args, way) for way in ("zero-ours", "zero-deepspeed")}
    rows["equal"] = child(args, "zero-equal")
    for name in ("zero-ours", "zero-deepspeed"):
        shutil.rmtree(args.work / f"out-{name}", ignore_errors=True)
    ours, theirs = rows["zero-ours"], rows["zero-deepspeed"]
    return {
        "shape": args.shape, "work": str(args.work), "host": host(), "rows": rows,
        "times_faster": round(theirs["seconds"] / ours["seconds"], 2),
        "peak_share": round(ours["peak_added_gib"] / max(theirs["peak_added_gib"], 0.001), 3),
    }  # fmt: skip


def zero_ours(args: argparse.Namespace) -> dict[str, Any]:
    from hf_dsvllm.export import make as export

    export._where_to_compare = lambda *_: ("cpu", "left out of this measurement")
    warm_up()
    use_memory(args.work, room_of(args))
    with watched() as seen:
        report = export.export_model(
            args.work / f"zero-{args.shape}" / "checkpoint-1", args.work / "out-zero-ours", progress=False
        )
    return seen | {"gb_per_s": round(report.weights_bytes / report.write_seconds / 1e9, 2),
                   "write_seconds": report.write_seconds}  # fmt: skip


def zero_deepspeed(args: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's own conversion, straight to bf16 safetensors (0.19 can; older ones write fp32)."""
    import torch
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    out = args.work / "out-zero-deepspeed"
    checkpoint = args.work / f"zero-{args.shape}" / "checkpoint-1"
    warm_up()
    use_memory(args.work, room_of(args))
    with watched() as seen, contextlib.redirect_stdout(sys.stderr):
        convert_zero_checkpoint_to_state_dict(
            str(checkpoint), str(out), dtype=torch.bfloat16, max_shard_size=SHARD, safe_serialization=True
        )
        sync_folder(out)
    return seen


def room_of(args: argparse.Namespace) -> int:
    """Bytes of memory that either way takes anew: the result, and half as much to work in."""
    files = (args.work / f"zero-{args.shape}" / "checkpoint-1").glob("global_step*/*_optim_states.pt")
    return sum(file.stat().st_size for file in files) * 3 // 4


def zero_equal(args: argparse.Namespace) -> dict[str, Any]:
    """Every tensor of both, bit by bit."""
    import torch

    from hf_dsvllm.tensors.weights import TensorFolder

    with TensorFolder(args.work / "out-zero-ours") as ours, TensorFolder(args.work / "out-zero-deepspeed") as theirs:
        shared = sorted(set(ours.names) & set(theirs.names))
        equal = sum(torch.equal(ours.get(name), theirs.get(name)) for name in shared)
        alone = sorted(set(ours.names) ^ set(theirs.names))
    return {"tensors": len(shared), "bit_equal": equal, "only_one_has": alone}


# -- measuring


def child(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Run one way in a fresh process; its last line is the result."""
    command = [sys.executable, __file__, "child", "--way", way, "--shape", args.shape, "--kind", args.kind]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    print(f"{time.strftime('%H:%M:%S')} {way} {args.shape} {args.kind}", file=sys.stderr, flush=True)
    done = subprocess.run([*command, "--work", str(args.work)], env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-4000:])
        return {"error": done.stderr.strip().splitlines()[-1], "seconds": float("nan"), "gb_per_s": float("nan"),
                "peak_added_gib": float("nan")}  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def warm_up() -> None:
    """Start CUDA and the libraries that are imported late."""
    import peft  # noqa: F401
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config  # noqa: F401

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(Qwen3Config(num_hidden_layers=1))

    if torch.cuda.is_available():
        torch.ones(1024, 1024, device="cuda") @ torch.ones(1024, 1024, device="cuda")
        torch.cuda.synchronize()


WAYS = {
    "merge-ours": merge_ours,
    "merge-peft": merge_peft,
    "merge-peft-4bit": merge_peft_4bit,
    "merge-equal": merge_equal,
    "merge-proven": merge_proven,
    "zero-ours": zero_ours,
    "zero-deepspeed": zero_deepspeed,
    "zero-equal": zero_equal,
}

if __name__ == "__main__":
    main()
