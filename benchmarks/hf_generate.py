"""What evaluation by `model.generate` costs: the same prompts, greedy, batched, after loading.

python benchmarks/hf_generate.py --model MODEL --prompts eval.jsonl --limit 128 --new_tokens 64 --out result.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dsvllm.tasks import load_task, render_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--new_tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # never attended to
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    samples = load_task(options.prompts, limit=options.limit).samples
    prompts = [list(render_prompt(sample, tokenizer)) for sample in samples]
    generate(model, tokenizer, prompts[: options.batch], new_tokens=2)  # the first call pays for loading kernels
    started = time.monotonic()
    tokens = 0
    for start in range(0, len(prompts), options.batch):
        tokens += generate(model, tokenizer, prompts[start : start + options.batch], new_tokens=options.new_tokens)
    seconds = time.monotonic() - started
    record = {
        "samples": len(prompts),
        "generated_tokens": tokens,
        "generate_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "batch": options.batch,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def generate(model: torch.nn.Module, tokenizer: object, prompts: list[list[int]], *, new_tokens: int) -> int:
    """Answer one batch; the number of tokens up to and including each answer's end."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    answers = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)[:, batch["input_ids"].shape[1] :]
    ends = (answers == tokenizer.eos_token_id).cumsum(dim=1).clamp(max=1)
    counts = torch.where(ends.any(dim=1), ends.argmax(dim=1) + 1, answers.shape[1])
    return int(counts.sum())


if __name__ == "__main__":
    main()
