"""One lane of the planner's measurement: a process that imports everything once and forks a child for each cell.

Reads one JSON object a line on stdin (`{"task": "cell" | "calibrate" | "collectives" | "probe", ...}`), writes
`{"started": pid}` and `{"ended": pid, "code": n}` on stdout.  CUDA is never touched before the fork: a child of a
process that has initialised it cannot use it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gauges import Clock, Gauge, memory_kinds
from matrix import HEAD_DIM, SHAPES, VOCAB, Cell

PRELOAD = (
    "transformers", "transformers.models.qwen3.modeling_qwen3", "transformers.trainer", "datasets", "accelerate",
    "bitsandbytes", "peft", "deepspeed", "trl", "trl.trainer.sft_trainer", "hf_dsvllm.arguments", "hf_dsvllm.adapters",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preload", choices=("all", "none"), default="all", help="import before or after the fork")
    options = parser.parse_args()
    die_with_parent()
    # cells print what they like: only our own lines reach the orchestrator
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    began = time.monotonic()
    if options.preload == "all":
        preload()
    print(json.dumps({"ready": round(time.monotonic() - began, 1)}), file=replies)
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            replies.close()
            child(task)
        print(json.dumps({"started": pid}), file=replies)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), file=replies)


def die_with_parent() -> None:
    """A measurement that is killed leaves no cell on a GPU."""
    set_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def preload() -> None:
    """Import without a CUDA context: bitsandbytes asks for the compute capability, which NVML knows as well."""
    import torch

    asked = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = capability_from_driver  # type: ignore[assignment]
    try:
        for name in PRELOAD:
            importlib.import_module(name)
    finally:
        torch.cuda.get_device_capability = asked


def capability_from_driver(device: object = None) -> tuple[int, int]:
    import pynvml

    pynvml.nvmlInit()
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
    return int(major), int(minor)


def child(task: dict[str, Any]) -> None:
    """Run one task in this forked process and leave without tearing anything down."""
    code = 1
    try:
        die_with_parent()
        os.environ.update(task["env"])
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        write(Path(task["result"]), TASKS[task["task"]](task))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write(path: Path, value: Any) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value), encoding="utf-8")
    scratch.rename(path)


def probe(task: dict[str, Any]) -> dict[str, Any]:
    """Whether a fork of this lane can use its GPU."""
    import torch

    if task["device"] == "cuda":
        torch.ones(8, device="cuda").sum().item()
    return {"device": torch.cuda.get_device_name() if task["device"] == "cuda" else "cpu"}


def calibrate(task: dict[str, Any]) -> dict[str, Any]:
    from hf_dsvllm import calibrate as rates

    return rates.measure(device=task["device"], adam=False)


def adam(task: dict[str, Any]) -> dict[str, Any]:
    """The rate that `calibrate` leaves out: DeepSpeed's op may still be compiled then, which all would wait for."""
    from hf_dsvllm import calibrate as rates

    return {"adam_parameters_per_s": rates.cpu_adam_rate()}


def collectives(task: dict[str, Any]) -> dict[str, Any]:
    from hf_dsvllm import calibrate as rates

    return rates.measure_collectives(device=task["device"])


# -- one training run


def run_cell(
    task: dict[str, Any], cell: Any = None, run: Callable[..., dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The record of one rank: what `run` (here `train`) returns, or how it failed, and what it took."""
    began = time.monotonic()
    cell = cell or Cell(**task["cell"])
    gauge = Gauge(task["device"])
    record: dict[str, Any] = {"status": "ok", "rank": int(os.environ.get("RANK", "0"))}
    steps: list[dict[str, float]] = []
    try:
        record |= (run or train)(cell, task, gauge, steps, began)
    except BaseException as error:
        memory = "out of memory" in str(error).lower() or isinstance(error, MemoryError)
        record |= {"status": "oom" if memory else "failed", "message": f"{type(error).__name__}: {error}"[:1500]}
        record["phase"] = gauge.current
        traceback.print_exc()
        with contextlib.suppress(Exception):
            gauge.mark(gauge.current + " (broken off)")
    record |= {"phases": gauge.phases, "steps": steps, "seconds": round(time.monotonic() - began, 2)}
    record["host_kinds"] = memory_kinds()
    if task["device"] == "cuda":
        import torch

        with contextlib.suppress(Exception):
            free, total = torch.cuda.mem_get_info()
            record["outside_allocator"] = total - free - torch.cuda.memory_reserved()
            record["device_total"] = total
            record["retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        with contextlib.suppress(Exception):
            record["pinned"] = {key: value for key, value in torch.cuda.host_memory_stats().items() if "bytes" in key}
    return record


def train(
    cell: Cell, task: dict[str, Any], gauge: Gauge, steps: list[dict[str, float]], began: float
) -> dict[str, Any]:
    import torch

    if gauge.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.init()
    import transformers
    from trl import ModelConfig, get_peft_config, get_quantization_config

    from hf_dsvllm import adapters
    from hf_dsvllm.arguments import full_dtype, resolve_preset

    transformers.set_seed(0)
    out = tempfile.mkdtemp(prefix="planner-cell-")
    args = arguments(cell, out, task["steps"])
    preset = resolve_preset(args)
    assert preset is not None
    model_args = ModelConfig(model_name_or_path=cell.shape)
    adapters.apply_to_model_config(model_args, preset, device=gauge.device, full_dtype=full_dtype(preset, gauge.device))
    quantization, peft = get_quantization_config(model_args), get_peft_config(model_args)
    gauge.begin("load")
    model = build_model(cell, preset, getattr(torch, model_args.dtype), quantization, gauge.device)
    if cell.loss == "plain" and peft is not None:
        model = adapters.wrap(model, peft, args)
        peft = None
    gauge.mark("load", then="init")
    trainer = make_trainer(cell, args, model, peft)
    del model
    gc.collect()
    clock = Clock(gauge, steps, began + task["stop_after_s"])
    trainer.add_callback(clock.callback(trainer))
    clock.wrap_loss(trainer)
    out_ = trainer.train()
    gauge.mark("end")
    count = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "zero_stage": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)(),
        "trainable": sum(n for n, grad in count if grad),
        "training_loss": out_.training_loss,
    }


def arguments(cell: Cell, out: str, steps: int) -> Any:
    from transformers import TrainingArguments
    from trl import SFTConfig

    from hf_dsvllm import with_presets

    common: dict[str, Any] = {
        "output_dir": out,
        "ds_preset": cell.preset,
        "per_device_train_batch_size": cell.micro,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_checkpointing": cell.recompute,
        "max_steps": steps,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "learning_rate": 1e-5,
        "export_to": "none",
    }
    if cell.loss == "plain":
        return with_presets(TrainingArguments)(**common)
    return with_presets(SFTConfig)(max_length=cell.length, dataset_kwargs={"skip_prepare_dataset": True}, **common)


def config_of(shape: str) -> Any:
    from transformers import Qwen3Config

    hidden, inner, layers, heads, kv_heads, tied = SHAPES[shape]
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32 if shape == "tiny" else HEAD_DIM,
        vocab_size=1024 if shape == "tiny" else VOCAB,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        architectures=["Qwen3ForCausalLM"],
    )


def build_model(cell: Cell, preset: Any, dtype: Any, quantization: Any, device: str) -> Any:
    """Random weights of the shape, made on the device: shards under ZeRO-3, 4-bit where the preset says so."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(cell.shape)
    if quantization is not None:
        return quantised_model(config, dtype, quantization, device)
    if preset.zero_stage == 3:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def quantised_model(config: Any, dtype: Any, quantization: Any, device: str) -> Any:
    """The path a recipe takes (`from_pretrained` quantises layer by layer), fed with one pool of random numbers."""
    import torch
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in Qwen3ForCausalLM(config).state_dict().items()}
    pool = torch.randn(max(size.numel() for size in sizes.values()), device=device, dtype=dtype).mul_(0.02)
    weights = {}
    for name, size in sizes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        view = pool[: size.numel()].view(size)
        # what is not quantised must not share memory with the pool
        weights[name] = view if name.endswith("proj.weight") else view.clone()
    place = {"": torch.cuda.current_device()} if device == "cuda" else None
    return Qwen3ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        quantization_config=quantization,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map=place,
    )


def make_trainer(cell: Cell, args: Any, model: Any, peft: Any) -> Any:
    import torch
    from datasets import Dataset
    from transformers import Trainer, default_data_collator
    from trl import SFTTrainer

    rows = cell.world * cell.micro * cell.accumulation * 6
    high = 1000 if cell.shape == "tiny" else 150_000
    tokens = torch.randint(2, high, (rows, cell.length), generator=torch.Generator().manual_seed(0)).tolist()
    if cell.loss == "plain":
        data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
        return Trainer(model=model, args=args, train_dataset=data, data_collator=default_data_collator)
    data = Dataset.from_dict({"input_ids": tokens})
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=peft)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "<unk>": 2}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "cell": run_cell,
    "calibrate": calibrate,
    "adam": adam,
    "collectives": collectives,
    "probe": probe,
}

if __name__ == "__main__":
    main()
