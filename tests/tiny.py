"""A tiny random Llama with a real tokenizer and chat template, written to a folder without any download.

It has what the real parts need: head_dim 32 (vLLM's CPU attention wants that), a byte-level tokenizer (any text round
trips), ChatML-like special tokens, and weights large enough that logits are not flat, so that two different sets of
weights give different greedy tokens.
"""

from __future__ import annotations

from pathlib import Path

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCAB_SIZE = 320  # 4 special + 256 bytes + 60 merges: every id the model can emit has a text

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_tokenizer(path: Path) -> Path:
    """Write a byte-level BPE tokenizer (eos `<|im_end|>`, pad `<|pad|>`, ChatML template) to the folder `path`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    merges = [(consonant, vowel) for consonant in "tnrslhdmgcpf" for vowel in "eaoiu"]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    assert len(vocab) == VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return path


def write_tiny_model(path: Path, *, seed: int = 0, tied: bool = True, layers: int = 2, dtype: str = "float32") -> Path:
    """Write a random Llama (hidden 64, 2 heads of 32, 320 tokens; ~0.1 M parameters) with tokenizer; return `path`.

    The same `seed` gives the same weights. `tied` shares the embedding with the output head.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    path.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(path)
    return write_tiny_tokenizer(path)
