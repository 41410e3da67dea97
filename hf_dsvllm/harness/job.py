"""That process from outside: its jobs, each within a deadline, and what comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.engine.spec import SCRUBBED, SCRUBBED_PREFIXES
from hf_dsvllm.errors import EngineError, Problem

__all__ = ["HarnessScores", "TaskResult", "Worker", "check_tasks", "installed", "logged_tasks", "names_of", "run_tasks"]

CHILD = Path(__file__).with_name("child.py")
CHECK_S = 600.0  # data sets may have to be downloaded
CONCURRENT = 16
POLL_S = 0.05
LOG_LINES = 6
_loaded: dict[tuple[str, ...], tuple[str, ...]] = {}  # names that this process has seen load → what is logged of them
INSTALL = "pip install 'hf-dsvllm[lm-eval]'"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Scores and standard errors by metric, as lm-eval calls it, and the prompts (none for a group of tasks).

    `higher_is_better`: as lm-eval says, of the metrics of which it does.
    """

    name: str
    scores: Mapping[str, float]
    errors: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    higher_is_better: Mapping[str, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HarnessScores:
    """`tasks`: those asked for, groups as one; `parts`: the members of groups, whose prompts are kept too."""

    tasks: Sequence[TaskResult]
    parts: Sequence[TaskResult] = ()


def installed() -> bool:
    """Whether lm-eval and what its API models need are there; imports nothing."""
    return all(importlib.util.find_spec(name) for name in ("lm_eval", "aiohttp", "tenacity"))


def names_of(given: Sequence[str] | None) -> tuple[str, ...]:
    """gsm8k,arc_easy → both, in order and once; files by their whole path."""
    words = (word.strip() for item in given or () for word in item.split(","))
    return tuple(dict.fromkeys(str(Path(w).expanduser().absolute()) if w.endswith(".yaml") else w for w in words if w))


def check_tasks(names: Sequence[str]) -> list[Problem]:
    """What would go wrong with these tasks, found by loading them and their data: minutes where it is downloaded."""
    if tuple(names) in _loaded:  # arguments are often made more than once
        return []
    if not installed():
        return [Problem("gen_eval_lm_eval needs lm-evaluation-harness, which is not installed", INSTALL)]
    absent = [name for name in names if name.endswith(".yaml") and not Path(name).is_file()]
    if absent:
        return [Problem(f"gen_eval_lm_eval: there is no file {', '.join(absent)}", "check the path")]
    with tempfile.TemporaryDirectory(prefix="dsvllm-lm-eval-") as folder, Worker(Path(folder) / "log") as worker:
        try:
            result = worker.do({"kind": "check", "tasks": list(names)}, CHECK_S)
        except EngineError as error:
            return [Problem(f"gen_eval_lm_eval: {error}", "see whether lm-eval itself runs these tasks")]
    problems = [
        Problem(
            f"gen_eval_lm_eval: there is no task {name!r}",
            f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them",
        )
        for name, near in result["unknown"].items()
    ]
    problems += [
        Problem(
            f"gen_eval_lm_eval: task {name} cannot be loaded: {why}",
            "its data set comes from the hub: load it once where the hub is reached (HF_HUB_OFFLINE unset), or name "
            "a .yaml task with files of your own",
        )
        for name, why in result["failed"].items()
    ]
    if not problems:
        _loaded[tuple(names)] = tuple(map(safe, result["shown"]))
    return problems


def logged_tasks(names: Sequence[str]) -> tuple[str, ...] | None:
    """The tasks behind `names` as metric keys have them; None where `check_tasks` has not found them all."""
    return _loaded.get(tuple(names))


def run_tasks(
    worker: Worker,
    names: Sequence[str],
    *,
    url: str,
    key: str,
    model: str,
    tokenizer: str,
    max_length: int,
    limit: int | None,
    seed: int,
    timeout_s: float,
    trust_remote_code: bool = False,
) -> HarnessScores:
    """Ask the model at `url` every task (the first `limit` prompts of each); at most `timeout_s` seconds.

    Raises EngineError if lm-eval fails or takes longer.
    """
    job = {
        "kind": "run", "tasks": list(names), "url": url, "key": key, "model": model, "tokenizer": tokenizer,
        "limit": limit, "max_length": max_length, "seed": seed, "concurrent": CONCURRENT,
        "timeout_s": max(1, int(timeout_s)), "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    result = worker.do(job, timeout_s)
    rows = result["rows"]
    tasks = [task_of(name, told, rows.get(name, ())) for name, told in result["tasks"].items()]
    empty: dict[str, Any] = {"scores": {}, "errors": {}, "higher_is_better": {}}
    parts = [task_of(name, empty, rows[name]) for name in rows if name not in result["tasks"]]
    return HarnessScores(tasks=tasks, parts=parts)


def task_of(name: str, told: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> TaskResult:
    return TaskResult(
        name=safe(name),
        scores={safe(metric): value for metric, value in told["scores"].items()},
        errors={safe(metric): value for metric, value in told["errors"].items()},
        higher_is_better={safe(metric): higher for metric, higher in told["higher_is_better"].items()},
        rows=[dict(row) | {"scores": {safe(m): v for m, v in row["scores"].items()}} for row in rows],
    )


def safe(name: str) -> str:
    """As in a metric key: exact_match_strict-match → exact_match_strict_match."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


class Worker:
    """The process that runs lm-eval: started with the first job, kept for the next, ended by `close` or with ours."""

    def __init__(self, log: Path) -> None:
        """What it prints goes to `log`."""
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it without a job yet, so that its imports are done when one comes; a failure shows at that job."""
        with contextlib.suppress(OSError):
            self._alive()

    def do(self, job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The result of one job; EngineError if it fails, or the process does, or `timeout_s` pass."""
        deadline = time.monotonic() + timeout_s
        with tempfile.TemporaryDirectory(prefix="dsvllm-lm-eval-") as folder:
            out = Path(folder) / "result.json"
            try:
                process = self._alive()
                assert process.stdin is not None
                process.stdin.write(json.dumps({**job, "out": str(out)}).encode() + b"\n")
                process.stdin.flush()
                while not out.exists() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                result, code = read(out), process.poll()
            except OSError as error:
                self.close()
                raise EngineError(f"lm-eval ended before it began ({error}): {tail(self.log)}") from None
            except BaseException:
                self.close()
                raise
        if result is None:
            self.close()
        if result is None and code is None:
            raise EngineError(
                f"lm-eval was not done after {timeout_s:.0f} s. Raise --gen_eval_timeout or lower --gen_eval_limit."
            )
        if result is None or "error" in result:
            why = tail(self.log) if result is None else result["error"]
            raise EngineError(
                f"lm-eval failed{'' if code is None else f' (exit code {code})'}: {why}. Its log is {self.log}."
            )
        return result

    def close(self) -> None:
        """End it at once; safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()

    def _alive(self) -> subprocess.Popen[bytes]:
        """The process, a new one if the last has ended."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, str(CHILD)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
        return self._process


def read(out: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def environment() -> dict[str, str]:
    """Ours without the launcher's variables and without GPUs: it asks, it does not compute."""
    kept = {k: v for k, v in os.environ.items() if k not in SCRUBBED and not k.startswith(SCRUBBED_PREFIXES)}
    direct = ",".join(filter(None, (kept.get("no_proxy") or kept.get("NO_PROXY"), "127.0.0.1")))
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "NO_PROXY": direct,  # a site's proxy must not stand between it and loopback
        "no_proxy": direct,
    }


def tail(log: Path) -> str:
    """The last lines of a log, as one."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it wrote no log"
    return " / ".join(line.strip() for line in lines[-LOG_LINES:] if line.strip()) or "it wrote nothing"
