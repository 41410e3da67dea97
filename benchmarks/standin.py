"""Inputs for the benchmark: a random model of a real shape with a stand-in tokenizer, or a model from a GGUF file.

    python benchmarks/standin.py --shape 1.7b --out MODEL
    python benchmarks/standin.py --gguf FILE.gguf --out MODEL

Speed and memory depend on the shape, not on what the weights know, so no download is needed.  Prompts and answers for a
random model are random words of its vocabulary, one token each, so that every sequence has exactly the asked length.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

PROMPT_WORDS = 32
EVAL_PROMPT_WORDS = 128
ANSWER_WORDS = 8
# <|im_start|> role … <|im_end|> twice
TEMPLATE_TOKENS = 6
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen3 architecture; `tied` shares the embedding with the output head."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocabulary: int = 151936
    tied: bool = True


SHAPES = {  # Qwen3's config.json files; `tiny` is for trying the benchmark itself on a CPU
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, head_dim=32, vocabulary=1024),
    "0.6b": Shape(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8),
    "1.7b": Shape(hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8),
    "4b": Shape(hidden=2560, intermediate=9728, layers=36, heads=32, kv_heads=8),
    "8b": Shape(hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, tied=False),
    "14b": Shape(hidden=5120, intermediate=17408, layers=40, heads=40, kv_heads=8, tied=False),
    "32b": Shape(hidden=5120, intermediate=25600, layers=64, heads=64, kv_heads=8, tied=False),
}


def words_of(shape: Shape) -> int:
    """Ordinary words in the stand-in vocabulary: what the special tokens leave (the last embeddings stay unused)."""
    return shape.vocabulary - 64


def write_tokenizer(shape: Shape, out: Path) -> None:
    """A word-level tokenizer: `t0`, `t1`, … and the four special tokens, with a ChatML-like template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    count = words_of(shape)
    vocabulary = {f"t{index}": index for index in range(count)}
    vocabulary |= {token: count + position for position, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


def random_config(shape: Shape) -> Any:
    """The configuration of a Qwen3 model of that shape with the stand-in vocabulary."""
    from transformers import Qwen3Config

    end = words_of(shape) + SPECIAL_TOKENS.index("<|im_end|>")
    pad = words_of(shape) + SPECIAL_TOKENS.index("<|endoftext|>")
    return Qwen3Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=40960,
        bos_token_id=pad,
        eos_token_id=end,
        pad_token_id=pad,
        architectures=["Qwen3ForCausalLM"],
    )


def write_random_model(shape: Shape, out: Path) -> None:
    """Random bf16 weights (seed 0) of a Qwen3 model in files of 5 GB, with its tokenizer, in the folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from hf_dsvllm.tensors.shards import write_shards
    from hf_dsvllm.tensors.weights import TensorPlan

    config = random_config(shape)
    end, pad = config.eos_token_id, config.pad_token_id
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    tensors = dict(model.named_parameters())  # tied ones once
    plan = [TensorPlan(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]
    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, plan, lambda name: tensors[name].detach().cpu(), max_shard_size_bytes=5 * 10**9)
    config.dtype = "bfloat16"
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=pad, eos_token_id=end, pad_token_id=pad).save_pretrained(out)
    write_tokenizer(shape, out)


def write_from_gguf(file: Path, out: Path) -> None:
    """The model in `file`, dequantised to bf16, with its tokenizer and chat template in the folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    # The weights are plain tensors now; transformers still refuses to save a model marked as GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)


def write_random_data(shape: Shape, out: Path, *, samples: int, length: int, prompts: int) -> tuple[Path, Path]:
    """`train.jsonl` (`samples` conversations of exactly `length` tokens) and `prompts.jsonl` (`prompts` questions)."""
    rng = random.Random(0)
    answer_words = length - PROMPT_WORDS - TEMPLATE_TOKENS
    if answer_words < 1:
        raise SystemExit(f"--length {length} leaves no answer; use {PROMPT_WORDS + TEMPLATE_TOKENS + 1} or more")

    def words(count: int) -> str:
        return " ".join(f"t{rng.randrange(words_of(shape))}" for _ in range(count))

    def conversation(question: int, answer: int) -> dict[str, Any]:
        turns = (("user", words(question)), ("assistant", words(answer)))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    train = [conversation(PROMPT_WORDS, answer_words) for _ in range(samples)]
    asked = [conversation(EVAL_PROMPT_WORDS, ANSWER_WORDS) for _ in range(prompts)]
    return write_jsonl(out / "train.jsonl", train), write_jsonl(out / "prompts.jsonl", asked)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this Qwen3 shape")
    source.add_argument("--gguf", type=Path, help="GGUF file to unpack")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    if options.gguf:
        write_from_gguf(options.gguf, options.out)
    else:
        write_random_model(SHAPES[options.shape], options.out)


if __name__ == "__main__":
    main()
