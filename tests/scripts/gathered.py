"""Train a tiny model under ZeRO-3, two processes: PRESET OUT whole|as-it-comes no|yes|reentrant TOKENIZER.

The fourth word is how activations are recomputed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from hf_dsvllm import arguments, with_presets
from hf_dsvllm.ds_config import build, set_key
from hf_dsvllm.speedups import apply

preset, out, how, recompute, tokens_of = sys.argv[1:]


def released(*given: Any) -> Any:
    """The preset's configuration, with every weight let go of and fetched again, as those of large models are."""
    config = build(*given)
    if how != "whole":
        set_key(config or {}, "zero_optimization.stage3_max_reuse_distance", 0)
    set_key(config or {}, "zero_optimization.stage3_param_persistence_threshold", 0)
    return config


arguments.build = released  # type: ignore[attr-defined]  # this process trains once and ends
args: Any = with_presets(SFTConfig)(
    output_dir=f"{out}/{preset}-{how}-{recompute}", ds_preset=preset, use_cpu=True, bf16=False,
    ds_speed=["none", "whole_layers"] if how == "whole" else ["none"],
    export_to="none", report_to=[], per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4,
    logging_steps=1, save_strategy="no", learning_rate=1e-2, max_length=16, max_grad_norm=0.5,
    dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    gradient_checkpointing=recompute != "no",
    gradient_checkpointing_kwargs={"use_reentrant": recompute == "reentrant"} if recompute != "no" else None,
)  # fmt: skip
set_seed(0)
shape = Qwen3Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=6, vocab_size=320, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
tokens = torch.randint(0, 128, (64, 16), generator=torch.Generator().manual_seed(0)).tolist()
lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if "lora" in preset else None
trainer = SFTTrainer(
    model=Qwen3ForCausalLM(shape),
    args=args,
    train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
    processing_class=AutoTokenizer.from_pretrained(tokens_of),
    peft_config=lora,
)
outcomes = apply(trainer, ("whole_layers",) if how == "whole" else ())
gathered: dict[str, list[str]] = {}


def note(index: int) -> None:
    """What is whole on this rank, or on its way, where a layer is computed, or computed again; of the last step."""
    place = f"{'layer' if torch._C._current_graph_task_id() == -1 else 'again'} {index}"
    there = (n for n, p in trainer.model.named_parameters() if p.ds_status.name in ("AVAILABLE", "INFLIGHT"))
    gathered[place] = sorted({name.partition(".layers.")[2].split(".")[0] or name for name in there})


for index, layer in enumerate(trainer.model.get_submodule("base_model.model.model" if lora else "model").layers):
    layer.self_attn.register_forward_pre_hook(lambda *_, index=index: note(index))
trainer.train()
leaves = [type(module).__name__ for module in trainer.model.modules() if getattr(module, "_z3_leaf", False)]
state = trainer.accelerator.get_state_dict(trainer.deepspeed)  # of rank 0 alone, but both must gather
weights = {name: tensor.double().abs().sum().item() for name, tensor in (state or {}).items()}
found = {
    "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    "norms": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
    "leaves": leaves,
    "gathered": gathered,
    "prefetch": trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"][
        "stage3_prefetch_bucket_size"
    ],
    "weights": weights,
    "said": [str(each) for each in outcomes],
}
Path(out, f"{preset}-{how}-{recompute}-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
