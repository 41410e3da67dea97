"""LoRA as vLLM applies it: whether it will serve an adapter, and the adapter rewritten so that it does.

vLLM reads one rank and one alpha from adapter_config.json; up to 0.31 it ignores patterns of them without a word.  Here
every layer is brought to one rank (with rows of zeros) and its own scale is multiplied into B, so that alpha = rank.
That is `--format adapter` of the export, and what the engine gets in training (`servable_adapter`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from hf_dsvllm.adapters import vocabulary_was_resized
from hf_dsvllm.engine.spec import LORA_RANKS, lora_rank_bound
from hf_dsvllm.errors import ExportError, Problem
from hf_dsvllm.export.layout import Layout
from hf_dsvllm.export.merge import CONFIG, HANDLED, HARMLESS_INITS, WEIGHTS, Adapter, Update, read_adapter
from hf_dsvllm.files import atomic_folder, write_json
from hf_dsvllm.tensors.weights import TensorPlan

__all__ = [
    "Serving",
    "adapter_layout",
    "servable_adapter",
    "serving_problems",
    "why_merge_live",
    "will_it_serve",
    "write_adapter_config",
]

Settings = Mapping[str, Any]
# Beside the language model: vLLM leaves adapters on these out with a warning (0.32, lora/model_manager).
OTHER_TOWERS = ("visual", "vision", "audio", "multi_modal_projector", "mm_projector")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How vLLM comes to answer with an adapter: loaded as it is, rewritten, merged into a copy of the base, or not.

    `why` names the setting and what vLLM would do with it; `fix` is what to change where nothing helps.
    """

    how: Literal["hot-load", "rewrite", "merge", "refuse"]
    why: str
    fix: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    """What a setting that is there means; `text` may hold {value}."""

    key: str
    text: str
    fix: str = ""


# vllm/lora/peft_helper.py and lora_model.py, 0.26 to 0.32; what merges is `merge.Update`.
_MERGED = (
    _Rule("use_dora", "vLLM refuses DoRA"),
    _Rule("modules_to_save", "vLLM refuses modules_to_save={value}"),
    _Rule("target_parameters", "vLLM serves target_parameters of a few mixtures of experts only"),
    _Rule("trainable_token_indices", "vLLM refuses trained tokens"),
)
_REWRITTEN = (
    _Rule("rank_pattern", "vLLM up to 0.31 ignores rank_pattern: scales go into the weights"),
    _Rule("alpha_pattern", "vLLM up to 0.31 ignores alpha_pattern: scales go into the weights"),
)
_REFUSED = (
    _Rule("lora_bias", "lora_bias gives layers a bias that the base has not", "lora_bias=False"),
    _Rule("layer_replication", "layer_replication makes another model of the base", "leave layer_replication out"),
)


def will_it_serve(config: Any, model: Any = None) -> Serving:
    """How an adapter of PEFT's `config` (an object or adapter_config.json's dict) reaches vLLM as it was trained.

    With the live `model`, also by what its adapted layers are.  Nothing is computed; ask before the first step.
    """
    settings: Settings = config if isinstance(config, Mapping) else config.to_dict()
    return (
        _refusal(settings)
        or _first(_MERGED, settings, "merge")
        or _by_size(settings)
        or (None if model is None else _by_layers(model))
        or _first(_REWRITTEN, settings, "rewrite")
        or Serving(how="hot-load", why="vLLM loads it as it is")
    )


def serving_problems(model: Any) -> list[Problem]:
    """What must change before the adapters of a live PEFT model can be evaluated; [] for other models."""
    configs = getattr(model, "peft_config", None) or {}
    if len(configs) > 1:
        names = ", ".join(map(repr, configs))
        return [
            Problem(
                f"the model has {len(configs)} adapters ({names}), and an evaluation serves one",
                "train one adapter at a time, or drop --gen_eval_file",
            )
        ]
    servings = [will_it_serve(config, model) for config in configs.values()]
    return [
        Problem(f"vLLM cannot answer with this adapter: {serving.why}", serving.fix)
        for serving in servings
        if serving.how == "refuse"
    ]


def why_merge_live(model: Any, max_lora_rank: int | None) -> str | None:
    """Why the adapters of a live model must be merged for an engine started for ranks up to `max_lora_rank`.

    None if it can load them, and for models without.  A script's own adapters may be others than a preset's, which the
    engine was started for before the model was there.
    """
    if getattr(model, "peft_config", None) and vocabulary_was_resized(model):
        return "the vocabulary was resized"
    for config in (getattr(model, "peft_config", None) or {}).values():
        serving = will_it_serve(config, model)
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        if serving.how == "merge":
            return serving.why
        if max_lora_rank is None or rank > lora_rank_bound(max_lora_rank):
            return f"vLLM was not started for adapters of rank {rank}"
    return None


def servable_adapter(folder: Path, out: Path) -> Path:
    """`folder` itself if vLLM applies it as it was trained, else the same adapter rewritten under `out`.

    Earlier rewritten ones are removed but for the newest, which the engine may still have loaded.
    """
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not _is_uneven(settings):
        return folder
    from safetensors.torch import save_file

    adapter = read_adapter(folder)
    layout = adapter_layout(adapter)
    target = out / folder.name
    if out.is_dir():
        for old in sorted(out.iterdir(), key=lambda item: item.stat().st_mtime)[:-1]:
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    with atomic_folder(target) as fresh:
        tensors = {planned.name: layout.produce(planned.name).contiguous() for planned in layout.plan}
        save_file(tensors, fresh / WEIGHTS, {"format": "pt"})
        write_adapter_config(fresh, adapter, str(settings.get("base_model_name_or_path")))
    return target


def _refusal(settings: Settings) -> Serving | None:
    kind = str(getattr(settings.get("peft_type"), "value", settings.get("peft_type")))
    if kind != "LORA":
        return Serving(how="refuse", why=f"peft_type={kind} is not LoRA",
                       fix="LoraConfig, or drop --gen_eval_file")  # fmt: skip
    init = settings.get("init_lora_weights", True)
    if init not in HARMLESS_INITS:
        return Serving(
            how="refuse",
            why=f"init_lora_weights={init!r} changes the base itself, the saved adapter is a difference to that",
            fix="init_lora_weights=True, 'gaussian', 'eva' or 'orthogonal'",
        )
    named = _first(_REFUSED, settings, "refuse")
    if named is not None:
        return named
    for key, value in settings.items():
        if key not in HANDLED and not _is_absent(value):
            why = f"{key}={value!r} is neither served by vLLM nor merged by this package"
            return Serving(how="refuse", why=why, fix=f"leave {key} out, or drop --gen_eval_file")
    return None


def _first(rules: tuple[_Rule, ...], settings: Settings, how: Literal["rewrite", "merge", "refuse"]) -> Serving | None:
    for rule in rules:
        value = settings.get(rule.key)
        if not _is_absent(value):
            return Serving(how=how, why=rule.text.format(value=value), fix=rule.fix)
    return None


def _is_absent(value: Any) -> bool:
    """Unset: None, False, or empty; PEFT's nested configurations (loftq_config={}) count as what they hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_absent(each) for each in dataclasses.asdict(value).values())
    if isinstance(value, Mapping):
        return all(_is_absent(each) for each in value.values())
    return value is None or value is False or value == [] or value == ()


def _by_size(settings: Settings) -> Serving | None:
    if str(settings.get("bias", "none")) != "none":
        return Serving(how="merge", why=f"vLLM refuses bias={settings['bias']!r}")
    largest = max([int(settings["r"]), *(settings.get("rank_pattern") or {}).values()])
    if largest > LORA_RANKS[-1]:
        return Serving(how="merge", why=f"rank {largest} is above vLLM's largest, {LORA_RANKS[-1]}")
    return None


def _by_layers(model: Any) -> Serving | None:
    """By what the adapted layers are: embeddings, output head, layers of other towers, things that are no matrix."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = (base.get_input_embeddings(), base.get_output_embeddings())
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        inner = module.get_base_layer()
        short = name.removeprefix("base_model.model.")
        if any(module is head or inner is head for head in heads) or isinstance(inner, torch.nn.Embedding):
            return Serving(how="merge", why=f"vLLM leaves adapters on embeddings and output head out ({short})")
        if any(part.startswith(OTHER_TOWERS) for part in short.split(".")):
            return Serving(how="merge", why=f"vLLM leaves adapters beside the language model out ({short})")
        if getattr(getattr(inner, "weight", None), "dim", lambda: 2)() > 2 and not hasattr(inner.weight, "ds_id"):
            return Serving(how="refuse", why=f"{short} is a {type(inner).__name__}, not a matrix",
                           fix="target_modules without it, or drop --gen_eval_file")  # fmt: skip
    return None


def adapter_layout(adapter: Adapter) -> Layout:
    """The tensors of `adapter` as vLLM applies them; ExportError for what it cannot serve as an adapter at all."""
    _refuse(adapter)
    rank = _rank(adapter)
    makers: dict[str, tuple[Update, bool]] = {}
    for update in adapter.updates.values():
        assert update.lora_a is not None
        assert update.lora_b is not None
        makers |= {update.lora_a: (update, False), update.lora_b: (update, True)}

    def produce(key: str) -> torch.Tensor:
        update, high = makers[key]
        tensor = adapter.tensors.get(key)
        if not _is_uneven(adapter.config):
            return tensor
        if high:
            scaled = (tensor.float() * update.scaling).to(tensor.dtype)
            return torch.nn.functional.pad(scaled, (0, rank - tensor.shape[1]))
        return torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))

    def shape(key: str) -> tuple[int, ...]:
        first, second = adapter.tensors.shape(key)
        return (first, rank) if makers[key][1] else (rank, second)

    return Layout(
        plan=tuple(TensorPlan(name=key, shape=shape(key), dtype=adapter.tensors.dtype(key)) for key in makers),
        produce=produce,
        changed=tuple(makers),
    )


def write_adapter_config(folder: Path, adapter: Adapter, base: str) -> None:
    """adapter_config.json for the tensors of `adapter_layout`."""
    config = dict(adapter.config) | {"base_model_name_or_path": base, "inference_mode": True}
    if _is_uneven(adapter.config):
        rank = _rank(adapter)
        config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    write_json(folder / CONFIG, json.loads(json.dumps(config)))


def _is_uneven(config: Mapping[str, Any]) -> bool:
    return bool(config.get("rank_pattern") or config.get("alpha_pattern"))


def _rank(adapter: Adapter) -> int:
    """The largest rank of any layer."""
    return max(adapter.tensors.shape(update.lora_a)[0] for update in adapter.updates.values() if update.lora_a)


def _refuse(adapter: Adapter) -> None:
    kinds = {
        "DoRA": any(update.magnitude for update in adapter.updates.values()),
        "whole saved modules or biases": any(
            update.replacement or update.bias_delta for update in adapter.updates.values()
        ),
        "trained tokens": any(update.rows for update in adapter.updates.values()),
        "LoRA on embeddings": any(update.embedding for update in adapter.updates.values()),
        "LoRA on experts (target_parameters)": any(update.wrapper is not None for update in adapter.updates.values()),
    }
    found = [name for name, there in kinds.items() if there]
    if found:
        raise ExportError(
            f"The adapter in {adapter.path} has {', '.join(found)}, which vLLM does not serve as an adapter: leave "
            "--format out, and everything is merged."
        )
