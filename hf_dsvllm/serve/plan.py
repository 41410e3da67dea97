"""Paths of exports and adapters -> the vLLM servers they need: one for each model, one for all adapters of a base."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.engine.spec import lora_rank_bound
from hf_dsvllm.errors import EngineError
from hf_dsvllm.export.source import RunRecord, find_record, has_chat_template

__all__ = ["ServedAdapter", "Server", "plan_servers"]

EXPORT_REPORT = "export_report.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """One adapter and the name it is asked for by."""

    name: str
    path: Path
    rank: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One vLLM process: a model under `name`, or a base with the `adapters` that share it (its own name is `base`).

    `revision` is the commit, branch or tag of a base on the hub; folders have none.  `found_from` is where the relative
    path leads to the base that an adapter records it by.
    """

    model: str
    name: str
    revision: str | None = None
    adapters: tuple[ServedAdapter, ...] = ()
    tokenizer: Path | None = None
    chat: bool = False
    found_from: Path | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for by the user's names."""
        return tuple(adapter.name for adapter in self.adapters) or (self.name,)

    def model_arguments(self) -> list[str]:
        """The part of vLLM's command line that says what is served."""
        line = ["--model", self.model]
        if self.revision is not None:
            line += ["--revision", self.revision]
        if self.tokenizer is not None:
            line += ["--tokenizer", str(self.tokenizer)]
        elif self.revision is not None:
            line += ["--tokenizer-revision", self.revision]
        if not self.adapters:
            return [*line, "--served-model-name", self.name]
        rank = max(adapter.rank for adapter in self.adapters)
        line += ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(lora_rank_bound(rank))]
        if len(self.adapters) > 1:
            line += ["--max-loras", str(len(self.adapters))]  # all at once in a batch, none swapped
        return [*line, "--lora-modules", *(f"{adapter.name}={adapter.path}" for adapter in self.adapters)]


def plan_servers(paths: Sequence[str | Path], name: str | None = None) -> tuple[Server, ...]:
    """The servers for `paths`, each PATH or NAME=PATH; a name is by default the folder's.

    Raises one EngineError with everything that cannot be served, and for a name that is given twice.
    """
    if name is not None and len(paths) > 1:
        raise EngineError(f"--name {name} names one model, but there are {len(paths)}: write NAME=PATH for each.")
    servers: dict[str, Server] = {}
    problems: list[str] = []
    for given in paths:
        called, path = _named(given)
        called = name or called or path.absolute().name
        try:
            server = _server(path, called)
        except EngineError as error:
            problems.append(str(error))
            continue
        shared = f"{server.model} {server.revision} {server.tokenizer}"
        key = shared if server.adapters else f"{path.absolute()} {called}"
        known = servers.get(key)
        servers[key] = server if known is None else _joined(known, server)
    names = [called for server in servers.values() for called in server.names]
    problems += [
        f"{each} is the name of two models: give them others, NAME=PATH." for each in sorted(set(names))
        if names.count(each) > 1
    ]  # fmt: skip
    if problems:
        raise EngineError("\n".join(problems))
    return tuple(servers.values())


def _named(given: str | Path) -> tuple[str | None, Path]:
    """`NAME=PATH` -> both; a path that exists is a path, whatever it contains."""
    name, sign, path = str(given).partition("=")
    if not sign or Path(given).exists():
        return None, Path(given)
    return name, Path(path)


def _joined(one: Server, other: Server) -> Server:
    found_from = one.found_from or other.found_from
    return dataclasses.replace(one, adapters=(*one.adapters, *other.adapters), found_from=found_from)


def _server(path: Path, name: str) -> Server:
    if not path.is_dir():
        raise EngineError(f"{path} is no folder: name an export (`hf-dsvllm export RUN --out PATH`) or an adapter.")
    if (path / "adapter_config.json").is_file():
        return _adapter_server(path, name)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return Server(model=str(path.absolute()), name=name, chat=has_chat_template(path))
    hint = "it is a run folder" if (path / "run.json").is_file() else "it has no config.json with safetensors"
    raise EngineError(
        f"{path} cannot be served: {hint} and no adapter_config.json. Make an export of it: "
        f"`hf-dsvllm export {path} --out {path / 'export'}`."
    )


def _adapter_server(path: Path, name: str) -> Server:
    """An adapter on its recorded base; refused where vLLM would serve something else than was trained."""
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    # An adapter that was exported knows its base, and the user has accepted it.
    record = None if (path / EXPORT_REPORT).is_file() else find_record(path)
    _check_adapter(path, config, record)
    base = record.base_model if record is not None else config.get("base_model_name_or_path")
    revision = record.base_revision if record is not None else config.get("revision")
    if not base:
        raise EngineError(
            f"{path}/adapter_config.json names no base model; make an export with --base PATH and serve it."
        )
    places = [*([] if record is None else [record.folder / "tokenizer"]), path]
    tokenizer = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    folder = Path(str(base)).expanduser()
    is_folder, relative = folder.is_dir(), not folder.is_absolute()
    folder = folder.absolute()
    return Server(
        model=str(folder if is_folder else base),
        name="base",
        revision=None if is_folder else revision,
        adapters=(ServedAdapter(name=name, path=path.absolute(), rank=int(config["r"])),),
        tokenizer=None if tokenizer is None else _same(tokenizer.absolute(), folder),
        chat=has_chat_template(tokenizer or folder),
        found_from=Path.cwd() if is_folder and relative else None,
    )


def _check_adapter(path: Path, config: dict[str, Any], record: RunRecord | None) -> None:
    """EngineError where vLLM would serve something else; what a configuration means is said by `will_it_serve`."""
    from hf_dsvllm.export.adapter_format import will_it_serve  # needs torch, which serving whole models does without

    serving = will_it_serve(config)
    said = f"vLLM cannot serve the adapter in {path} as it was trained"
    if serving.how == "refuse":
        raise EngineError(
            f"{said}: {serving.why}. Train without that, or merge it with PEFT where it was trained "
            "(`merge_and_unload`) and serve what `save_pretrained` writes."
        )
    reasons = [] if serving.how == "hot-load" else [serving.why]
    reasons += _left_out(path)
    if record is not None and record.quantization is not None:
        reasons.append("its base was in 4 bit (QLoRA); on the 16-bit base it is another model")
    if reasons:
        raise EngineError(
            f"{said}: {'; '.join(reasons)}. Make an export, which has it merged: `hf-dsvllm export RUN --out PATH`, "
            "then serve that."
        )


def _left_out(path: Path) -> list[str]:
    """What vLLM leaves out of an adapter without saying so, by the names of the tensors: `all-linear` does not tell."""
    from hf_dsvllm.adapters import NOT_WRAPPED
    from hf_dsvllm.export.adapter_format import OTHER_TOWERS
    from hf_dsvllm.tensors.weights import TensorFolder

    file = path / "adapter_model.safetensors"
    if not file.is_file():
        return []
    with TensorFolder(file) as tensors:
        parts = {part for name in tensors.names for part in name.split(".")}
    heads = sorted(parts & NOT_WRAPPED)
    towers = sorted(part for part in parts if part.startswith(OTHER_TOWERS))
    reasons = [f"vLLM leaves embeddings and output head out ({', '.join(heads)})"] if heads else []
    return reasons + ([f"vLLM leaves adapters beside the language model out ({', '.join(towers)})"] if towers else [])


def _same(tokenizer: Path, base: Path) -> Path | None:
    """None if the base has the very same tokenizer, so that adapters of several folders can share a server."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    with contextlib.suppress(OSError):
        if all((tokenizer / name).read_bytes() == (base / name).read_bytes()
               for name in names if (tokenizer / name).is_file()):  # fmt: skip
            return None
    return tokenizer
