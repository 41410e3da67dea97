"""The same training without this package: TRL's SFTTrainer with a DeepSpeed configuration written by hand.

    torchrun --nproc_per_node 2 benchmarks/plain_trl.py --zero2 bf16 --train_file train.jsonl \
        --model_name_or_path MODEL --output_dir runs/plain …

Takes TRL's SFTConfig and ModelConfig flags; writes OUTPUT_DIR/measured.json with the fields a run of this package
writes, measured in the same places.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

GIB = 1 << 30
ZERO2: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": 200_000_000,
        "allgather_bucket_size": 200_000_000,
    },
}


@dataclasses.dataclass
class PlainArguments:
    train_file: str = dataclasses.field(metadata={"help": "JSONL file to train on."})
    zero2: str | None = dataclasses.field(
        default=None,
        metadata={"help": "ZeRO-2, gradients accumulated in bf16 (DeepSpeed's default) or fp32.",
                  "choices": ["bf16", "fp32"]},
    )  # fmt: skip


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step; memory peaks from the first step on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self._begun)


def main() -> None:
    parser = TrlParser((PlainArguments, SFTConfig, ModelConfig))
    plain, args, model_args = parser.parse_args_and_config()
    if plain.zero2:
        config = ZERO2 | ({"data_types": {"grad_accum_dtype": "fp32"}} if plain.zero2 == "fp32" else {})
        # A new object, because TrainingArguments derives its state when it is made.
        args = dataclasses.replace(args, deepspeed=config)
    args.model_init_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    timer = StepTimer()
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=load_dataset("json", data_files=plain.train_file, split="train"),
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=[timer],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        record = measured(timer.seconds, trainer.state.log_history)
        record["engine"] = type(trainer.model_wrapped).__name__
        path = Path(args.output_dir) / "measured.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measured(seconds: list[float], log: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of this package's measured.json; memory in GiB, of this process."""
    tokens = int([row["num_tokens"] for row in log if "num_tokens" in row][-1])
    record: dict[str, Any] = {
        "steps": len(seconds),
        "step_seconds": round(sum(seconds), 3),
        "median_step_seconds": round(statistics.median(seconds), 4),
        "tokens": tokens,
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    if torch.cuda.is_available():
        record["gpu_peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        record["gpu_peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    return record


if __name__ == "__main__":
    main()
