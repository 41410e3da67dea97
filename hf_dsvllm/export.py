"""A run, checkpoint or adapter -> one folder that transformers and vLLM load, proven equal to what was trained."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_dsvllm._compat import outside_zero3
from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import atomic_folder, write_json
from hf_dsvllm.layout import Layout, cast_layout, merged_layout
from hf_dsvllm.merge import Adapter, read_adapter
from hf_dsvllm.source import Source, Which, find_source, find_tokenizer, has_chat_template, local_base, tokenizer_files
from hf_dsvllm.verify import Verification, adapter_reference, compare_logits, full_reference, memory_shortfall
from hf_dsvllm.weights import TensorFolder, TensorPlan, check_free_disk, sha256_of, torch_dtype, write_shards

__all__ = ["REPORT", "ExportReport", "export_model"]

REPORT = "export_report.json"
GIB = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was exported from what, and the proof; written as `export_report.json` into the export itself.

    `inputs` (file name -> SHA-256, and the settings) decides whether an existing export may be reused.
    """

    out: str
    source: str
    kind: str
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
    notes: tuple[str, ...]
    inputs: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    reused: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Everything an export is made from, opened and checked."""

    source: Source
    base: Path | None
    tensors: TensorFolder
    adapter: Adapter | None
    quantization: Mapping[str, Any] | None
    base_dtype: torch.dtype | None
    dtype: torch.dtype
    tokenizer: Path | None
    notes: tuple[str, ...]

    @property
    def config_dir(self) -> Path:
        """Where config.json is taken from."""
        return self.base if self.adapter is not None and self.base is not None else self.source.model_dir


@outside_zero3()
def export_model(
    source: Path,
    out: Path,
    *,
    which: Which = "latest",
    dtype: str = "bfloat16",
    max_shard_size_bytes: int = 5 * GIB,
    base: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Merge, check and write the model of `source` to the folder `out`; return the report that lies in it.

    `source` is a run folder, a Trainer checkpoint (adapter, full, or ZeRO-3 without gathered weights), a snapshot or
    a bare adapter.  `base` overrides the recorded base model.  An existing `out` made from the same inputs is
    returned as it is; another one needs `overwrite`.  Raises ExportError; then nothing at `out` looks finished.
    """
    started = time.monotonic()
    found = find_source(source, which)
    target = torch_dtype(dtype)
    with contextlib.ExitStack() as stack:
        job = _open_job(found, target, base, stack)
        inputs = _inputs(job, max_shard_size_bytes)
        existing = _reusable(out, inputs, overwrite)
        if existing is not None:
            return existing
        layout = _layout(job)
        weights_bytes = sum(planned.size_bytes for planned in layout.plan)
        check_free_disk(out, int(weights_bytes * 1.02) + (64 << 20))
        with _replacing(out) as place, atomic_folder(place) as folder:
            shards = _write(folder, job, layout, max_shard_size_bytes, progress)
            verification, skipped = _verify(folder, job, layout)
            report = ExportReport(
                out=str(out),
                source=str(found.model_dir),
                kind=found.kind,
                step=found.step,
                base=None if job.base is None else str(job.base),
                quantization=job.quantization,
                dtype=str(target).removeprefix("torch."),
                tensors=len(layout.plan),
                changed_tensors=len(layout.changed),
                untied=layout.untied,
                parameters=weights_bytes // target.itemsize,
                weights_bytes=weights_bytes,
                shards=len(shards),
                verification=verification,
                verification_skipped=skipped,
                notes=(*job.notes, *_untied_note(layout)),
                inputs=inputs,
                versions=_versions(),
                seconds=round(time.monotonic() - started, 2),
            )
            write_json(folder / REPORT, dataclasses.asdict(report))
    return report


def _open_job(source: Source, dtype: torch.dtype, base_name: str | None, stack: contextlib.ExitStack) -> _Job:
    record = source.record
    notes: list[str] = []
    adapter = read_adapter(source.model_dir) if source.kind == "adapter" else None
    name = base_name or (record.base_model if record else None)
    if adapter is not None:
        name = name or adapter.config.get("base_model_name_or_path")
        if not name:
            raise ExportError(
                f"{source.model_dir} does not say which base it was trained on; name it with --base PATH."
            )
    base = local_base(name) if name and (adapter is not None or base_name) else _base_if_there(name)
    quantization = record.quantization if record and adapter is not None else None
    if adapter is not None and record is None:
        notes.append(
            "no run.json: the base is taken as it is, not through 4 bit; for a QLoRA run export its run folder"
        )
    if base is not None and adapter is not None:
        _refuse_quantised(base)
    tensors = stack.enter_context(TensorFolder(_weights_dir(source, base, stack)))
    return _Job(
        source=source,
        base=base,
        tensors=tensors,
        adapter=adapter,
        quantization=quantization,
        base_dtype=torch_dtype(record.dtype) if record and adapter is not None else None,
        dtype=dtype,
        tokenizer=find_tokenizer(source, base),
        notes=tuple(notes),
    )


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


def _weights_dir(source: Source, base: Path | None, stack: contextlib.ExitStack) -> Path:
    if source.kind == "adapter":
        assert base is not None
        return base
    if source.kind == "full":
        return source.model_dir
    if not (source.model_dir / "config.json").is_file():
        raise ExportError(f"{source.model_dir} has no config.json beside its DeepSpeed shards; copy the base's there.")
    temporary = tempfile.TemporaryDirectory(prefix=".hf-dsvllm-zero-", dir=source.model_dir.parent)
    return _gather(source.model_dir, Path(stack.enter_context(temporary)))


def _gather(checkpoint: Path, folder: Path) -> Path:
    """Write a partitioned ZeRO checkpoint's fp32 parameters to `folder`, tied ones once; returns it.

    DeepSpeed's own writer is not used: it fails on tied weights with safetensors.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(None):
            lazy = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
    except (ValueError, OSError) as error:
        raise ExportError(f"The DeepSpeed checkpoint in {checkpoint} cannot be gathered: {error}.") from error
    once = {id(tensor): name for name, tensor in reversed(lazy.items()) if tensor.dtype.is_floating_point}
    plan = [TensorPlan(name=name, shape=tuple(lazy[name].shape), dtype=torch.float32) for name in once.values()]
    check_free_disk(folder, sum(planned.size_bytes for planned in plan))
    write_shards(folder, plan, lambda name: lazy[name].contiguous().float(), max_shard_size_bytes=5 * GIB)
    for name in ("config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    return folder


def _inputs(job: _Job, max_shard_size_bytes: int) -> dict[str, Any]:
    """Everything that decides the exported bytes."""
    hashes = {f"weights/{name}": digest for name, digest in job.tensors.sha256().items()}
    if job.adapter is not None:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            hashes[f"adapter/{name}"] = sha256_of(job.adapter.path / name)
    hashes["config.json"] = sha256_of(job.config_dir / "config.json")
    if job.tokenizer is not None:
        hashes |= {f"tokenizer/{file.name}": sha256_of(file) for file in tokenizer_files(job.tokenizer)}
    return hashes | {
        "dtype": str(job.dtype),
        "base_dtype": str(job.base_dtype),
        "max_shard_size_bytes": max_shard_size_bytes,
        "quantization": None if job.quantization is None else dict(job.quantization),
    }


def _reusable(out: Path, inputs: Mapping[str, Any], overwrite: bool) -> ExportReport | None:
    """The report of a finished export from the same inputs; None if `out` is free (or may be replaced)."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / REPORT).is_file():
        raise ExportError(f"{out} exists and is no export of hf-dsvllm; name another folder or remove it yourself.")
    values = json.loads((out / REPORT).read_text(encoding="utf-8"))
    if not overwrite and values["inputs"] == inputs:
        checked = values["verification"]
        values |= {"verification": None if checked is None else Verification(**checked), "reused": True}
        return ExportReport(**values)
    if not overwrite:
        stale = sorted(
            key for key in inputs.keys() | values["inputs"].keys() if inputs.get(key) != values["inputs"].get(key)
        )
        raise ExportError(
            f"{out} holds an export made from other inputs ({', '.join(stale[:4])} differ); "
            "use --overwrite to replace it, or name another folder."
        )
    return None


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Yield a free path; if `out` was taken, swap the finished folder in by rename and only then remove the old one."""
    if not out.exists():
        yield out
        return
    if not any(out.iterdir()):
        out.rmdir()
        yield out
        return
    fresh, old = (Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.")) for _ in range(2))
    fresh.rmdir()
    try:
        yield fresh
        os.rename(out, old)  # onto an empty folder
        os.rename(fresh, out)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _layout(job: _Job) -> Layout:
    if job.adapter is None:
        layout = cast_layout(job.source.model_dir, job.tensors, dtype=job.dtype)
        _same_as_base(job, layout)
        return layout
    assert job.base is not None
    return merged_layout(
        job.base,
        job.tensors,
        job.adapter,
        base_dtype=job.base_dtype,
        dtype=job.dtype,
        quantization=job.quantization,
    )


def _same_as_base(job: _Job, layout: Layout) -> None:
    """A full model has its base's tensors and shapes, up to tied copies and resized embeddings."""
    if job.base is None:
        return
    with TensorFolder(job.base) as tensors:
        base = {name: tensors.shape(name) for name in tensors.names}
    ours = {planned.name: planned.shape for planned in layout.plan}
    lost = [name for name in base if name not in ours and "lm_head" not in name and "embed" not in name]
    reshaped = [name for name in base if name in ours and ours[name][1:] != base[name][1:]]
    if lost or reshaped:
        raise ExportError(
            f"{job.source.model_dir} is not the recorded base {job.base}, trained: missing {lost[:3]}, other shape "
            f"{reshaped[:3]}. The snapshot is damaged, or --base is wrong."
        )


def _write(folder: Path, job: _Job, layout: Layout, max_shard_size_bytes: int, progress: bool) -> tuple[str, ...]:
    with tqdm(total=len(layout.plan), desc="export", unit="tensor", disable=not progress) as bar:

        def produce(name: str) -> torch.Tensor:
            bar.update()
            return layout.produce(name)

        shards = write_shards(folder, layout.plan, produce, max_shard_size_bytes=max_shard_size_bytes)
    _check_written(folder, layout)
    _write_config(folder, job, layout)
    for origin in (job.base, job.source.model_dir):
        if origin is not None and (origin / "generation_config.json").is_file():
            shutil.copyfile(origin / "generation_config.json", folder / "generation_config.json")
    if job.tokenizer is not None:
        for file in tokenizer_files(job.tokenizer):
            shutil.copyfile(file, folder / file.name)
        if has_chat_template(job.tokenizer) and not has_chat_template(folder):
            raise ExportError(f"The chat template of {job.tokenizer} did not reach the export.")
    return shards


def _check_written(folder: Path, layout: Layout) -> None:
    """Read the headers back: exactly the planned tensors, with their shapes and dtypes."""
    with TensorFolder(folder) as written:
        planned = {item.name: (item.shape, item.dtype) for item in layout.plan}
        found = {name: (written.shape(name), written.dtype(name)) for name in written.names}
    if planned != found:
        wrong = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))
        raise ExportError(f"{len(wrong)} tensors are not on disk as planned, such as {wrong[0]}: is the disk failing?")


def _write_config(folder: Path, job: _Job, layout: Layout) -> None:
    config = json.loads((job.config_dir / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(key, None)
    write_json(
        folder / "config.json", config | {"dtype": str(job.dtype).removeprefix("torch.")} | layout.config_changes
    )


def _verify(folder: Path, job: _Job, layout: Layout) -> tuple[Verification | None, str | None]:
    """The comparison of logits, or the reason why it could not be made here."""
    parameters = sum(planned.size_bytes for planned in layout.plan) // job.dtype.itemsize
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    skipped = memory_shortfall(parameters, config.get("vocab_size", 0))
    if skipped is not None:
        return None, skipped

    def reference() -> Any:
        if job.adapter is None:
            return full_reference(job.tensors.path)
        assert job.base is not None
        return adapter_reference(
            job.base,
            job.adapter.path,
            dtype=job.base_dtype or job.tensors.dtype(job.tensors.names[0]),
            quantization=job.quantization,
            vocab_size=layout.vocab_size,
        )

    return compare_logits(reference, folder, job.dtype), None


def _untied_note(layout: Layout) -> tuple[str, ...]:
    if not layout.untied:
        return ()
    return (
        f"{' and '.join(layout.untied)} were one tensor in the base and were trained apart: both are written, untied",
    )


def _versions() -> dict[str, str]:
    names = ("hf-dsvllm", "torch", "transformers", "peft", "bitsandbytes", "safetensors")
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
