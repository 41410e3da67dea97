"""Train a tiny model under an offloading preset, two processes: PRESET OUT kept|overlapped|both|as-it-comes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments, set_seed

from hf_dsvllm import offload, overlap_offload, with_presets
from hf_dsvllm.speedups import apply

preset, out, how = sys.argv[1:]
args: Any = with_presets(TrainingArguments)(
    output_dir=f"{out}/{preset}-{how}", ds_preset=preset, use_cpu=True, bf16=False, export_to="none", report_to=[],
    per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=4, logging_steps=1, save_strategy="no",
    learning_rate=1e-2, max_grad_norm=0.5,
)  # fmt: skip
set_seed(0)
shape = Qwen3Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=128, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
tokens = torch.randint(0, 128, (64, 16), generator=torch.Generator().manual_seed(0)).tolist()
trainer = Trainer(
    model=Qwen3ForCausalLM(shape), args=args, train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens})
)
overlap_offload.PIECE, overlap_offload.SLOT = 1 << 12, 1 << 10  # several of them in a model as small as this
FEATURES = {"kept": ("gpu_gradients",), "overlapped": ("overlap_offload",), "as-it-comes": ()}
features = FEATURES["kept"] + FEATURES["overlapped"] if how == "both" else FEATURES[how]
outcomes = apply(trainer, features)
trainer.train()
optimizer = trainer.deepspeed.optimizer
if trainer.deepspeed.zero_optimization_stage() == 3:
    pieces = getattr(optimizer, offload.PIECES)
    base = optimizer.grad_partitions_flat_buffer.untyped_storage().data_ptr()
    whole = all(piece.untyped_storage().data_ptr() == base for piece in pieces.values())
    used = bool(optimizer.grad_partitions_flat_buffer.any()) and whole
else:
    sums = optimizer.accumulated_grads_in_cpu
    used = len(sums) > 0 and isinstance(sums, offload._Sums) == ("gpu_gradients" in features)
weights = []
for parameter in trainer.model.parameters():
    with deepspeed.zero.GatheredParameters([parameter]):
        weights.append(parameter.detach().double().abs().sum().item())
adam = optimizer.optimizer.ds_opt_adam
overlaps = isinstance(adam, overlap_offload._InPieces)
found = {
    "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    "norms": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
    "used": used,
    "overlaps": overlaps,
    "clipped": overlaps and adam.factor is not None,
    "weights": weights,
    "said": [str(each) for each in outcomes],
}
Path(out, f"{preset}-{how}-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
