"""A run, checkpoint or adapter -> one folder that transformers and vLLM load, proven equal to what was trained."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from hf_dsvllm._compat import outside_zero3
from hf_dsvllm.engine import find_vllm
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.adapter_format import adapter_layout, write_adapter_config
from hf_dsvllm.export.card import write_card
from hf_dsvllm.export.claim import claimed, replacing
from hf_dsvllm.export.job import Job, inputs_of, layout_of, open_job
from hf_dsvllm.export.layout import Layout
from hf_dsvllm.export.manifest import REPORT, ExportReport, occupied, reusable, versions, write_manifest
from hf_dsvllm.export.merge import Adapter, exact_products
from hf_dsvllm.export.source import Format, Which, find_source, has_chat_template, tokenizer_files
from hf_dsvllm.export.trained import check_trained, with_special_tokens, write_generation_config
from hf_dsvllm.export.verify import (
    Comparison,
    Verification,
    adapter_reference,
    compare_logits,
    full_reference,
    partitioned_reference,
    verification_device,
)
from hf_dsvllm.export.verify_engine import EngineVerification
from hf_dsvllm.export.verify_engine import prove_in_vllm as in_vllm
from hf_dsvllm.files import write_json
from hf_dsvllm.tensors.shard_file import DEFAULT_SHARD_BYTES
from hf_dsvllm.tensors.shards import write_shards
from hf_dsvllm.tensors.weights import SINGLE, TensorFolder, check_free_disk, torch_dtype
from hf_dsvllm.tensors.zero_checkpoint import ZeroCheckpoint

__all__ = ["REPORT", "ExportReport", "export_model"]


ADAPTER_FILE = "adapter_model.safetensors"


@outside_zero3()
@exact_products()
def export_model(
    source: Path | str,
    out: Path,
    *,
    which: Which = "latest",
    dtype: str = "bfloat16",
    max_shard_size_bytes: int = DEFAULT_SHARD_BYTES,
    base: str | None = None,
    format: Format = "merged",  # noqa: A002  the flag's own name
    overwrite: bool = False,
    progress: bool = True,
    vllm_python: Path | None = None,
    prove_in_vllm: bool = False,
) -> ExportReport:
    """Merge, check and write the model of `source` to the folder `out`; return the report that lies in it.

    `source` is a run folder, a Trainer checkpoint (adapter, full, or ZeRO without gathered weights), a snapshot or a
    bare adapter, also one on the hub (OWNER/NAME).  `base` overrides the recorded base model; "original" puts a QLoRA
    adapter onto the unquantised weights.  `format="adapter"` writes the adapter alone, as vLLM applies it.
    `prove_in_vllm` starts vLLM (of `vllm_python`, or this environment) on the result.  An existing `out` made from the
    same inputs, and unchanged since, is returned as it is, unless it lacks a proof that can be given now; another one
    needs `overwrite`.  Raises ExportError; then nothing at `out` looks finished.
    """
    started = time.monotonic()
    found = find_source(Path(source), which)
    target = torch_dtype(dtype)
    out = out.absolute()
    engine = find_vllm(vllm_python, device=_engine_device()) if prove_in_vllm else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(out))
        job = open_job(found, target, base, stack)
        _check_format(job, format)
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        inputs: Future[dict[str, Any]] | None = None
        if occupied(out) or not isinstance(job.tensors, ZeroCheckpoint):  # whose tensors are hashed as they are read
            inputs = hashing.submit(inputs_of, job, max_shard_size_bytes, format)
        existing: ExportReport | None = None
        if inputs is not None and occupied(out):
            existing = reusable(out, inputs.result(), overwrite)
        layout = layout_of(job) if format == "merged" else adapter_layout(_adapter(job))
        device, skipped = _where_to_compare(job, layout)
        if engine is not None and skipped is not None:
            raise ExportError(
                f"--prove_in_vllm compares vLLM with the trained model, which cannot run here: {skipped}."
            )
        if existing is not None and _as_proven(existing, compared=skipped is None, in_vllm=engine is not None):
            return existing
        check_free_disk(out.resolve(), int(layout.weights_bytes * 1.02) + (64 << 20))
        with replacing(out) as folder:
            before_writing = time.monotonic()
            hashes = _write(folder, job, layout, max_shard_size_bytes, progress, format)
            inputs = inputs or hashing.submit(inputs_of, job, max_shard_size_bytes, format)
            write_seconds = time.monotonic() - before_writing
            comparison = _verify(folder, job, layout, format, device) if skipped is None else None
            verification = None if comparison is None else comparison.verification
            proof = None
            if engine is not None and comparison is not None:
                proof = _prove(folder, job, comparison, engine, format)
            report = ExportReport(
                out=str(out),
                source=str(found.model_dir),
                kind=found.kind,
                format=format,
                step=found.step,
                base=None if job.base is None else str(job.base),
                quantization=job.quantization,
                dtype=str(layout.dtype).removeprefix("torch."),
                tensors=len(layout.plan),
                changed_tensors=len(layout.changed),
                untied=layout.untied,
                parameters=sum(planned.elements for planned in layout.plan),
                weights_bytes=layout.weights_bytes,
                shards=len(hashes),
                verification=verification,
                verification_skipped=skipped,
                verification_in_vllm=proof,
                notes=(*job.notes, *_untied_note(layout), *_original_note(job, verification)),
                inputs=inputs.result(),
                versions=versions(),
                merged_on="gpu" if layout.device.type == "cuda" else "cpu",
                write_seconds=round(write_seconds, 2),
                seconds=round(time.monotonic() - started, 2),
            )
            remarks = write_card(folder, report, job.source.record)
            report = dataclasses.replace(report, notes=(*report.notes, *remarks))
            write_json(folder / REPORT, dataclasses.asdict(report))
            write_manifest(folder, report.inputs, hashes)
    return report


def _adapter(job: Job) -> Adapter:
    assert job.adapter is not None
    return job.adapter


def _check_format(job: Job, format: Format) -> None:  # noqa: A002
    if format == "merged":
        return
    if job.adapter is None:
        raise ExportError(f"--format adapter needs an adapter; {job.source.model_dir} holds a whole model.")
    if job.quantization is not None and not job.onto_original:
        raise ExportError(
            "The adapter of a QLoRA run belongs on the base as it was quantised, which vLLM does not make alike: leave "
            "--format out, or add --base original to accept another model than the trained one."
        )


def _engine_device() -> Literal["cuda", "cpu"]:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _prove(folder: Path, job: Job, comparison: Comparison, python: Path, format: Format) -> EngineVerification:  # noqa: A002
    """The comparison in vLLM, which finds free what the models compared in this process have taken."""
    gc.collect()
    torch.cuda.empty_cache()
    if format == "merged":
        return in_vllm(folder, comparison, python=python, device=_engine_device())
    rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return in_vllm(folder, comparison, python=python, device=_engine_device(), base=job.base, rank=rank)


def _write(
    folder: Path,
    job: Job,
    layout: Layout,
    max_shard_size_bytes: int,
    progress: bool,
    format: Format,  # noqa: A002
) -> dict[str, str]:
    """The weights and what belongs to them; BLAKE3 of the files of weights."""
    merged = format == "merged"
    with tqdm(total=len(layout.plan), desc="export", unit="tensor", disable=not progress) as bar:

        def produce(name: str) -> torch.Tensor:
            tensor = layout.produce(name)
            bar.update()
            return tensor

        hashes = write_shards(
            folder,
            layout.plan,
            produce,
            # vLLM and PEFT read an adapter from one file
            max_shard_size_bytes=max_shard_size_bytes if merged else layout.weights_bytes,
            working_bytes=layout.working_bytes,
            memory_bytes=layout.memory_bytes,
            single=SINGLE if merged else ADAPTER_FILE,
            hashed=True,
        )
    layout.check_applied()
    _check_written(folder if merged else folder / ADAPTER_FILE, layout)
    if merged:
        _write_config(folder, job, layout)
        write_generation_config(folder, job.generation, job.generation_file)
        check_trained(folder, job.generation)
    else:
        write_adapter_config(folder, _adapter(job), str(job.base))
    if job.tokenizer is not None:
        for name in tokenizer_files(job.tokenizer):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(job.tokenizer / name, folder / name)
        if has_chat_template(job.tokenizer) and not has_chat_template(folder):
            raise ExportError(f"The chat template of {job.tokenizer} did not reach the export.")
    return hashes


def _check_written(folder: Path, layout: Layout) -> None:
    """Read the headers back: exactly the planned tensors, with their shapes and dtypes."""
    with TensorFolder(folder) as written:
        planned = {item.name: (item.shape, item.dtype) for item in layout.plan}
        found = {name: (written.shape(name), written.dtype(name)) for name in written.names}
    if planned != found:
        wrong = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))
        raise ExportError(f"{len(wrong)} tensors are not on disk as planned, such as {wrong[0]}: is the disk failing?")


def _write_config(folder: Path, job: Job, layout: Layout) -> None:
    config = json.loads((job.config_dir / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(key, None)
    config |= {"dtype": str(job.dtype).removeprefix("torch.")} | layout.config_changes
    write_json(folder / "config.json", with_special_tokens(config, job.generation))


def _where_to_compare(job: Job, layout: Layout) -> tuple[Literal["cuda", "cpu"], str | None]:
    """The device of the comparison, and the reason why it cannot be made here, if so."""
    config = json.loads((job.config_dir / "config.json").read_text(encoding="utf-8"))
    through_host = job.adapter is None and not isinstance(job.tensors, TensorFolder)
    return verification_device(_parameters(job, layout), config.get("vocab_size", 0), through_host=through_host)


def _as_proven(existing: ExportReport, *, compared: bool, in_vllm: bool) -> bool:
    """Whether an export that is there has the proofs a new one would have."""
    lacks_comparison = compared and existing.verification is None
    return not lacks_comparison and not (in_vllm and existing.verification_in_vllm is None)


def _verify(
    folder: Path,
    job: Job,
    layout: Layout,
    format: Format,  # noqa: A002
    device: Literal["cuda", "cpu"],
) -> Comparison:
    """The comparison of logits."""

    def with_adapter(adapter: Path) -> Any:
        assert job.base is not None
        dtypes = map(job.tensors.dtype, job.tensors.names)
        return adapter_reference(
            job.base,
            adapter,
            dtype=job.base_dtype or next(dtype for dtype in dtypes if dtype.is_floating_point),
            quantization=job.quantization,
            vocab_size=layout.vocab_size,
            device=device,
        )

    def reference() -> Any:
        if job.adapter is None:
            if isinstance(job.tensors, TensorFolder):
                return full_reference(job.tensors.path, device)
            return partitioned_reference(job.config_dir, job.tensors, device)
        return with_adapter(job.adapter.path)

    return compare_logits(
        reference,
        folder,
        layout.dtype,
        device=device,
        enforce=not job.onto_original,
        build_export=None if format == "merged" else lambda: with_adapter(folder),
    )


def _parameters(job: Job, layout: Layout) -> int:
    """Of the whole model, also where only an adapter is written."""
    whole = sum(planned.elements for planned in layout.plan)
    if job.adapter is None:
        return whole
    written = {planned.name for planned in layout.plan}
    rest = [name for name in job.tensors.names if name not in written]
    return whole + sum(math.prod(job.tensors.shape(name)) for name in rest)


def _untied_note(layout: Layout) -> tuple[str, ...]:
    if not layout.untied:
        return ()
    return (
        f"{' and '.join(layout.untied)} were one tensor in the base and were trained apart: both are written, untied",
    )


def _original_note(job: Job, found: Verification | None) -> tuple[str, ...]:
    """How far a merge onto the unquantised base is from what was trained."""
    if not job.onto_original:
        return ()
    if found is None:
        return ("merged onto the original weights, not those that were trained; how far from it was not measured",)
    note = (
        "merged onto the original weights, not those that were trained: the mean difference of the logits is "
        f"{found.mean_abs_difference / found.reference_std:.1%} of their spread (an export of what was trained keeps "
        f"{found.mean_limit / found.reference_std:.1%}), greedy tokens agree on {found.greedy_agreement:.1%}"
    )
    return (note,)
