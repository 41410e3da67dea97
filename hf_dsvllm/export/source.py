"""What an export is made from: a run folder, a Trainer checkpoint or an adapter, and the base model it belongs to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_dsvllm.console import say
from hf_dsvllm.errors import ExportError

__all__ = [
    "Format",
    "RunRecord",
    "Source",
    "Target",
    "Which",
    "base_commit",
    "best_step",
    "find_record",
    "find_source",
    "find_tokenizer",
    "has_chat_template",
    "local_base",
    "tokenizer_files",
]

Which = Literal["best", "latest", "final"]
Format = Literal["merged", "adapter"]
Target = Literal["compose", "k8s", "ray", "systemd"]
Kind = Literal["adapter", "full", "zero", "zero_adapter"]
RECORD = "run.json"
SNAPSHOTS = "snapshots"
TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
OF_RUNS = ("checkpoint-*/*.safetensors", "snapshots/*.safetensors")  # what a pushed run has below its own weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The part of RUN/run.json that an export needs; `folder` is RUN.

    `base_revision` is the commit of a base on the hub, None for a folder; `dtype` is the one that the base was loaded
    in, "auto" in old records of runs that left it to the base.
    `base_fingerprint` is None for runs whose base has no safetensors, and for those before it was recorded;
    `generation` is `trained.trained_record`'s, None before that was recorded.
    """

    folder: Path
    base_model: str
    adapter: str | None
    quantization: Mapping[str, Any] | None
    dtype: str
    base_revision: str | None = None
    base_fingerprint: str | None = None
    generation: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The folder with the trained weights, what kind they are, and the run they came from (if it is recorded).

    `zero` and `zero_adapter` are partitioned DeepSpeed checkpoints: of a whole model, and of an adapter whose own file
    was left empty.
    """

    model_dir: Path
    kind: Kind
    step: int | None
    record: RunRecord | None


def find_source(path: Path, which: Which) -> Source:
    """Find the weights meant by `path`: its best, latest or final ones if it is a run, itself otherwise.

    OWNER/NAME is a repository of the hub, if there is no folder of that name nor a folder OWNER.
    `latest` is the newest snapshot or whole Trainer checkpoint, the snapshot where both are of one step; `final` is
    what the Trainer saved in the run folder itself at the end, else the latest.  Raises ExportError if there is nothing
    to export.
    """
    if which not in ("best", "latest", "final"):
        raise ExportError(f"which={which!r} is not one of best, latest, final.")
    path = _downloaded(path)
    if not path.is_dir():
        near = sorted(item.name for item in path.parent.iterdir() if item.is_dir()) if path.parent.is_dir() else []
        beside = f" Beside it: {', '.join(near[:8])}." if near else ""
        raise ExportError(f"{path} is no folder: name a run, a checkpoint or an adapter folder.{beside}")
    record = find_record(path)
    if which == "best":
        return _snapshot(path, "best.json", record)
    kind = _kind(path)
    pointer = path / SNAPSHOTS / "latest.json"
    if which == "latest" or kind is None:
        newest = _newest_checkpoint(path)
        if newest is not None and (not pointer.is_file() or _is_newer(newest, pointer)):
            return _source(newest, _kind(newest), _step_of(newest), record)
        if pointer.is_file():
            return _snapshot(path, pointer.name, record)
    if kind is not None:
        return _source(path, kind, _step_of(path) if path.name.startswith(("checkpoint-", "step-")) else None, record)
    raise ExportError(
        f"Nothing to export in {path}: it has no {SNAPSHOTS}/latest.json, no checkpoint-*, no adapter_config.json, no "
        "model.safetensors with config.json and no DeepSpeed global_step* folder. Did the run save anything?"
    )


def find_record(path: Path) -> RunRecord | None:
    """RUN/run.json, if `path` is RUN or up to two folders below it (RUN/snapshots/step-40, RUN/checkpoint-40)."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / RECORD).is_file():
            return _read_record(folder)
    return None


def best_step(run: Path) -> int | None:
    """The step of the run's best snapshot; None if scores pointed to none."""
    pointer = run / SNAPSHOTS / "best.json"
    return int(json.loads(pointer.read_text(encoding="utf-8"))["step"]) if pointer.is_file() else None


def local_base(name: str, revision: str | None = None) -> Path:
    """The folder of a base model given by path or hub id (the hub's cache is used; downloads only what is needed).

    `revision` is a commit, branch or tag of the hub, None for its main branch; folders have none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")):
        raise ExportError(f"The base model {name} is no folder any more; say where it is with --base PATH.")
    try:
        return _from_hub(name, revision)
    except Exception as error:  # whatever the hub client raises, the user can do the same thing about it
        at = f" at revision {revision!r}" if revision else ""
        raise ExportError(
            f"The base model {name!r}{at} is neither a folder nor reachable on the hub ({type(error).__name__}): "
            "say where it is with --base PATH."
        ) from error


def base_commit(name: str, revision: str | None) -> str | None:
    """The commit that `revision` of a base on the hub is in the local cache, so that a branch may move on.

    `revision` itself where the cache does not tell; None for a folder.
    """
    if Path(name).expanduser().is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # no name that the hub could have
        file = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(file, str):
            return Path(file).parent.name
    return revision


def _downloaded(path: Path) -> Path:
    """`path`, or where the repository of the hub that it names was downloaded to."""
    if path.exists() or path.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return path
    try:
        return _from_hub(str(path), more=OF_RUNS)
    except Exception as error:
        raise ExportError(
            f"{path} is neither a folder nor a repository that can be had from the hub ({type(error).__name__}: "
            f"{error}). A private one needs `hf auth login`."
        ) from error


def _from_hub(name: str, revision: str | None = None, more: Sequence[str] = ()) -> Path:
    """A repository of the hub in the cache: what is small, the files of weights that are read, and patterns in `more`.

    Some hold their weights twice, such as Mistral's consolidated.safetensors and gpt-oss' original/.
    """
    folder = _in_cache(name, revision, SMALL_FILES)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        weights = {"model.safetensors"}
    wanted = [*SMALL_FILES, "adapter_model.safetensors", *sorted(weights), *more]
    # The commit that the small files are of: a branch may move on in between.
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    return _in_cache(name, commit, wanted)


def _in_cache(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a repository in the cache, its files brought there if the hub can be reached."""
    from huggingface_hub import snapshot_download

    what: Any = {"revision": revision, "allow_patterns": [*patterns]}
    try:
        return Path(snapshot_download(name, **what))
    except Exception:
        # huggingface_hub 1.x asks the network for the files of a commit, whatever is in the cache.
        with contextlib.suppress(Exception):
            return Path(snapshot_download(name, **what, local_files_only=True))
        raise


def find_tokenizer(source: Source, base: Path | None) -> Path | None:
    """The tokenizer as trained: the run's, the checkpoint's, else the base's.  A lost chat template is an error."""
    run = [] if source.record is None else [source.record.folder / "tokenizer"]
    places = [*run, source.model_dir, *([] if base is None else [base])]
    folder = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if folder is not None and base is not None and has_chat_template(base) and not has_chat_template(folder):
        raise ExportError(
            f"The base {base} has a chat template and the trained tokenizer in {folder} has none: it was lost when the "
            f"tokenizer was saved. Copy chat_template.jinja into {folder}."
        )
    return folder


def has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))


def tokenizer_files(folder: Path) -> list[str]:
    """The files of a tokenizer that are in `folder`, by their names below it."""
    found = [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
    return [file.relative_to(folder).as_posix() for file in found]


def _read_record(folder: Path) -> RunRecord:
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return RunRecord(
            folder=folder,
            base_model=str(values["base_model"]),
            adapter=values["adapter"],
            quantization=values["quantization"],
            dtype=str(values["dtype"]).removeprefix("torch."),
            base_revision=values.get("base_revision"),
            base_fingerprint=values.get("base_fingerprint"),
            generation=values.get("generation"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / RECORD} is not a run record ({type(error).__name__}: {error}).") from error


def _snapshot(path: Path, pointer: str, record: RunRecord | None) -> Source:
    file = path / SNAPSHOTS / pointer
    if not file.is_file():
        raise ExportError(f"{file} does not exist: this run recorded no {file.stem} snapshot; try --which latest.")
    values = json.loads(file.read_text(encoding="utf-8"))
    folder = path / SNAPSHOTS / values["path"]
    kind = _kind(folder) if folder.is_dir() else None
    if kind is None:
        raise ExportError(
            f"{file} names {folder}, which holds no weights: the snapshot was removed or is not complete."
        )
    return _source(folder, kind, int(values["step"]), record)


def _newest_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of the latest step; one that a killed or a going run has half written is passed over."""
    for folder in sorted(run.glob("checkpoint-*"), key=_step_of, reverse=True):
        if not folder.is_dir():
            continue
        if not (folder / TRAINER_STATE).is_file():
            say(f"{folder} is passed over: it has no {TRAINER_STATE}, half written. Given by its name, it is exported")
        elif _kind(folder):
            return folder
    return None


def _is_newer(checkpoint: Path, pointer: Path) -> bool:
    """Whether a checkpoint is of a later step of the same run than what latest.json points to; said if of a later one.

    An earlier run in this folder may have gone further: its checkpoint was written before the pointer.
    """
    latest = json.loads(pointer.read_text(encoding="utf-8"))
    if _step_of(checkpoint) <= int(latest.get("trained_to", latest["step"])):
        return False
    newer = (checkpoint / TRAINER_STATE).stat().st_mtime_ns > pointer.stat().st_mtime_ns
    snapshot = f"the snapshot of step {latest['step']}"
    if newer:
        say(f"{checkpoint.name} is chosen: of a later step, and written later, than {snapshot}")
    else:
        say(f"{snapshot} is chosen: {checkpoint.name} was written before it, by an earlier run in this folder")
    return newer


def _source(folder: Path, kind: Kind | None, step: int | None, record: RunRecord | None) -> Source:
    assert kind is not None
    return Source(model_dir=folder, kind=kind, step=step, record=record)


def _kind(folder: Path) -> Kind | None:
    if (folder / "adapter_config.json").is_file():
        return "zero_adapter" if _adapter_left_behind(folder) and any(folder.glob("global_step*")) else "adapter"
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors*")):
        return "full"
    if any(folder.glob("global_step*")):
        return "zero"
    return None


def _adapter_left_behind(folder: Path) -> bool:
    """Whether the adapter file is missing or holds empty tensors, as ZeRO-3 leaves it without gathering."""
    from hf_dsvllm.tensors.weights import TensorFolder  # needs torch, which the command line's help does without

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return True
    with contextlib.suppress(ExportError), TensorFolder(file) as tensors:
        return not tensors.names or any(0 in tensors.shape(name) for name in tensors.names)
    return False  # damaged: reading it says so


def _step_of(folder: Path) -> int:
    """`checkpoint-40` or `step-40` -> 40; -1 for other names."""
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
