"""Partitioned DeepSpeed checkpoints of every kind in one torchrun: `zero_checkpoints.py SPEC.json`.

SPEC is [{"name", "base", "stage", "adapter" (settings of a LoraConfig), "vocab_size" (resized to), "out"}]: one
optimizer step of the model in `base`, then OUT/checkpoint-1 as the Trainer leaves it without gathered weights, and
OUT/truth.safetensors, what DeepSpeed's own zero_to_fp32 makes of it.  Frozen weights are left out, as the Trainer does,
unless the vocabulary was resized.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    deepspeed.init_distributed("gloo")
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        write_checkpoint(case, Path(case["out"]))


def write_checkpoint(case: dict[str, Any], out: Path) -> None:
    checkpoint = out / "checkpoint-1"
    model = AutoModelForCausalLM.from_pretrained(case["base"], dtype=torch.bfloat16)
    torch.manual_seed(1)
    if case.get("vocab_size"):
        model.resize_token_embeddings(case["vocab_size"], mean_resizing=False)
    if case.get("adapter"):
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **case["adapter"]))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = torch.arange(4, 20)[None] + int(os.environ["RANK"])
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    without_frozen = bool(case.get("adapter")) and not case.get("vocab_size")
    engine.save_checkpoint(str(checkpoint), tag="global_step1", exclude_frozen_parameters=without_frozen)
    if os.environ["RANK"] == "0":
        describe(engine.module, case, checkpoint)
        (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")  # what the Trainer writes last
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        save_file({name: tensor.clone() for name, tensor in state.items()}, out / "truth.safetensors")
    torch.distributed.barrier()
    engine.destroy()


def describe(model: Any, case: dict[str, Any], checkpoint: Path) -> None:
    """The configuration beside the partitions; an adapter's own file has PEFT's names and empty tensors."""
    if not case.get("adapter"):
        model.config.save_pretrained(checkpoint)
        return
    model.save_pretrained(checkpoint, state_dict={name: torch.empty(0) for name in model.state_dict()})


if __name__ == "__main__":
    main()
