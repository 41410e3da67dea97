"""A DeepSpeed ZeRO-3 checkpoint without gathered weights becomes an export equal to the trained parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export import export_model
from tests.tiny import write_tiny_model

# One optimizer step under ZeRO-3, then the partitioned checkpoint, and the gathered fp32 masters beside it.
TRAIN = """
import sys
import deepspeed, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, checkpoint, truth = map(Path, sys.argv[1:])
deepspeed.init_distributed("gloo")
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
tokens = torch.arange(4, 20)[None]
engine.backward(engine(input_ids=tokens, labels=tokens).loss)
engine.step()
engine.save_checkpoint(str(checkpoint), tag="global_step1")
model.config.save_pretrained(checkpoint)
save_file({n: deepspeed.utils.safe_get_full_fp32_param(p).clone() for n, p in model.named_parameters()}, truth)
"""


@pytest.mark.distributed
def test_a_zero3_checkpoint_without_gathered_weights_is_exported(tmp_path: Path, free_port: int) -> None:
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    checkpoint, truth = tmp_path / "output" / "checkpoint-1", tmp_path / "truth.safetensors"
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    command = [sys.executable, "-c", TRAIN, str(base), str(checkpoint), str(truth)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = export_model(tmp_path / "output", tmp_path / "out", base=str(base), progress=False)
    assert (report.kind, report.step) == ("zero", 1)
    assert report.untied == ()
    found = load_file(tmp_path / "out" / "model.safetensors")
    masters = load_file(truth)
    original = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert found.keys() == masters.keys()
    for name, master in masters.items():
        assert torch.equal(found[name], master.to(torch.bfloat16)), name
    assert not torch.equal(found["model.norm.weight"], original["model.norm.weight"])
    assert [item.name for item in (tmp_path / "output").iterdir()] == ["checkpoint-1"]

    (checkpoint / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json"):
        export_model(tmp_path / "output", tmp_path / "out2", progress=False)
