"""lm-evaluation-harness against the engine, in a process of its own: its imports and threads stay out of ours."""

from hf_dsvllm.harness.job import (
    HarnessScores,
    TaskResult,
    Worker,
    check_tasks,
    installed,
    logged_tasks,
    names_of,
    run_tasks,
)

__all__ = [
    "HarnessScores",
    "TaskResult",
    "Worker",
    "check_tasks",
    "installed",
    "logged_tasks",
    "names_of",
    "run_tasks",
]
