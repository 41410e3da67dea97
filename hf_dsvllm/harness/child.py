"""Runs inside the process that imports lm_eval: one job as a line of JSON on stdin, its result in a file.

stdin stays open for as long as the parent wants us to live: at its end this process ends, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENDED_WITH_PARENT = 3
BOOTSTRAPS = 1000  # of lm-eval's standard errors for metrics that are no means


def main() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    out = Path(job["out"])
    try:
        write(out, check(job) if job["kind"] == "check" else run(job))
    except Exception as error:
        traceback.print_exc()
        write(out, {"error": f"{type(error).__name__}: {error}"})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the result is written; an orderly end would wait for threads of libraries, and for ours


def end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(ENDED_WITH_PARENT)


def write(out: Path, result: Mapping[str, Any]) -> None:
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, ensure_ascii=False, default=str), encoding="utf-8")
    os.replace(temporary, out)


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks behind each name with their number of prompts; loads their data sets, which is what can fail."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown: dict[str, list[str]] = {}
    found: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name in job["tasks"]:
        if not name.endswith(".yaml") and name not in manager.all_tasks:
            unknown[name] = difflib.get_close_matches(name, manager.all_tasks, n=3)
            continue
        try:
            tasks = manager.load([name])["tasks"]
            found |= {task: len(list(loaded.eval_docs)) for task, loaded in tasks.items()}
        except Exception as error:  # a data set that cannot be had, a broken file: whatever a task's code raises
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"unknown": unknown, "failed": failed, "found": found}


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
    """{"scores": {"acc": 0.5}, "errors": {"acc": 0.1}}; a filter other than "none" is part of the name."""
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in results["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        into, metric = (errors, metric.removesuffix("_stderr")) if metric.endswith("_stderr") else (scores, metric)
        into[called(metric, chosen)] = float(value)
    return {"scores": scores, "errors": errors}


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
