"""Any `AutoModelForCausalLM` without weights: its shape from the modules, its activations from a run on fake tensors.

For architectures the formulas do not know.  The model is built on the meta device, then two depths of it run forward on
fake tensors, which have sizes and no contents; what autograd keeps is counted, and the difference is one layer.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from hf_dsvllm.errors import ModelShapeError
from hf_dsvllm.model_shape import Linear, ModelShape
from hf_dsvllm.planner.footprint import Traced

__all__ = ["saved_bytes", "trace_layers", "traced_shape"]

DEPTHS = (2, 4)
TOKENS = 128
# Dropout on a CPU keeps noise as wide as a number where CUDA keeps a mask of one byte: bytes too many per input value
# of each adapter (fp32 adapters under autocast, bf16 adapters).  Counted with torch 2.13.
DROPOUT_EXCESS = {4: 3, 2: 5}
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")


def traced_shape(source: str) -> ModelShape:
    """The shape of any causal language model, read off its modules.  Raises ModelShapeError if it cannot be built."""
    config = load_config(source)
    model = empty_model(config)
    text = config.get_text_config()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    linears = []
    for name, module in model.named_modules():
        sizes = linear_sizes(module)
        if sizes is None or (module is head and tied):
            continue
        kind = "lm_head" if module is head else "attention" if "attn" in name else "mlp"
        linears.append(
            Linear(
                name=name.rpartition(".")[2],
                kind=kind,  # type: ignore[arg-type]
                inputs=sizes[0],
                outputs=sizes[1],
                bias=module.bias is not None,
                count=1,
            )
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    counted = sum(linear.parameters for linear in linears) + embedding.weight.numel()
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    norms -= sum(linear.outputs for linear in linears if linear.bias)
    intermediate = first_of(text, "intermediate_size", "n_inner") or 4 * int(text.hidden_size)
    experts = (first_of(text, *EXPERTS) or 0) if fused_experts(model) else 0
    heads = int(getattr(text, "num_attention_heads", 1))
    return ModelShape(
        model_type=str(config.model_type),
        hidden=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate=intermediate,
        vocab=embedding.weight.shape[0],
        tied=tied,
        experts=experts,
        linears=tuple(linears),
        embedding_parameters=embedding.weight.numel(),
        norm_parameters=norms,
        # what is neither linear, embedding nor norm: fused experts, convolutions, position tables
        expert_parameters=max(0, total - counted - norms),
        experts_per_token=(first_of(text, *EXPERTS_PER_TOKEN) or 1) if experts else 0,
        expert_intermediate=(first_of(text, "moe_intermediate_size") or intermediate) if experts else 0,
        max_length=getattr(text, "max_position_embeddings", None),
    )


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of an `nn.Linear` or of GPT-2's `Conv1D`, which is one with its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def fused_experts(model: Any) -> bool:
    """Whether experts are parameters of three dimensions, as transformers 5 makes them; linear layers count as such."""
    return any(parameter.dim() == 3 for parameter in model.parameters())


def first_of(config: Any, *names: str) -> int | None:
    """The first of these fields that the configuration gives."""
    return next((int(value) for name in names if (value := getattr(config, name, None))), None)


def trace_layers(source: str, *, lora_r: int = 16) -> Traced:
    """Bytes one decoder layer saves for a token, in each way this package trains.

    Fused experts run on fake tensors in bf16 only (torch's `_grouped_mm`): in fp32 they count as twice that, which is
    more than autocast saves.
    """
    config = load_config(source)
    full = saved_bytes(config, dtype=torch.bfloat16)
    fused = fused_experts(empty_model(config))
    return Traced(
        full=full,
        full_mixed=2 * full if fused else saved_bytes(config, dtype=torch.float32, autocast=True),
        full_fp32=2 * full if fused else saved_bytes(config, dtype=torch.float32),
        adapters=saved_bytes(config, dtype=torch.bfloat16, lora_r=lora_r),
        adapters_fp32=saved_bytes(config, dtype=torch.bfloat16, autocast=True, lora_r=lora_r),
    )


def saved_bytes(config: Any, *, dtype: torch.dtype, autocast: bool = False, lora_r: int = 0) -> int:
    """Bytes that one layer keeps for the backward pass, per token; without what does not grow with the tokens."""
    kept = {
        (depth, tokens): forward_bytes(config, depth, tokens, dtype, autocast, lora_r)
        for depth in DEPTHS
        for tokens in (TOKENS, 2 * TOKENS)
    }
    low, high = DEPTHS
    grown = {depth: kept[depth, 2 * TOKENS] - kept[depth, TOKENS] for depth in DEPTHS}
    per_layer = (grown[high] - grown[low]) / (high - low) / TOKENS
    if lora_r:
        excess = DROPOUT_EXCESS[4 if autocast else 2]
        per_layer -= excess * adapter_inputs(config) / int(config.get_text_config().num_hidden_layers)
    return round(per_layer)


def adapter_inputs(config: Any) -> int:
    """Values that the linear layers inside the decoder read, of one token."""
    model = empty_model(config)
    return sum(sizes[0] for module in inner_linears(model).values() if (sizes := linear_sizes(module)) is not None)


def inner_linears(model: Any) -> dict[str, nn.Module]:
    """What PEFT's "all-linear" means without fused experts: every linear layer but the output head, by its path."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if linear_sizes(m) is not None and m is not head}


def forward_bytes(config: Any, depth: int, tokens: int, dtype: torch.dtype, autocast: bool, lora_r: int) -> int:
    """Bytes alive after the forward pass of a model of `depth` layers, weights and inputs left out."""
    model = empty_model(with_depth(config, depth), dtype)
    if lora_r:
        model = adapted(model, lora_r, autocast)
    model.train()
    with FakeTensorMode():
        materialise(model)
        ids = torch.zeros((1, tokens), dtype=torch.long)
        live = Live([*model.parameters(), *model.buffers(), ids])
        casting = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with live:
            with casting:
                # With a cache no mask is made, as in training; the cache itself goes with the output.
                output = backbone(model)(ids)
            graph = output.last_hidden_state.grad_fn
            del output
            kept = live.now
            del graph
        return kept


def adapted(model: Any, lora_r: int, autocast: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = list(inner_linears(model))  # by name: "all-linear" would take fused experts, which allow no dropout
    config = LoraConfig(r=lora_r, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"):
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    wrapped.enable_input_require_grads()
    return wrapped


def backbone(model: Any) -> Any:
    """The decoder without the output head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


class Live(TorchDispatchMode):
    """Bytes of the tensors alive, storages counted once; those of `known` never."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, out)
        return out

    def _see(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = True
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, storage.nbytes())
        return tensor

    def _drop(self, size: int) -> None:
        self.now -= size


def load_config(source: str) -> Any:
    from transformers import AutoConfig

    path = Path(source).expanduser()
    try:
        return AutoConfig.from_pretrained(path.parent if path.is_file() else source)
    except (OSError, ValueError) as error:
        raise ModelShapeError(f"{source} has no configuration that transformers can read: {error}") from error


def with_depth(config: Any, depth: int) -> Any:
    """The same model with another number of layers; lists with an entry a layer follow.

    Attention without dropout: with it a CPU keeps matrices of tokens x tokens, which no kernel of a GPU does.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for name in ATTENTION_DROPOUT:
        if getattr(text, name, None):
            setattr(text, name, 0.0)
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, (value * (depth // before + 1))[:depth])
    text.num_hidden_layers = depth
    return made


def empty_model(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model on the meta device."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelShapeError(f"transformers cannot build a {config.model_type} model: {error}") from error


def materialise(model: Any) -> None:
    """Put fake tensors in the place of meta ones, tied ones still tied."""
    twins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in members(module._parameters):
            twin = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            module._parameters[name] = twins.setdefault(id(parameter), twin)
        for name, buffer in members(module._buffers):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def members(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in list(found.items()) if value is not None)
