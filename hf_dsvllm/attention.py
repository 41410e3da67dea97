"""Attention without masks where none is needed: packed sequences, and batches padded on the right.

transformers' `sdpa` describes packed sequences and padding by a mask of tokens x tokens, which keeps PyTorch from its
fast kernels and is computed over the whole square.  Here

* packed sequences (`cu_seq_lens_q`, as TRL's padding-free collator gives it) go through `torch.nn.attention.varlen`,
  on CPUs sequence by sequence;
* a padding mask that only hides the end of each row is dropped: a causal token never looks to the right, and what
  padding itself computes is seen by no token and has no label.

Both are registered by transformers' public interface and a forward hook on the decoder.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

__all__ = ["NAME", "WithoutMasks", "drop_masks", "use_varlen", "why_no_varlen", "why_not"]

NAME = "dsvllm_varlen"
CAUSAL = (-1, 0)  # window of varlen_attn: everything before, nothing after
# Whose layers hand the boundaries of packed sequences on to attention: a test trains each of them both ways
TYPES = frozenset(
    ("gemma", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3")
)


def why_not(model: Any) -> str | None:
    """Why this model keeps transformers' masks, None if it does not need them.

    Only causal models of `TYPES` whose every layer attends to all earlier tokens; a mixture of experts reads the
    padding mask for its balance loss.
    """
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is not config:
        return "the model is not a text model of transformers alone"
    if config.model_type not in TYPES or not type(model).__name__.endswith("ForCausalLM"):
        return f"it was not tried on {type(model).__name__}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)):
        return "not every layer attends to all earlier tokens"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "a mixture of experts needs the padding mask for its balance loss"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return "it attends to later tokens as well"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are capped"
    if config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {config._attn_implementation}, not sdpa"
    return None


def why_no_varlen(on_gpu: bool) -> str | None:
    """What keeps packed sequences from `torch.nn.attention.varlen`; nothing on CPUs, which go one by one."""
    if not on_gpu:
        return None
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no attention for sequences of several lengths: 2.10 or newer"
    if torch.cuda.get_device_capability() < (8, 0):
        return "PyTorch's attention for sequences of several lengths needs an Ampere GPU or a newer one"
    return None


class WithoutMasks:
    """Attention without masks in `model`, for which `why_not` is None; packed sequences too if it is `varlen`.

    There from the beginning, taken out and put in again around what it is for: another trainer may give the same model
    batches whose padding has labels.
    """

    def __init__(self, model: Any, *, varlen: bool) -> None:
        self._model, self._varlen, self._before = model, varlen, model.config._attn_implementation
        self._hook: Any = None
        self.put_in()

    def put_in(self) -> None:
        """Safe to call twice."""
        if self._hook is None:
            if self._varlen:
                use_varlen(self._model)
            self._hook = drop_masks(self._model)

    def take_out(self) -> None:
        """Safe to call twice."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            if self._varlen:
                self._model.set_attn_implementation(self._before)


def drop_masks(model: Any) -> Any:
    """Hook the decoder so that a padding mask on the right, or a mask of packed sequences, is not built.

    `model` is a causal language model for which `why_not` is None.  Returns the hook's handle.
    """
    return model.get_decoder().register_forward_pre_hook(without_mask, with_kwargs=True)


def without_mask(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hook: kwargs of the decoder's forward with the mask it needs."""
    if kwargs.get("past_key_values") is not None:
        return args, kwargs
    mask = kwargs.get("attention_mask")
    if kwargs.get("cu_seq_lens_q") is not None and decoder.config._attn_implementation == NAME and mask is None:
        # transformers hands a mask of four dimensions on as it is; `varlen_forward` knows this one.
        return args, kwargs | {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    if decoder.training and mask is not None and mask.dim() == 2 and hides_ends_alone(mask):
        return args, kwargs | {"attention_mask": None}
    return args, kwargs


def hides_ends_alone(mask: torch.Tensor) -> bool:
    """Whether a padding mask, rows x tokens, begins every row with tokens and hides nothing but its end."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool(mask[:, 0].all())


def use_varlen(model: Any) -> bool:
    """Let `model` attend through `varlen_forward`, `sdpa` for everything that is not packed; False if it does not."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation == NAME:
        return True
    model.set_attn_implementation(before)
    return False


def varlen_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: (1, heads, tokens, head_dim) in, (1, tokens, heads, head_dim) out.

    Packed sequences have a one-element mask (`without_mask`; with a single token it is an ordinary one) and
    `cu_seq_lens_q`, the sequences' first tokens and the end; anything else goes to transformers' `sdpa`.  Raises
    ValueError if the boundaries got lost on the way.
    """
    if attention_mask is None or attention_mask.numel() != 1 or query.shape[2] == 1:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None or query.shape[0] != 1:
        raise ValueError("packed sequences reached attention without their boundaries; --ds_speed no_varlen")
    if torch.is_autocast_enabled(query.device.type):  # as autocast does for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (part.to(dtype) for part in (query, key, value))
    longest = int(kwargs["max_length_q"])
    if (len(starts) - 1) * longest == query.shape[2]:
        return all_alike(query, key, value, longest, dropout, scaling), None
    attend = on_gpu if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0 else one_by_one
    return attend(query, key, value, starts, longest, dropout, scaling), None


def all_alike(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, dropout: float, scaling: float | None
) -> torch.Tensor:
    """Sequences of one length as rows of a batch: `scaled_dot_product_attention` has faster kernels than varlen_attn.

    On an H200 (torch 2.11) cuDNN's, 565 TFLOP/s forward and 435 backward, instead of 285 and 243.
    """
    rows = (part[0].unflatten(1, (-1, length)).transpose(0, 1) for part in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        *rows, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1).unsqueeze(0)


def on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, whose arguments changed between torch 2.10 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    del dropout
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": CAUSAL} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)  # it multiplies by 1 / sqrt(head_dim) itself
    if "enable_gqa" in known:  # before it was asked for, its kernel took fewer heads of keys all the same (2.11, H200)
        options["enable_gqa"] = True
    flat = [part[0].transpose(0, 1) for part in (query, key, value)]
    starts = starts.to(query.device, torch.int32)
    out: torch.Tensor = varlen_attn(*flat, starts, starts, longest, longest, **options)
    return out.unsqueeze(0)


def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """The same by `scaled_dot_product_attention`, one sequence after the other: CPUs, float32, dropout."""
    del longest
    lengths = starts.diff().tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
        )
        for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


# At import: a model that was pickled whole names this attention, and brings this module with it.
AttentionInterface.register(NAME, varlen_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
