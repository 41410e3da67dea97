"""How much the engine needs for the tasks of a run: sequence length, KV cache, GPUs, compiled code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from hf_dsvllm.adapters import why_merge_for_engine
from hf_dsvllm.engine.client import PROMPTS_IN_FLIGHT
from hf_dsvllm.errors import ConfigError, Problem
from hf_dsvllm.fields import trusts_remote_code
from hf_dsvllm.placement import Place
from hf_dsvllm.tasks import EvalTask, render_prompt

__all__ = [
    "EngineSize",
    "copies",
    "decode_steps",
    "gpus_needed",
    "kv_bytes_per_token",
    "largest_parameter",
    "room_bytes",
    "size_engine",
]

GIB = 1 << 30
# Sequences the cache should hold at once beside a trainer: enough to keep a GPU busy, and small.
CONCURRENT_SEQUENCES = 64
MAX_KV_CACHE_BYTES = 8 * GIB
# On a GPU of its own it holds all that is asked at a time, within this share of the GPU less weights and workspace.
# With 112 GiB instead of 8, 512 prompts of 8B went at 8,762 tok/s instead of 4,642 (eager, H200, vLLM 0.26); 1.7 GiB of
# activations and 0.2 of libraries were seen there; logits of a thousand sequences and NCCL's buckets come on top.
OWN_GPU_SHARE = 0.9
WORKSPACE_BYTES = 4 * GIB
# The chat template may still change between the check and the run (TRL can clone one): room for its extra tokens.
TEMPLATE_SLACK_TOKENS = 64
FOREIGN_PROMPT_TOKENS = 4096  # prompts that are not ours: few-shot tasks of lm-eval, a chat
MAX_SHOWN_ROWS = 10
# Where vLLM 0.32 reads how long sequences may be (transformers_utils/model_arch_config_convertor.py), and the kinds of
# scaled rotary positions whose models have the scaled length there.
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
               "max_sequence_length", "max_seq_length", "seq_len")  # fmt: skip
SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
# Of a GPU's memory, what the weights may take: all but cache and workspace on its own, less beside a trainer.
WEIGHTS_SHARE = {"spare": 0.8, "shared": 0.4}
# An engine with compiled code is ready later, and saves the launching of a layer's kernels in every decoding step: 8B
# on an H200 with 16 CPUs (vLLM 0.26, 2026-11-27) 86 s instead of 73 cold, 54 instead of 40 with filled caches, and
# 6.3 ms a step instead of 20.6 for 64 sequences.  Another host of 2026-11-22: 132 s instead of 67, and 1.1 ms a layer.
COMPILE_S = 13.0
LAUNCH_S = 4.0e-4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSize:
    """Lengths in tokens, sizes in bytes; `usual_cache_bytes` is the cache beside a trainer, for a second try.

    `merge_adapters`: they reach the engine merged into a copy of the base.  `compiled`: its code and CUDA graphs, which
    start later and answer faster, instead of eager execution.
    """

    max_model_len: int
    kv_cache_bytes: int
    usual_cache_bytes: int
    merge_adapters: bool
    compiled: bool
    reason: str


def size_engine(
    place: Place,
    args: Any,
    model_args: Any,
    tasks: Sequence[EvalTask],
    tokenizer: Any,
    *,
    gpus: int = 1,
    room: int | None = None,
) -> EngineSize:
    """Length and cache for the longest prompt and answer of `tasks`.

    `gpus`: those of one engine, over which its cache is spread; `room`: bytes that each has for it (`room_bytes`), None
    beside a trainer that it never leaves alone, and on CPUs.
    """
    config = load_config(args, model_args)
    length = context_tokens(args, config, tasks, tokenizer)
    per_token = kv_bytes_per_token(config, element_bytes=4 if place.device == "cpu" else 2)
    cache = min(max(CONCURRENT_SEQUENCES * length * per_token, GIB), MAX_KV_CACHE_BYTES)
    usual, at_once = cache, CONCURRENT_SEQUENCES
    if room is not None:
        per_sequence = -(-length * per_token // gpus)
        cache = max(min(cache, room), min(asked_at_once(args, tasks) * per_sequence, room))
        at_once = max(at_once, cache // per_sequence)
    merging = None
    if model_args.use_peft:
        streamed = "they are merged on their way from GPU to GPU" if place.stream else None
        merging = why_merge_for_engine(model_args, place.device) or streamed
    copied = f"; adapters are merged into a copy for it ({merging})" if merging else ""
    steps = decode_steps(args, tasks, at_once)
    saved = steps * config.get_text_config().num_hidden_layers * LAUNCH_S
    # On a shared GPU its graphs would hold memory that training wants; on CPUs a C++ compiler would have to be there.
    compiled = place.kind == "spare" and saved > COMPILE_S
    if place.kind == "spare":
        how = "compiled" if compiled else "eager"
        copied += f"; {how}, for up to {steps:,} decoding steps in the run (compiling costs {COMPILE_S:.0f} s, saves "
        copied += f"about {saved:.0f} s)"
    return EngineSize(
        max_model_len=length,
        kv_cache_bytes=cache,
        usual_cache_bytes=usual,
        merge_adapters=merging is not None,
        compiled=compiled,
        reason=f"sequences up to {length} tokens, {cache / GIB:.1f} GiB of KV cache{copied}",
    )


def room_bytes(gpu_bytes: int, weights_bytes: int, held_bytes: int = 0, *, share: float = 1.0) -> int | None:
    """Bytes for the cache on a GPU that holds so much of the weights, and that others hold so much of.

    room = share * (0.9 * GPU - weights - workspace - what others hold); None where that is little: the usual cache.
    """
    room = int(share * (OWN_GPU_SHARE * gpu_bytes - weights_bytes - WORKSPACE_BYTES - held_bytes))
    return room if room >= MAX_KV_CACHE_BYTES else None


def asked_at_once(args: Any, tasks: Sequence[EvalTask]) -> int:
    """Answers that the largest of `tasks` asks for at a time; a client of others may ask for as many as fit."""
    if args.gen_eval_lm_eval or args.gen_eval_expose is not None:
        return PROMPTS_IN_FLIGHT
    most = max((len(task.samples) * answers_of(args, task) for task in tasks), default=0)
    return min(most, PROMPTS_IN_FLIGHT)


def answers_of(args: Any, task: EvalTask) -> int:
    """Answers to each prompt."""
    return int(task.settings.samples or args.gen_eval_samples)


def decode_steps(args: Any, tasks: Sequence[EvalTask], at_once: int = CONCURRENT_SEQUENCES) -> int:
    """The most decoding steps the evaluations of a run take, `at_once` answers at a time.

    steps = evaluations * sum over tasks of ceil(prompts * answers / at_once) * max_new_tokens

    `evaluations` from max_steps; a run that counts epochs is taken to be evaluated at its start, its end and after each
    epoch, for its steps are not known before its data is.
    """
    every = args.gen_eval_steps or (args.eval_steps if args.eval_strategy == "steps" else None)
    if every is not None and every < 1:  # a share of the run
        between = int(1 / every)
    elif args.max_steps > 0:
        between = int(args.max_steps / every) if every else 0
    else:
        between = math.ceil(args.num_train_epochs)
    evaluations = between + 1 + int(args.gen_eval_on_start)
    one = 0
    for task in tasks:
        answers = len(task.samples) * answers_of(args, task)
        tokens = task.settings.max_new_tokens or args.gen_eval_max_new_tokens
        one += math.ceil(answers / at_once) * tokens
    return evaluations * one


def context_tokens(args: Any, config: Any, tasks: Sequence[EvalTask], tokenizer: Any) -> int:
    """The longest prompt with its answer, and some room; for lm-eval and a user's own client what they may send.

    Never more than the model takes.  Raises ConfigError for prompts that do not fit with their answers.
    """
    lengths = [
        (
            task,
            sample.line,
            len(render_prompt(sample, tokenizer)),
            task.settings.max_new_tokens or args.gen_eval_max_new_tokens,
        )
        for task in tasks
        for sample in task.samples
    ]
    longest = max((prompt + answer for _, _, prompt, answer in lengths), default=0) + TEMPLATE_SLACK_TOKENS
    if args.gen_eval_lm_eval or args.gen_eval_expose is not None:
        longest = max(longest, FOREIGN_PROMPT_TOKENS)
    holds = model_length(config)
    if holds is None:
        return longest
    problems = [
        length_problem(task.name, too_long, holds)
        for task in tasks
        if (too_long := [found[1:] for found in lengths if found[0] is task and found[2] + found[3] > holds])
    ]
    if problems:
        raise ConfigError(problems)
    return min(longest, holds)


def length_problem(task: str, rows: Sequence[tuple[int, int, int]], holds: int) -> Problem:
    """`rows`: line, tokens of the prompt, tokens of the answer."""
    shown = ", ".join(f"line {line} ({prompt} + {answer})" for line, prompt, answer in rows[:MAX_SHOWN_ROWS])
    more = f" and {len(rows) - MAX_SHOWN_ROWS} more" if len(rows) > MAX_SHOWN_ROWS else ""
    return Problem(
        f"task {task}: prompt and answer take more than the {holds} tokens that the model takes: {shown}{more}",
        "fewer --gen_eval_max_new_tokens, or shorten these prompts, or take them out",
    )


def model_length(config: Any) -> int | None:
    """The longest sequence that vLLM starts the model for, in tokens; None where its configuration bounds none.

    As vLLM 0.32 derives it (config/model.py, _get_and_verify_max_len): the least of LENGTH_KEYS, or else
    model_max_length, times the factor of scaled rotary positions where the length is not scaled already.
    """
    text = config.get_text_config()
    own = getattr(text, "model_max_length", None)
    lengths = [length for key in LENGTH_KEYS if (length := getattr(text, key, None)) is not None]
    if own is None and not lengths:
        return None
    holds = min(lengths) if own is None else own
    return int(holds) if "gemma3" in config.model_type else int(holds * rotary_factor(text))


def rotary_factor(text: Any) -> float:
    """How many times longer rotary positions are stretched than the configuration's length says."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    by_layer = [block for block in found.values() if isinstance(block, dict)]  # one for each type of layer
    factor = 1.0
    for block in by_layer or [found]:
        if block.get("rope_type", block.get("type")) not in SCALED_ALREADY:
            factor = block.get("factor") or factor
    return factor


def gpus_needed(place: Place, asked: int | None, weights_bytes: int | None, gpu_bytes: int, config: Any) -> int:
    """The engine's tensor parallel size: `asked`, or the fewest GPUs that hold the model's 16-bit weights.

    Only sizes that divide the attention heads.  `weights_bytes` None (an unknown architecture) counts as fitting on
    one.  Raises ConfigError when `asked` cannot be, or no number of the place's GPUs is enough.
    """
    heads = config.get_text_config().num_attention_heads
    possible = [size for size in range(1, len(place.gpus) + 1) if heads % size == 0]
    if asked is not None:
        if asked in possible:
            return asked
        what = f"gen_eval_tensor_parallel={asked}: vLLM may use {len(place.gpus)} GPUs, the model has {heads} heads"
        raise ConfigError([Problem(what, f"one of {', '.join(map(str, possible))}")])
    share = WEIGHTS_SHARE[place.kind] * gpu_bytes
    for size in possible:
        if weights_bytes is None or weights_bytes / size <= share:
            return size
    what = (
        f"the model's 16-bit weights, {(weights_bytes or 0) / GIB:.1f} GiB, do not fit into "
        f"{len(place.gpus)} x {share / GIB:.0f} GiB that vLLM may take of the GPUs it has ({place.kind})"
    )
    raise ConfigError([Problem(what, "--gen_eval_placement spare with more GPUs, or remote, or no --gen_eval_file")])


def copies(place: Place, asked: int | None, gpus: int) -> int:
    """Copies of an engine on `gpus` GPUs each (data parallel): `asked`, or as many as spare GPUs hold, else one.

    On CPUs as many as asked.  Raises ConfigError for more than the place's GPUs hold.
    """
    room = len(place.gpus) // gpus
    if asked is None:
        return room if place.kind == "spare" else 1
    if place.device == "cpu" or asked <= room:
        return asked
    what = f"gen_eval_data_parallel={asked}: vLLM may use {len(place.gpus)} GPUs, and one copy takes {gpus}"
    raise ConfigError([Problem(what, f"--gen_eval_data_parallel {room} or less")])


def kv_bytes_per_token(config: Any, *, element_bytes: int) -> int:
    """kv_bytes = 2 (key, value) * layers * kv_heads * head_dim * element_bytes  (vLLM's full-attention layout)."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * kv_heads * head_dim * element_bytes


def largest_parameter(args: Any, model_args: Any) -> int | None:
    """Elements of the model's largest single tensor, fused experts included; None for a class transformers lacks."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(args, model_args)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    # The class itself: from_config would shard the parameters under ZeRO-3.
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return max(parameter.numel() for parameter in model.parameters())


def load_config(args: Any, model_args: Any) -> Any:
    """The model's configuration, without its weights."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=trusts_remote_code(args, model_args),
    )
