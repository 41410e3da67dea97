"""What an export was made from and what it is, by hashes: the report, the manifest, and whether one may be reused."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.verify import Verification
from hf_dsvllm.export.verify_engine import EngineVerification
from hf_dsvllm.files import write_json
from hf_dsvllm.tensors.hashing import ALGORITHM, hash_files

__all__ = ["MANIFEST", "REPORT", "ExportReport", "check_manifest", "reusable", "versions", "write_manifest"]

REPORT = "export_report.json"
MANIFEST = "manifest.json"
EMPTY: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was exported from what, and the proof; written as `export_report.json` into the export itself.

    `inputs` (file name -> BLAKE3, and the settings) decides whether an existing export may be reused.
    `write_seconds` is merging and writing alone, `seconds` everything.
    """

    out: str
    source: str
    kind: str
    format: str
    step: int | None
    base: str | None
    quantization: Mapping[str, Any] | None
    dtype: str
    tensors: int
    changed_tensors: int
    untied: tuple[str, ...]
    parameters: int
    weights_bytes: int
    shards: int
    verification: Verification | None
    verification_skipped: str | None
    verification_in_vllm: EngineVerification | None
    notes: tuple[str, ...]
    inputs: Mapping[str, Any]
    versions: Mapping[str, str]
    merged_on: str
    write_seconds: float
    seconds: float
    reused: bool = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should be told: why nothing was proven, and the notes."""
        skipped = self.verification_skipped
        return (*(() if skipped is None else (f"not compared with what was trained: {skipped}",)), *self.notes)


def write_manifest(folder: Path, inputs: Mapping[str, Any], hashed: Mapping[str, str] = EMPTY) -> None:
    """Hashes of base, adapter, tokenizer and of every file in `folder` (some known as `hashed`), as manifest.json."""
    files = {item.relative_to(folder).as_posix(): item for item in sorted(folder.rglob("*")) if item.is_file()}
    found = hash_files(item for name, item in files.items() if name not in hashed and name != MANIFEST)
    written = {name: hashed.get(name) or found[item] for name, item in files.items() if name != MANIFEST}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in inputs.items():
        group, slash, name = key.partition("/")
        groups.setdefault(group if slash else "settings", {})[name if slash else key] = value
    write_json(folder / MANIFEST, {"format": 2, "hash": ALGORITHM, "made_from": groups, "result": written})


def check_manifest(folder: Path) -> None:
    """Every file of an export is as it was written; ExportError names those that are missing or changed."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["result"]
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"{folder / MANIFEST} is missing or damaged ({type(error).__name__}): this folder is no finished export; "
            "make it again with --overwrite."
        ) from error
    lost = sorted(name for name in expected if not (folder / name).is_file())
    found = hash_files(folder / name for name in expected if name not in lost)
    changed = sorted(name for name in expected if name not in lost and expected[name] != found[folder / name])
    if lost or changed:
        raise ExportError(
            f"The export in {folder} was changed after it was made: missing {lost}, other contents {changed}. "
            "Make it again with --overwrite."
        )


def reusable(out: Path, inputs: Mapping[str, Any], overwrite: bool) -> ExportReport | None:
    """The report of a finished export from the same inputs; None if `out` is free or is to be replaced.

    ExportError if `out` is something else, an export of other inputs, or one whose files were changed.
    """
    if not occupied(out):
        return None
    if not (out / REPORT).is_file():
        raise ExportError(f"{out} exists and is no export of hf-dsvllm; name another folder or remove it yourself.")
    if overwrite:
        return None
    values = json.loads((out / REPORT).read_text(encoding="utf-8"))
    known = values["inputs"]
    if known.get("hash") != inputs["hash"]:
        raise ExportError(
            f"{out} holds an export of an earlier version, whose hashes tell nothing now; use --overwrite to "
            "replace it, or name another folder."
        )
    if known != json.loads(json.dumps(inputs)):
        stale = sorted(key for key in inputs.keys() | known.keys() if inputs.get(key) != known.get(key))
        raise ExportError(
            f"{out} holds an export made from other inputs ({', '.join(stale[:4])} differ); "
            "use --overwrite to replace it, or name another folder."
        )
    check_manifest(out)
    checked, engine = values["verification"], values["verification_in_vllm"]
    values |= {
        "verification": None if checked is None else Verification(**checked),
        "verification_in_vllm": None if engine is None else EngineVerification(**engine),
        "reused": True,
    }
    return ExportReport(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def occupied(out: Path) -> bool:
    """Whether something is at `out`, other than an empty folder."""
    return out.exists() and not (out.is_dir() and not any(out.iterdir()))


def versions() -> dict[str, str]:
    """Versions of what decides the exported bytes."""
    found: dict[str, str] = {}
    for name in ("hf-dsvllm", "torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
