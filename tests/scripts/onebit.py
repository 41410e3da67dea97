"""Train a tiny model with a 1-bit preset's optimizer: PRESET FREEZE_KEY FOLDER bounded|as-it-comes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as comm
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from hf_dsvllm.onebit import bound_variance, supply_packer
from hf_dsvllm.presets import get_preset

preset, key, out, bounded = sys.argv[1:]
of_any_shape = comm.all_gather


def all_gather(each: list[torch.Tensor], one: torch.Tensor, **more: Any) -> Any:
    """NCCL does not look at shapes; gloo refuses a scalar for a tensor of one element."""
    return of_any_shape(each, one.reshape(each[0].shape), **more)


comm.all_gather = all_gather
supply_packer()
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
shape = Qwen3Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=128,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
settings = {setting.key: setting.value for setting in get_preset(preset).deepspeed}
head = "optimizer.params."
params = {name.removeprefix(head): value for name, value in settings.items() if name.startswith(head)}
params |= {"lr": 1e-3, "weight_decay": 0.0, key: 10}
config = {
    "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0},
    "gradient_clipping": 1.0, "optimizer": {"type": settings["optimizer.type"], "params": params},
}  # fmt: skip
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
if bounded == "bounded":
    bound_variance(engine.basic_optimizer)
rank = int(os.environ["RANK"])
draw = torch.Generator().manual_seed(rank)
follows = torch.randint(0, 128, (128,), generator=torch.Generator().manual_seed(9))
losses = []
for _step in range(40):
    tokens = [torch.randint(0, 128, (4, 1), generator=draw)]
    for _ in range(15):
        tokens.append(follows[tokens[-1]])
    tokens = torch.cat(tokens, 1)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
weights = torch.cat([each.detach().float().flatten() for each in model.parameters()])
found = {"loss": losses, "largest": weights.abs().max().item(), "sum": weights.double().sum().item()}
Path(out, f"{preset}-{bounded}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
