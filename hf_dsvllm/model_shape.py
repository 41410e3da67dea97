"""A `config.json` becomes a `ModelShape`: parameters by kind, without weights, torch or transformers.

Counts are exact for the families in `FAMILIES` as transformers 5 builds them (mixture-of-experts weights are fused
three-dimensional parameters there, not `nn.Linear`); any other `model_type` is refused rather than guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_dsvllm.errors import ModelShapeError

__all__ = ["FAMILIES", "Family", "Linear", "ModelShape", "UnknownModelError", "load_shape", "shape_from_config"]

Kind = Literal["attention", "mlp", "lm_head"]


class UnknownModelError(ModelShapeError):
    """A `model_type` that is not in `FAMILIES`."""

    def __init__(self, model_type: str, message: str) -> None:
        super().__init__(message)
        self.model_type = model_type


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one `model_type` differs from Llama; defaults are those of its transformers configuration class."""

    qkv_bias: bool | str = "attention_bias"  # a bool, or the field that says so (false if absent)
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    fused: bool = False  # qkv_proj and gate_up_proj instead of separate matrices
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tied: bool = False
    experts_field: str | None = None
    expert_width_field: str = "moe_intermediate_size"
    shared_expert: bool = False
    experts_per_token: int = 2
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def kv_heads(count: int) -> dict[str, Any]:
    """What a file without `num_key_value_heads` means; families without this default use one per attention head."""
    return {"num_key_value_heads": count}


NO_BIAS: dict[str, Any] = {"qkv_bias": False, "output_bias": False}
GEMMA: dict[str, Any] = {"head_dim": 256, "tied": True}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias="mlp_bias"),
    "mistral": Family(defaults=kv_heads(8), **NO_BIAS),
    "qwen2": Family(qkv_bias=True, output_bias=False, defaults=kv_heads(32)),
    "qwen3": Family(qk_norm=True, head_dim=128, defaults=kv_heads(32)),
    "gemma": Family(defaults=kv_heads(16), **GEMMA),
    "gemma2": Family(norms_per_layer=4, defaults=kv_heads(4), **GEMMA),
    "gemma3_text": Family(norms_per_layer=4, qk_norm=True, defaults=kv_heads(4), **GEMMA),
    "phi3": Family(fused=True, **NO_BIAS),
    "smollm3": Family(mlp_bias="mlp_bias", tied=True, defaults=kv_heads(4)),
    "granite": Family(mlp_bias="mlp_bias"),
    "mixtral": Family(
        experts_field="num_local_experts",
        expert_width_field="intermediate_size",
        defaults=kv_heads(8),
        **NO_BIAS,
    ),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias",
        output_bias=False,
        experts_field="num_experts",
        shared_expert=True,
        experts_per_token=4,
        defaults={"qkv_bias": True, **kv_heads(16)},
    ),
    "qwen3_moe": Family(qk_norm=True, experts_field="num_experts", experts_per_token=8, defaults=kv_heads(4)),
}
# transformers 5 saves Qwen3-MoE's `num_experts` under Mixtral's name.
EXPERT_ALIASES = ("num_experts", "num_local_experts")
LARGEST = 10**8  # no size of a model is larger: beyond it the file is wrong


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """`count` equal `nn.Linear` modules: weight (outputs, inputs), with or without bias."""

    name: str
    kind: Kind
    inputs: int
    outputs: int
    bias: bool
    count: int

    @property
    def weights(self) -> int:
        """weights = count * inputs * outputs"""
        return self.count * self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """parameters = weights + count * outputs  (the last if there is a bias)"""
        return self.weights + (self.count * self.outputs if self.bias else 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only model.  `experts` is 0 for a dense one; `expert_parameters` include the routers.

    `max_length` is the longest sequence the model was made for, None where its configuration does not say.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    experts: int
    linears: tuple[Linear, ...]
    embedding_parameters: int
    norm_parameters: int
    expert_parameters: int
    qk_norm: bool = False
    experts_per_token: int = 0
    expert_intermediate: int = 0
    max_length: int | None = dataclasses.field(default=None, compare=False)  # no size: says nothing of the weights
    activation: str = dataclasses.field(default="silu", compare=False)

    @property
    def parameters(self) -> int:
        """All parameters; a tied output head is counted once, with the embedding."""
        return sum(self.parameters_by_kind.values())

    @property
    def parameters_by_kind(self) -> dict[str, int]:
        """Parameters under `embedding`, `attention`, `mlp`, `experts`, `norm`, `lm_head` (0 if tied)."""
        by_kind = {kind: sum(linear.parameters for linear in self.linears if linear.kind == kind) for kind in KINDS}
        return {
            "embedding": self.embedding_parameters,
            "attention": by_kind["attention"],
            "mlp": by_kind["mlp"],
            "experts": self.expert_parameters,
            "norm": self.norm_parameters,
            "lm_head": by_kind["lm_head"],
        }

    @property
    def linear_parameters(self) -> int:
        """What bitsandbytes quantises: weights of every `nn.Linear` but the output head, no fused experts."""
        return sum(linear.weights for linear in self.linears if linear.kind != "lm_head")

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest single matrix: the embedding, the output head or one linear."""
        return max(self.embedding_parameters, *(linear.inputs * linear.outputs for linear in self.linears))

    @property
    def largest_parameter(self) -> int:
        """The same among all tensors: the gate and up projections of a layer's experts are one."""
        return max(self.largest_matrix, 2 * self.experts * self.hidden * self.expert_intermediate)

    def lora_parameters(self, r: int, targets: str | Sequence[str] = "all-linear") -> int:
        """sum over target modules of r * (inputs + outputs).

        `targets` are module names such as `q_proj`, or PEFT's "all-linear": every `nn.Linear` but the output head.
        Raises ModelShapeError for r < 1 or a name that no module has.
        """
        if r < 1:
            raise ModelShapeError(f"LoRA rank r={r} must be at least 1")
        if targets == "all-linear":
            chosen = [linear for linear in self.linears if linear.kind != "lm_head"]
        else:
            wanted = {targets} if isinstance(targets, str) else set(targets)
            names = sorted({linear.name for linear in self.linears})
            unknown = sorted(wanted - set(names))
            if unknown:
                near = difflib.get_close_matches(unknown[0], names, n=2) or names
                raise ModelShapeError(
                    f"a {self.model_type} model has no linear module called {', '.join(unknown)}; use {', '.join(near)}"
                )
            chosen = [linear for linear in self.linears if linear.name in wanted]
        return sum(linear.count * r * (linear.inputs + linear.outputs) for linear in chosen)


KINDS: tuple[Kind, ...] = ("attention", "mlp", "lm_head")


def load_shape(source: Path | str, *, revision: str | None = None, timeout_seconds: float = 10.0) -> ModelShape:
    """The shape of a local model folder, a `config.json`, or a model on the Hugging Face hub.

    Raises ModelShapeError if there is no configuration to read (the hub is given `timeout_seconds` to answer), or it
    cannot be counted.
    """
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        file = download_config(str(source), revision, timeout_seconds)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelShapeError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelShapeError(f"{file} holds a JSON {type(config).__name__}, not the configuration of a model")
    return shape_from_config(config)


def download_config(source: str, revision: str | None, timeout_seconds: float) -> Path:
    """`config.json` from the hub or its local cache.  Raises ModelShapeError."""
    if Path(source).expanduser().is_dir():
        raise ModelShapeError(f"{source} holds no config.json; name a folder that save_pretrained has written")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelShapeError(f"there is no model folder {source} (looked from {Path.cwd()})")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "config.json", revision=revision, etag_timeout=timeout_seconds))
    except Exception as error:  # the hub's errors have several unrelated bases, and those of its HTTP client too
        raise ModelShapeError(
            f"{source} is neither a local folder nor a model whose config.json the hub gave "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). "
            "Check the name, or log in for a gated model; without network name a local folder."
        ) from error


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Count the parameters of a configuration.  Raises ModelShapeError naming the field or `model_type`."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        nested = " (this is a multimodal configuration; its text part is under `text_config`)"
        message = (
            f"model_type {model_type!r} is not known here{nested if 'text_config' in config else ''}, so its "
            f"parameters cannot be counted; known: {', '.join(FAMILIES)}"
        )
        raise UnknownModelError(model_type, message) if isinstance(model_type, str) else ModelShapeError(message)
    return count_shape(Fields(family.defaults | dict(config)), family)


class Fields:
    """Reads a configuration; `check` names every field that is missing or wrong."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.model_type: str = config["model_type"]
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; `default` if the field is null or absent; 1 where `check` will raise."""
        value = self.config.get(name)
        value = default if value is None else value
        if value is None:
            self.missing.append(name)
            return 1
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            self.wrong.append(f"{name}={value!r} in the configuration must be a positive integer")
            return 1
        return value

    def optional_size(self, name: str) -> int | None:
        """A positive integer, None if the field is null or absent."""
        return None if self.config.get(name) is None else self.size(name)

    def flag(self, name: bool | str, default: bool = False) -> bool:
        """A bool as it is, or the field of that name."""
        if isinstance(name, bool):
            return name
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            self.wrong.append(f"{name}={value!r} in the configuration must be true or false")
        return default if value is None else bool(value)

    def indices(self, name: str) -> Sequence[int]:
        """A list of integers, empty if the field is null or absent."""
        value = self.config.get(name)
        if value is None or (isinstance(value, list) and all(isinstance(index, int) for index in value)):
            return value or ()
        self.wrong.append(f"{name}={value!r} in the configuration must be a list of layer numbers")
        return ()

    def demand(self, holds: bool, what: str) -> None:
        """Note what does not hold, unless one of the sizes is missing or wrong anyway."""
        if not holds and not self.missing and not self.wrong:
            self.wrong.append(what)

    def check(self) -> None:
        """Raise ModelShapeError with everything that was found."""
        missing = [f"the configuration of this {self.model_type} model has no {', '.join(dict.fromkeys(self.missing))}"]
        found = [*(missing if self.missing else ()), *dict.fromkeys(self.wrong)]
        if found:
            raise ModelShapeError("; ".join(found))


def count_shape(fields: Fields, family: Family) -> ModelShape:
    """See `shape_from_config`."""
    hidden, layers, heads = (fields.size(name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if family.head_dim is None and fields.config.get("head_dim") is None:
        fields.demand(hidden % heads == 0, f"hidden_size={hidden} is not divisible by num_attention_heads={heads}")
    head_dim = fields.size("head_dim", family.head_dim or max(1, hidden // heads))
    kv_count = fields.size("num_key_value_heads", heads)
    fields.demand(
        heads % kv_count == 0,
        f"num_attention_heads={heads} is not divisible by num_key_value_heads={kv_count}: each key-value head serves "
        "as many attention heads",
    )
    vocab, tied = fields.size("vocab_size"), fields.flag("tie_word_embeddings", family.tied)
    sparse = sparse_layers(fields, layers) if family.experts_field else 0
    dense = layers - sparse
    experts = expert_count(fields, family) if sparse else 0
    intermediate = fields.size("intermediate_size") if dense or family.expert_width_field == "intermediate_size" else 0
    linears = attention_linears(fields, family, hidden, heads * head_dim, kv_count * head_dim, layers)
    if dense:
        linears += mlp_linears(fields, family, hidden, intermediate, dense)
    expert_parameters = width = per_token = 0
    if sparse:
        width = fields.size(family.expert_width_field)
        per_token = fields.size("num_experts_per_tok", family.experts_per_token)
        fields.demand(per_token <= experts, f"num_experts_per_tok={per_token} is more than the {experts} experts")
        expert_parameters = sparse * experts * (3 * hidden * width + hidden)  # gate, up, down; a row of the router
        intermediate = intermediate or width
    if sparse and family.shared_expert:
        shared = fields.size("shared_expert_intermediate_size")
        linears += mlp_linears(fields, family, hidden, shared, sparse)
        linears.append(
            Linear(name="shared_expert_gate", kind="mlp", inputs=hidden, outputs=1, bias=False, count=sparse)
        )
    if not tied:
        linears.append(Linear(name="lm_head", kind="lm_head", inputs=hidden, outputs=vocab, bias=False, count=1))
    norms = layers * (family.norms_per_layer * hidden + (2 * head_dim if family.qk_norm else 0)) + hidden
    max_length = fields.optional_size("max_position_embeddings")
    fields.check()
    return ModelShape(
        model_type=fields.model_type,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_count,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        tied=tied,
        experts=experts,
        linears=tuple(linears),
        embedding_parameters=vocab * hidden,
        norm_parameters=norms,
        expert_parameters=expert_parameters,
        qk_norm=family.qk_norm,
        experts_per_token=per_token,
        expert_intermediate=width,
        max_length=max_length,
        activation=str(fields.config.get("hidden_act") or "silu"),
    )


def attention_linears(fields: Fields, family: Family, hidden: int, q: int, kv: int, layers: int) -> list[Linear]:
    """The projections of all attention layers; `q` and `kv` are their output widths."""
    bias = fields.flag(family.qkv_bias)
    widths = {"qkv_proj": q + 2 * kv} if family.fused else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    linears = [
        Linear(name=name, kind="attention", inputs=hidden, outputs=width, bias=bias, count=layers)
        for name, width in widths.items()
    ]
    output_bias = fields.flag(family.output_bias)
    linears.append(Linear(name="o_proj", kind="attention", inputs=q, outputs=hidden, bias=output_bias, count=layers))
    return linears


def mlp_linears(fields: Fields, family: Family, hidden: int, width: int, layers: int) -> list[Linear]:
    """Gate, up and down projections of `layers` gated feed-forward blocks."""
    bias = fields.flag(family.mlp_bias)
    widths = {"gate_up_proj": 2 * width} if family.fused else {"gate_proj": width, "up_proj": width}
    linears = [
        Linear(name=name, kind="mlp", inputs=hidden, outputs=outputs, bias=bias, count=layers)
        for name, outputs in widths.items()
    ]
    linears.append(Linear(name="down_proj", kind="mlp", inputs=width, outputs=hidden, bias=bias, count=layers))
    return linears


def expert_count(fields: Fields, family: Family) -> int:
    """Experts in a sparse layer, under whichever name this file has."""
    names = [name for name in EXPERT_ALIASES if fields.config.get(name) is not None]
    return fields.size(names[0] if names else str(family.experts_field))


def sparse_layers(fields: Fields, layers: int) -> int:
    """Layers with experts: every `decoder_sparse_step`-th one that `mlp_only_layers` does not name."""
    step = fields.size("decoder_sparse_step", 1)
    dense_only = set(fields.indices("mlp_only_layers"))
    return sum((index + 1) % step == 0 and index not in dense_only for index in range(layers))
