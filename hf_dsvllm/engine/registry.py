"""Which engines run on this machine: one small file each, so that `hf-dsvllm doctor` finds what a crash left behind.

The supervisor writes a file when it starts an engine and removes it when every process of that engine is gone.  So a
file that outlives its processes, or processes that outlive their owner, are exceptional: the machine lost power, or
someone killed all the watchers.  A process is taken for ours only when pid *and* birth agree, or by the engine's mark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

from hf_dsvllm.engine.supervisor import GRACE_S, birth, end_engine, engine_processes
from hf_dsvllm.errors import EngineError

__all__ = ["EngineRecord", "EngineState", "ProcessRef", "list_engines", "reap", "record_path", "state_folder"]

EngineState = Literal["running", "orphaned", "gone", "elsewhere"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRef:
    """A process by number and birth, so that a later process with the same number is not taken for it."""

    pid: int
    birth: str | None

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        return self.birth is not None and birth(self.pid) == self.birth


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """One registry file: who started which engine, and where its run folder is."""

    file: Path
    engine_id: str
    host: str
    owner: ProcessRef
    supervisor: ProcessRef
    engine: ProcessRef
    run_dir: Path | None
    command: tuple[str, ...]

    @property
    def pids(self) -> tuple[int, ...]:
        """Live processes of this engine on this machine."""
        return tuple(engine_processes(self.engine_id, self.engine.pid if self.engine.alive else None))

    @property
    def state(self) -> EngineState:
        """`running` with its owner, `orphaned` (processes without owner or supervisor), `gone`, or on another host."""
        if self.host != os.uname().nodename:
            return "elsewhere"
        if not self.pids and not self.supervisor.alive:
            return "gone"
        return "running" if self.owner.alive and self.supervisor.alive else "orphaned"


def state_folder() -> Path:
    """The registry's folder: $XDG_STATE_HOME/hf-dsvllm/engines, by default under ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME")
    return Path(base if base else Path.home() / ".local" / "state") / "hf-dsvllm" / "engines"


def record_path(engine_id: str) -> Path:
    """The registry file of one engine."""
    return state_folder() / f"{engine_id}.json"


def list_engines() -> tuple[EngineRecord, ...]:
    """Every engine on record, oldest file first; unreadable files are skipped (they may be vanishing just now)."""
    records = []
    for file in state_folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            records.append((file.stat().st_mtime, read_record(file)))
    return tuple(record for _, record in sorted(records, key=lambda pair: (pair[0], pair[1].engine_id)))


def read_record(file: Path) -> EngineRecord:
    """Read one registry file; OSError, ValueError, KeyError or TypeError if it is not one."""
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return EngineRecord(
        file=file,
        engine_id=str(fields["engine_id"]),
        host=str(fields["host"]),
        owner=ProcessRef(**fields["owner"]),
        supervisor=ProcessRef(**fields["supervisor"]),
        engine=ProcessRef(**fields["engine"]),
        run_dir=Path(fields["run_dir"]) if fields["run_dir"] else None,
        command=tuple(fields["command"]),
    )


def reap(record: EngineRecord, *, grace_s: float = GRACE_S) -> tuple[int, ...]:
    """End what is left of an engine whose owner is gone and remove its file; returns the processes that were ended.

    Raises EngineError for an engine that still has its owner, that runs on another host, or that does not end.
    """
    if record.state in ("running", "elsewhere"):
        where = f"belongs to process {record.owner.pid}, which still runs" if record.state == "running" else "runs"
        raise EngineError(f"Engine {record.engine_id} {where} on {record.host}. Stop that run instead of its engine.")
    pids = record.pids
    left = end_engine(record.engine_id, record.engine.pid if record.engine.alive else None, grace_s)
    if left:
        raise EngineError(
            f"Engine {record.engine_id}: processes {left} do not end on SIGKILL, so they wait inside the kernel "
            "(a hung disk or GPU driver). Their memory comes back with a restart of the machine."
        )
    record.file.unlink(missing_ok=True)
    return pids
