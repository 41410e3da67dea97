"""Everything an export is made from, opened and checked before a byte is written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm import __version__
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.fingerprint import fingerprint, fingerprint_of
from hf_dsvllm.export.layout import Layout, cast_layout, merged_layout
from hf_dsvllm.export.merge import Adapter, read_adapter
from hf_dsvllm.export.naming import Skeleton, read_skeleton
from hf_dsvllm.export.source import RunRecord, Source, find_tokenizer, local_base, tokenizer_files
from hf_dsvllm.export.trained import GENERATION_CONFIG
from hf_dsvllm.tensors.hashing import ALGORITHM, hash_of
from hf_dsvllm.tensors.weights import TensorFolder, TensorSource, has_safetensors, torch_dtype
from hf_dsvllm.tensors.zero_adapter import write_adapter
from hf_dsvllm.tensors.zero_checkpoint import ZeroCheckpoint

__all__ = ["ORIGINAL", "Job", "inputs_of", "layout_of", "open_job"]

ORIGINAL = "original"  # --base original: the 16-bit weights that a QLoRA run quantised


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A source with its base, adapter and tokenizer.  `quantization` is the training's own.

    With `onto_original` the adapter goes onto the base's unquantised weights, which is another model than the trained.
    """

    source: Source
    base: Path | None
    tensors: TensorSource
    adapter: Adapter | None
    quantization: Mapping[str, Any] | None
    onto_original: bool
    base_dtype: torch.dtype | None
    dtype: torch.dtype
    tokenizer: Path | None
    notes: tuple[str, ...]

    @property
    def config_dir(self) -> Path:
        """Where config.json is taken from."""
        own = (self.source.model_dir / "config.json").is_file()
        return self.base if self.base is not None and (self.adapter is not None or not own) else self.source.model_dir

    @property
    def generation(self) -> Mapping[str, Any] | None:
        """`generation` of the run's record, for sources that do not bring a configuration of their own."""
        own = self.config_dir == self.source.model_dir
        return None if own or self.source.record is None else self.source.record.generation

    @property
    def generation_file(self) -> Path | None:
        """The source's own generation config, else the base's."""
        files = [place / GENERATION_CONFIG for place in (self.source.model_dir, self.base) if place is not None]
        return next((file for file in files if file.is_file()), None)


def open_job(source: Source, dtype: torch.dtype, base_name: str | None, stack: contextlib.ExitStack) -> Job:
    """Open everything; what is opened or made for it ends with `stack`.  ExportError if something does not fit."""
    record = source.record
    notes: list[str] = []
    adapter = _open_adapter(source, stack)
    original = base_name == ORIGINAL
    given = None if original else base_name
    recorded = (record.base_model if record else None) or (adapter and adapter.config.get("base_model_name_or_path"))
    if adapter is not None and not (given or recorded):
        raise ExportError(f"{source.model_dir} does not say which base it was trained on; name it with --base PATH.")
    name = given or recorded
    revision = _recorded_revision(record, adapter) if name == recorded else None
    base = local_base(name, revision) if name and (adapter is not None or given) else _base_if_there(name)
    if adapter is not None:
        assert base is not None
        _refuse_quantised(base)
        notes += _check_base(source, adapter, base, given, recorded)
    quantization = record.quantization if record and adapter is not None else None
    if original and quantization is None:
        raise ExportError(
            "--base original is for adapters of a QLoRA run, whose base was quantised: this source has no record of "
            "that. Leave it out, or name the run folder."
        )
    if adapter is not None and record is None:
        notes.append(
            "no run.json: the base is taken as it is, not through 4 bit; for a QLoRA run export its run folder"
        )
    return Job(
        source=source,
        base=base,
        tensors=stack.enter_context(_open_tensors(source, base)),
        adapter=adapter,
        quantization=quantization,
        onto_original=original,
        base_dtype=_dtype_in_training(record, base) if record and adapter is not None and not original else None,
        dtype=dtype,
        tokenizer=find_tokenizer(source, base),
        notes=tuple(notes),
    )


def layout_of(job: Job) -> Layout:
    """Which tensors are written and how each is made."""
    if isinstance(job.tensors, TensorFolder):
        _refuse_whole_weights(job.tensors, job.config_dir)
    if job.adapter is None:
        layout = cast_layout(job.config_dir, job.tensors, dtype=job.dtype, base=job.base)
        _same_as_base(job, layout)
        return layout
    assert job.base is not None
    assert isinstance(job.tensors, TensorFolder)
    return merged_layout(
        job.base,
        job.tensors,
        job.adapter,
        base_dtype=job.base_dtype,
        dtype=job.dtype,
        quantization=None if job.onto_original else job.quantization,
    )


def inputs_of(job: Job, max_shard_size_bytes: int, format: str) -> dict[str, Any]:  # noqa: A002
    """Everything that decides the exported bytes: BLAKE3 of every file read, and the settings."""
    weights = "weights" if job.adapter is None else "base"
    hashes: dict[str, Any] = {f"{weights}/{name}": digest for name, digest in job.tensors.hashes().items()}
    if job.adapter is not None:
        hashes |= {f"adapter/{name}": digest for name, digest in job.adapter.tensors.hashes().items()}
        hashes["adapter/adapter_config.json"] = hash_of(job.adapter.path / "adapter_config.json")
    hashes[f"{weights}/config.json"] = hash_of(job.config_dir / "config.json")
    if job.generation_file is not None:
        hashes[f"{weights}/{GENERATION_CONFIG}"] = hash_of(job.generation_file)
    if job.tokenizer is not None:
        hashes |= {f"tokenizer/{name}": hash_of(job.tokenizer / name) for name in tokenizer_files(job.tokenizer)}
    return hashes | {
        "format": format,
        "dtype": str(job.dtype),
        "base_dtype": str(job.base_dtype),
        "max_shard_size_bytes": max_shard_size_bytes,
        "quantization": None if job.quantization is None else dict(job.quantization),
        "onto_original": job.onto_original,
        "generation": None if job.generation is None else dict(job.generation),
        "hash": ALGORITHM,
        "hf_dsvllm": __version__,  # another version may merge otherwise
    }


def _open_adapter(source: Source, stack: contextlib.ExitStack) -> Adapter | None:
    if source.kind == "zero_adapter":
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-dsvllm-adapter-"))
        return read_adapter(write_adapter(source.model_dir, Path(folder)))
    return read_adapter(source.model_dir) if source.kind == "adapter" else None


def _open_tensors(source: Source, base: Path | None) -> TensorFolder | ZeroCheckpoint:
    if source.kind in ("adapter", "zero_adapter"):
        assert base is not None
        return TensorFolder(base)
    if source.kind == "full":
        tensors = TensorFolder(source.model_dir)
        if empty := [name for name in tensors.names if 0 in tensors.shape(name)]:
            tensors.close()
            raise ExportError(
                f"{source.model_dir} has {len(empty)} empty tensors such as {empty[0]}: it was saved from partitioned "
                "ZeRO-3 parameters without gathering them; export a snapshot or another checkpoint."
            )
        return tensors
    if not (source.model_dir / "config.json").is_file() and base is None:
        raise ExportError(
            f"{source.model_dir} has no config.json beside its DeepSpeed shards; name the model that was trained with "
            "--base, or copy its config.json there."
        )
    return ZeroCheckpoint(source.model_dir)


def _recorded_revision(record: RunRecord | None, adapter: Adapter | None) -> str | None:
    """The revision of the recorded base: the run's, else what a bare adapter names."""
    if record is not None:
        return record.base_revision
    return None if adapter is None else adapter.config.get("revision")


def _dtype_in_training(record: RunRecord, base: Path | None) -> torch.dtype:
    """The dtype the trainer held the base in; "auto" is the base's own, by transformers' rule."""
    if record.dtype != "auto" or base is None:
        return torch_dtype(record.dtype)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    if named:
        return torch_dtype(named)
    with TensorFolder(base) as tensors:
        return next(dtype for name in tensors.names if (dtype := tensors.dtype(name)).is_floating_point)


def _base_if_there(name: str | None) -> Path | None:
    """A full model does not need its base; if it lies on this disk, it is compared with."""
    return Path(name) if name and Path(name).is_dir() else None


def _refuse_quantised(base: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise ExportError(
            f"{base} is stored quantised ({config['quantization_config'].get('quant_method')}): a merge needs the "
            "16-bit model it was made from; name it with --base."
        )


def _check_base(source: Source, adapter: Adapter, base: Path, given: str | None, recorded: str | None) -> list[str]:
    """The base has the weights that were trained on, as far as that is on record; returns what could not be told."""
    now = fingerprint(base)
    record = source.record
    if record is not None and record.base_fingerprint not in (None, now):
        raise ExportError(
            f"{base} is not the base that {record.folder} was trained on: its weights differ from those on record. It "
            "was overwritten since, or --base names another model; name the right one with --base."
        )
    own = adapter.config.get("base_model_name_or_path")
    revision = adapter.config.get("revision")
    if record is not None and own and own != record.base_model and fingerprint_of(own, revision) not in (None, now):
        raise ExportError(
            f"The adapter in {source.model_dir} was trained on another base, {own}, than its run, {record.base_model}: "
            "it does not belong to this run. Export the adapter's own run, or the adapter alone with --base."
        )
    if given and recorded and given != recorded and (record is None or record.base_fingerprint is None):
        trained = fingerprint_of(recorded) if Path(recorded).is_dir() else None
        if trained not in (None, now):
            raise ExportError(f"--base {given} is not the base that was trained: its weights differ from {recorded}.")
        if trained is None:
            return [f"nothing on this machine tells whether {given} is the base that was trained on, {recorded}"]
    return []


def _same_as_base(job: Job, layout: Layout) -> None:
    """A full model has its base's parameters and their shapes, up to tied copies and resized embeddings.

    Files may hold tensors that are none, such as `rotary_emb.inv_freq`, or leave a prefix out.  A base without
    safetensors tells nothing.
    """
    if job.base is None or not has_safetensors(job.base):
        return
    with TensorFolder(job.base) as tensors:
        base = {name: tensors.shape(name) for name in tensors.names}
    ours = {planned.name: planned.shape for planned in layout.plan}
    if not base.keys() <= ours.keys():
        skeleton, shared = read_skeleton(job.config_dir), base.keys() & ours.keys()
        base, ours = _by_parameter(skeleton, base, shared), _by_parameter(skeleton, ours, shared)
    lost = [name for name in base if name not in ours and "lm_head" not in name and "embed" not in name]
    reshaped = [name for name in base if name in ours and ours[name][1:] != base[name][1:]]
    if lost or reshaped:
        raise ExportError(
            f"{job.source.model_dir} is not the recorded base {job.base}, trained: missing {lost[:3]}, other shape "
            f"{reshaped[:3]}. The snapshot is damaged, or --base is wrong."
        )


def _by_parameter(
    skeleton: Skeleton, shapes: Mapping[str, tuple[int, ...]], shared: Set[str]
) -> dict[str, tuple[int, ...]]:
    """Shapes by the model's own names, without tensors that make no parameter; those in `shared` stay as they are."""
    found = {name: shapes[name] for name in shared}
    for key, place in skeleton.places(shapes.keys() - shared).items():
        if place.name in skeleton.parameters:
            part = "" if place.part is None else f" (expert {place.part.expert}, piece {place.part.piece})"
            found[place.name + part] = shapes[key]
    return found


def _refuse_whole_weights(tensors: TensorFolder, config_dir: Path) -> None:
    """Masks and counts are whole numbers in files of any model, weights are in those of a quantised one alone."""
    config = json.loads((config_dir / "config.json").read_text(encoding="utf-8"))
    for name in tensors.names:
        suspect = name.endswith(".weight") or config.get("quantization_config")
        if suspect and not (dtype := tensors.dtype(name)).is_floating_point:
            raise ExportError(
                f"{name} in {tensors.path} has dtype {str(dtype).removeprefix('torch.')}: this looks like a quantised "
                "checkpoint; name the model in 16 or 32 bit that it was made from with --base."
            )
