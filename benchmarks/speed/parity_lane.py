"""One lane of `parity.py`: the same short SFT of a real model under plain TRL and under presets, losses kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lane
from arms import Arm
from lane import worker

LORA, FULL = 2e-4, 2e-5  # learning rates


def train(arm: Arm, task: dict[str, Any], gauge: Any, steps: list[dict[str, float]], began: float) -> dict[str, Any]:
    """Losses of every step of `arm`, whose case names the seed (`seed3`)."""
    import torch
    import transformers
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations import is_deepspeed_zero3_enabled
    from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config

    from hf_dsvllm import adapters
    from hf_dsvllm.arguments import full_dtype, resolve_preset
    from hf_dsvllm.speedups import apply, attention_order

    del steps, began
    if gauge.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    seed = int(arm.case.removeprefix("seed"))
    args = lane.arguments(arm, task)
    args.seed = args.data_seed = seed
    args.learning_rate = LORA if arm.adapter else FULL
    transformers.set_seed(seed)
    preset, path = resolve_preset(args), os.environ["PARITY_MODEL"]
    dtype = "float32" if gauge.device == "cpu" else "bfloat16"
    config = ModelConfig(model_name_or_path=path, dtype=dtype, lora_target_modules="all-linear", lora_dropout=0.0)
    config.use_peft = arm.adapter is not None
    config.load_in_4bit = config.use_bnb_nested_quant = arm.adapter == "qlora"
    if preset is not None:
        config.dtype = full_dtype(preset, gauge.device)
        adapters.apply_to_model_config(config, preset, device=gauge.device, full_dtype=config.dtype)
    gauge.begin("load")
    quantization = get_quantization_config(config)
    placed = {"quantization_config": quantization} if quantization else {}
    if quantization and not is_deepspeed_zero3_enabled():
        placed["device_map"] = {"": args.device}
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, config.dtype), attn_implementation="sdpa", **placed
    )
    gauge.mark("load", then="init")
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=load_dataset("json", data_files=os.environ["PARITY_DATA"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=get_peft_config(config),
    )
    features = arm.features if arm.kind == "preset" else ()
    outcomes = apply(trainer, features)
    lane.require_features(arm, outcomes, gauge.device)
    with attention_order(features):
        trainer.train()
    gauge.mark("end")
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "said": [str(each) for each in outcomes],
    }


def run(task: dict[str, Any]) -> dict[str, Any]:
    return worker.run_cell(task, lane.arm_of(task), train)


worker.TASKS |= {"cell": run}

if __name__ == "__main__":
    assert Path(os.environ["PARITY_MODEL"]).is_dir()
    worker.main()
