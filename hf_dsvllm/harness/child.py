"""Runs inside the process that imports lm_eval: jobs as lines of JSON on stdin, each one's result in a file.

It stays for the next evaluation, since importing lm_eval takes longer than many a task.  At the end of stdin, which the
trainer holds, it ends, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENDED_WITH_PARENT = 3
BOOTSTRAPS = 1000  # of lm-eval's standard errors for metrics that are no means


def main() -> None:
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=read_jobs, args=(jobs,), daemon=True).start()
    with contextlib.suppress(Exception):  # while the engine loads; if it cannot be imported the first job says so
        importlib.import_module("lm_eval")
    while True:
        job = jobs.get()
        os.environ["OPENAI_API_KEY"] = job.get("key", "")
        try:
            result = check(job) if job["kind"] == "check" else run(job)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.flush()
        write(Path(job["out"]), result)


def read_jobs(jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Every line of stdin, and the end of this process at its end."""
    with contextlib.suppress(OSError), open(0, encoding="utf-8", closefd=False) as lines:
        for line in lines:
            jobs.put(json.loads(line))
    os._exit(ENDED_WITH_PARENT)


def write(out: Path, result: Mapping[str, Any]) -> None:
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, ensure_ascii=False, default=str), encoding="utf-8")
    os.replace(temporary, out)


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks behind each name with their number of prompts; loads their data sets, which is what can fail.

    `shown`: those that have scores of their own in `run`, groups as one.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown: dict[str, list[str]] = {}
    found: dict[str, int] = {}
    shown: list[str] = []
    failed: dict[str, str] = {}
    for name in job["tasks"]:
        if not name.endswith(".yaml") and name not in manager.all_tasks:
            unknown[name] = difflib.get_close_matches(name, manager.all_tasks, n=3)
            continue
        try:
            loaded = manager.load([name])
            found |= {task: len(list(one.eval_docs)) for task, one in loaded["tasks"].items()}
            inside = {child for children in loaded["group_map"].values() for child in children}
            shown += [task for task in (*loaded["groups"], *loaded["tasks"]) if task not in inside]
        except Exception as error:  # a data set that cannot be had, a broken file: whatever a task's code raises
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"unknown": unknown, "failed": failed, "found": found, "shown": shown}


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Scores, standard errors and prompts of every task that was asked for, groups as one."""
    import lm_eval

    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": job["model"],
            "base_url": f"{job['url']}/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": job["tokenizer"],
            "trust_remote_code": job["trust_remote_code"],
            "max_length": job["max_length"],
            "num_concurrent": job["concurrent"],
            "seed": job["seed"],
            "timeout": job["timeout_s"],
        },
        tasks=list(job["tasks"]),
        limit=job["limit"],
        bootstrap_iters=BOOTSTRAPS,
        log_samples=True,
    )
    assert results is not None  # None only on ranks other than 0
    inside = {child for children in results.get("group_subtasks", {}).values() for child in children}
    shown = [name for name in results["results"] if name not in inside]
    return {
        "tasks": {name: task_result(name, results) for name in shown},
        "rows": {name: rows(samples) for name, samples in results.get("samples", {}).items()},
    }


def task_result(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """{"scores": {"acc": 0.5}, "errors": {"acc": 0.1}, "higher_is_better": {"acc": True}}, the last where it is known.

    A filter other than "none" is part of a metric's name.
    """
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    higher: dict[str, bool] = {}
    told = results.get("higher_is_better", {}).get(name) or {}
    for key, value in results["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        into, metric = (errors, metric.removesuffix("_stderr")) if metric.endswith("_stderr") else (scores, metric)
        into[called(metric, chosen)] = float(value)
        if isinstance(told.get(metric), bool):
            higher[called(metric, chosen)] = told[metric]
    return {"scores": scores, "errors": errors, "higher_is_better": higher}


def called(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric}_{chosen}"


def rows(samples: Any) -> list[dict[str, Any]]:
    """One row a prompt, in the form of evals/*.jsonl but for step and model; its filters side by side in `scores`."""
    found: dict[Any, dict[str, Any]] = {}
    for sample in samples:
        chosen = sample.get("filter", "none")
        row = found.setdefault(
            sample["doc_id"],
            {
                "id": str(sample["doc_id"]),
                "prompt": str(sample["arguments"][0][0]) if sample["arguments"] else "",
                "reference": str(sample.get("target", "")),
                "answer": shown(sample.get("filtered_resps", "")),
                "finish_reason": "",
                "scores": {},
            },
        )
        for metric in sample.get("metrics", ()):
            value = sample.get(metric)
            if isinstance(value, int | float):
                row["scores"][called(metric, chosen)] = float(value)
    return list(found.values())


def shown(responses: Any) -> str:
    """The answer of a task that generates; the log-likelihoods of one that chooses."""
    if isinstance(responses, list) and len(responses) == 1 and isinstance(responses[0], str):
        return responses[0]
    return responses if isinstance(responses, str) else json.dumps(responses, ensure_ascii=False, default=str)


if __name__ == "__main__":
    main()
