"""Where vLLM runs beside the trainer, and how much it may take."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from hf_dsvllm.adapters import why_merge_for_engine
from hf_dsvllm.launch import read_launch
from hf_dsvllm.tasks import EvalTask, render_prompt

__all__ = ["Placement", "kv_bytes_per_token", "largest_parameter", "place_engine"]

GIB = 1 << 30
# Sequences the cache should hold at once: enough to keep a GPU busy, small beside a trainer.
CONCURRENT_SEQUENCES = 64
MAX_KV_CACHE_BYTES = 8 * GIB
# The chat template may still change between the check and the run (TRL can clone one): room for its extra tokens.
TEMPLATE_SLACK_TOKENS = 64
FOREIGN_PROMPT_TOKENS = 4096  # prompts that are not ours: few-shot tasks of lm-eval, a chat


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`visible_devices` is the engine's CUDA_VISIBLE_DEVICES (None on CPU); lengths in tokens, sizes in bytes.

    `merge_adapters`: adapters reach the engine merged into a copy of the base instead of hot-loaded.
    """

    visible_devices: str | None
    cpu_threads: int | None
    max_model_len: int
    kv_cache_bytes: int
    merge_adapters: bool
    reason: str


def place_engine(device: str, args: Any, model_args: Any, tasks: Sequence[EvalTask], tokenizer: Any) -> Placement:
    """A GPU the trainer leaves free if there is one, else the main process's GPU, else the CPU."""
    config = load_config(model_args)
    length = context_tokens(args, config, tasks, tokenizer)
    per_token = kv_bytes_per_token(config, element_bytes=4 if device == "cpu" else 2)
    cache = min(max(CONCURRENT_SEQUENCES * length * per_token, GIB), MAX_KV_CACHE_BYTES)
    size = f"sequences up to {length} tokens, {cache / GIB:.1f} GiB of KV cache"
    merging = why_merge_for_engine(model_args, device) if model_args.use_peft else None
    visible, threads = None, None
    if device == "cpu":
        threads = os.cpu_count() or 1
        where = f"the CPU with {threads} threads while training waits"
    else:
        visible, where = choose_gpu(visible_gpus(), read_launch().local_world_size)
    weights = f"; adapters are merged into a copy for it ({merging})" if merging else ""
    return Placement(
        visible_devices=visible,
        cpu_threads=threads,
        max_model_len=length,
        kv_cache_bytes=cache,
        merge_adapters=merging is not None,
        reason=f"vLLM evaluates on {where}; {size}{weights}",
    )


def context_tokens(args: Any, config: Any, tasks: Sequence[EvalTask], tokenizer: Any) -> int:
    """The longest prompt with its answer; for lm-eval and a user's own client what they may send."""
    lengths = [
        len(render_prompt(sample, tokenizer)) + (task.settings.max_new_tokens or args.gen_eval_max_new_tokens)
        for task in tasks
        for sample in task.samples
    ]
    longest = max(lengths, default=0) + TEMPLATE_SLACK_TOKENS
    if args.gen_eval_lm_eval or args.gen_eval_expose is not None:
        holds = getattr(config.get_text_config(), "max_position_embeddings", None) or FOREIGN_PROMPT_TOKENS
        longest = max(longest, min(FOREIGN_PROMPT_TOKENS, holds))
    return longest


def choose_gpu(visible: Sequence[str], training: int) -> tuple[str, str]:
    """The first GPU beyond those that train, or the main process's own; the device id and the reason."""
    if len(visible) > training:
        return visible[training], f"GPU {visible[training]}, which the trainer does not use"
    return visible[0], f"GPU {visible[0]}, shared with the trainer's main process"


def visible_gpus() -> list[str]:
    """The ids this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [part.strip() for part in named.split(",") if part.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def kv_bytes_per_token(config: Any, *, element_bytes: int) -> int:
    """kv_bytes = 2 (key, value) * layers * kv_heads * head_dim * element_bytes  (vLLM's full-attention layout)."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * kv_heads * head_dim * element_bytes


def largest_parameter(model_args: Any) -> int | None:
    """Elements of the model's largest single tensor, fused experts included; None for a class transformers lacks."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(model_args)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    # The class itself: from_config would shard the parameters under ZeRO-3.
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return max(parameter.numel() for parameter in model.parameters())


def load_config(model_args: Any) -> Any:
    """The model's configuration, without its weights."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=getattr(model_args, "trust_remote_code", False),
    )
