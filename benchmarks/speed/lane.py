"""One lane of `train_speed.py`: the planner benchmark's forking worker, running the arms of this grid.

A lane imports everything once and forks a process for each arm, so that an arm starts with a fresh CUDA context and a
fresh engine, and its memory is gone when it ends.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "planner")]

import worker  # noqa: E402
from arms import PLAIN, Arm  # noqa: E402
from gauges import Gauge  # noqa: E402
from lengths import chat_lengths  # noqa: E402


def train(arm: Arm, task: dict[str, Any], gauge: Gauge, steps: list[dict[str, float]], began: float) -> dict[str, Any]:
    """Run `arm`; `steps` gets seconds and tokens of each step."""
    import torch
    import transformers

    from hf_dsvllm import onebit
    from hf_dsvllm.presets import get_preset
    from hf_dsvllm.speedups import apply, attention_order

    if arm.segments:
        os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if gauge.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.init()
    transformers.set_seed(0)
    task = task | {"steps": arm.steps(task["steps"])}
    args = arguments(arm, task)
    gauge.begin("load")
    model, peft = model_of(arm, args, gauge.device)
    gauge.mark("load", then="init")
    trainer = make_trainer(arm, args, model, peft, task["steps"])
    outcomes = apply(trainer, arm.features) if arm.kind == "preset" else []
    if arm.kind == "preset" and get_preset(arm.preset).needs_onebit:
        onebit.attach(trainer)
    require_features(arm, outcomes, gauge.device)
    counter = Counter(steps)
    counter.wrap(trainer)
    clock = worker.Clock(gauge, steps, began + task["stop_after_s"])
    trainer.add_callback(clock.callback(trainer))
    trainer.add_callback(counter.callback())
    clock.wrap_loss(trainer)
    with attention_order(arm.features if arm.kind == "preset" else ()):
        done = trainer.train()
    gauge.mark("end")
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "zero_stage": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)(),
        "attention": trainer.model.config._attn_implementation,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "training_loss": done.training_loss,
        "said": [str(each) for each in outcomes],
    }


def require_features(arm: Arm, outcomes: list[Any], device: str) -> None:
    """Raise RuntimeError if a feature that the arm names was left out: it would be counted as one that brings nothing.

    A default that has nothing to do there (adapters of a full fine-tune) is none; a missing liger-kernel is.  On CPUs,
    where the measurement itself is tried, most are left out.
    """
    if device == "cpu" or arm.kind == "plain":
        return
    from hf_dsvllm.kernels import INSTALL

    named = {word[1:] for word in arm.words if word[0] == "+"}
    lacking = [each for each in outcomes if each.reason and (named & set(each.features) or each.reason == INSTALL)]
    if lacking:
        raise RuntimeError("; ".join(map(str, lacking)))


def arguments(arm: Arm, task: dict[str, Any]) -> Any:
    """The arm's SFTConfig: TRL's defaults with a DeepSpeed dictionary, or one of our presets."""
    from trl import SFTConfig

    from hf_dsvllm import arguments as ours
    from hf_dsvllm import with_presets
    from hf_dsvllm._compat import join_deepspeed_on_cpu
    from hf_dsvllm.ds_config import build, set_key
    from hf_dsvllm.launch import become_single_process

    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="speed-arm-"),
        "per_device_train_batch_size": arm.micro,
        "gradient_accumulation_steps": arm.accumulation,
        "max_steps": task["steps"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-5,
        "max_length": arm.length,
        "packing": arm.batching == "packed",
        "train_sampling_strategy": "group_by_length" if arm.batching == "grouped" else "random",
        "torch_compile": arm.compile,
        "gradient_checkpointing": arm.recompute != "none",
    }
    if arm.recompute == "selective":
        common["gradient_checkpointing_kwargs"] = {"selective": True}
    on_cpu = task["device"] == "cpu"
    if arm.kind == "plain":
        config = hand_written(copy.deepcopy(PLAIN[arm.preset]), arm, on_cpu)
        if config is not None:
            become_single_process()  # as torchrun does
        made = SFTConfig(deepspeed=config, bf16=not on_cpu, use_cpu=on_cpu, **common)
        if config is not None and on_cpu:
            join_deepspeed_on_cpu()
        return made

    def overridden(preset: Any, shape: Any) -> dict[str, Any] | None:
        config = build(preset, shape)
        for key, value in arm.deepspeed if config is not None else ():
            set_key(config, key, value)
        return config

    ours.build = overridden  # type: ignore[attr-defined]  # this process runs one arm and ends
    words = ["none", *arm.features]
    if "nvme" in arm.preset:
        common["nvme_path"] = str(Path(task["work"]) / "nvme")
        Path(common["nvme_path"]).mkdir(exist_ok=True)
    return with_presets(SFTConfig)(ds_preset=arm.preset, ds_speed=words, export_to="none", **common)


def hand_written(zero: dict[str, Any] | None, arm: Arm, on_cpu: bool) -> dict[str, Any] | None:
    """The DeepSpeed file of a plain arm; gloo neither overlaps nor pins."""
    from hf_dsvllm.ds_config import set_key

    if zero is None:
        return None
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    config: dict[str, Any] = dict.fromkeys(sizes, "auto")
    config |= {"bf16": {"enabled": "auto"}, "zero_optimization": zero}
    if on_cpu:
        zero["overlap_comm"] = False
        for name in ("offload_optimizer", "offload_param"):
            if name in zero:
                zero[name]["pin_memory"] = False
    for key, value in arm.deepspeed:
        set_key(config, key, value)
    return config


def model_of(arm: Arm, args: Any, device: str) -> tuple[Any, Any]:
    """Random weights of the shape, and the adapter configuration: a preset's, or a user's of plain TRL."""
    import torch
    from trl import ModelConfig, get_peft_config, get_quantization_config

    from hf_dsvllm import adapters
    from hf_dsvllm.arguments import full_dtype, resolve_preset
    from hf_dsvllm.presets import get_preset

    preset = resolve_preset(args)
    dtype = "float32" if device == "cpu" else "bfloat16"
    # Without dropout, as the recorded baseline and the planner's formulas have it; TRL's default is 0.05.
    config = ModelConfig(model_name_or_path=arm.shape, dtype=dtype, lora_target_modules="all-linear", lora_dropout=0.0)
    if preset is not None:
        wanted = full_dtype(preset, device)
        config.dtype = wanted
        adapters.apply_to_model_config(config, preset, device=device, full_dtype=wanted)
    else:
        config.use_peft, config.load_in_4bit = arm.adapter is not None, arm.adapter == "qlora"
        config.use_bnb_nested_quant = arm.adapter == "qlora"
    stage = preset if preset is not None else get_preset("zero3" if arm.preset in ("z3", "z3o") else "zero2")
    made = worker.build_model(arm, stage, getattr(torch, config.dtype), get_quantization_config(config), device)
    return made, get_peft_config(config)


def make_trainer(arm: Arm, args: Any, model: Any, peft: Any, steps: int) -> Any:
    """TRL's trainer on random tokens: of one length, or chat-like."""
    import torch
    from datasets import Dataset
    from trl import SFTTrainer

    rows = arm.world * arm.micro * arm.accumulation * (steps + 1)
    # a packed row holds several samples
    rows *= 8 if arm.mix and arm.batching == "packed" else 1
    lengths = chat_lengths(rows, arm.length) if arm.mix else [arm.length] * rows
    high = 1000 if arm.shape == "tiny" else 150_000
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(2, high, (length,), generator=generator).tolist() for length in lengths]
    if arm.batching != "packed":
        args.dataset_kwargs = {"skip_prepare_dataset": True}
    columns: dict[str, Any] = {"input_ids": tokens}
    if arm.batching != "packed":
        columns |= {"labels": tokens, "length": lengths}
    args.remove_unused_columns = arm.batching == "packed"
    data = Dataset.from_dict(columns)
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=worker.tokenizer(), peft_config=peft)


class Counter:
    """Tokens of each step on this process, with and without padding, and the sum of squared lengths for attention."""

    def __init__(self, steps: list[dict[str, float]]) -> None:
        self.steps = steps
        self.now = [0, 0, 0]

    def wrap(self, trainer: Any) -> None:
        inner = trainer.compute_loss

        def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.count(inputs)
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    def count(self, inputs: dict[str, Any]) -> None:
        mask, starts = inputs.get("attention_mask"), inputs.get("cu_seq_lens_q")
        lengths = mask.sum(dim=1) if mask is not None else starts.diff()
        self.now[0] += inputs["input_ids"].numel()
        self.now[1] += int(lengths.sum())
        self.now[2] += int((lengths.long() ** 2).sum())

    def callback(self) -> Any:
        from transformers import TrainerCallback

        counter = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                padded, real, squares = counter.now
                counter.now = [0, 0, 0]
                counter.steps[-1] |= {"padded": padded, "real": real, "squares": squares}

        return Callback()


def arm_of(task: dict[str, Any]) -> Arm:
    """The arm in a task that came as JSON."""
    fields = dict(task["cell"])
    fields["words"], fields["features"] = tuple(fields["words"]), tuple(fields["features"])
    return Arm(**{**fields, "deepspeed": tuple(map(tuple, fields["deepspeed"]))})


def run_arm(task: dict[str, Any]) -> dict[str, Any]:
    """The record of one rank: the planner benchmark's, with an arm for the cell."""
    return worker.run_cell(task, arm_of(task), train)


def attention(task: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of causal attention by backend, forward and backward, with as many key heads as query heads and fewer."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from hf_dsvllm.calibrate import seconds_of

    rates: dict[str, Any] = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    if task["device"] == "cpu":
        return rates
    backends = {
        "as it comes": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for keys in (32, 8):
        q, k, v = (
            torch.randn(2, heads, 4096, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (32, keys, keys)
        )
        flops, gradient = 2 * 2 * 32 * 4096**2 * 128, torch.randn_like(q)
        for name, backend in backends.items():

            def run(q: Any = q, k: Any = k, v: Any = v) -> Any:
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])

            def both(run: Any = run, gradient: Any = gradient) -> None:
                run().backward(gradient)

            with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                try:
                    forward = seconds_of(run, "cuda", 10)
                    backward = seconds_of(both, "cuda", 10) - forward
                except RuntimeError as error:
                    rates[f"{name}, {keys} key heads"] = str(error)[:200]
                    continue
            rates[f"{name}, {keys} key heads"] = {
                "forward_tflops": round(flops / forward / 1e12, 1),
                "backward_tflops": round(2.5 * flops / backward / 1e12, 1),
            }
    return rates


worker.TASKS |= {"cell": run_arm, "attention": attention}

if __name__ == "__main__":
    worker.main()
