"""Train a tiny model at a small learning rate, two processes: PRESET OUT rounded|as-it-comes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments, set_seed

from hf_dsvllm import rounding, with_presets
from hf_dsvllm.speedups import apply

preset, out, how = sys.argv[1:]
args: Any = with_presets(TrainingArguments)(
    output_dir=f"{out}/{preset}-{how}", ds_preset=preset, use_cpu=True, export_to="none", report_to=[],
    per_device_train_batch_size=8, max_steps=60, logging_steps=1, save_strategy="no", learning_rate=2e-5,
    lr_scheduler_type="constant", max_grad_norm=1.0,
)  # fmt: skip
set_seed(0)
shape = Qwen3Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=128, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
tokens = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(0)).tolist() * 512
trainer = Trainer(
    model=Qwen3ForCausalLM(shape), args=args, train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens})
)
if how == "rounded":
    outcomes = apply(trainer, ())
trainer.train()
found = {
    "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    "rounds": isinstance(trainer.deepspeed.basic_optimizer.step, rounding._Step),
    "said": [str(each) for each in outcomes] if how == "rounded" else [],
    "masters": str(trainer.deepspeed.optimizer.single_partition_of_fp32_groups[0].dtype),
}
Path(out, f"{preset}-{how}-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
