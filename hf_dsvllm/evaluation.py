"""Generation evaluation: weights into the engine, prompts out, answers scored, every sample kept in the run folder.

`Evaluator` lives on rank 0 only; `hf_dsvllm.callback` makes the collective steps around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm import metrics
from hf_dsvllm.adapter_format import servable_adapter
from hf_dsvllm.engine.client import Completion, EngineClient
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.engine.sync import SyncResult, WeightSync
from hf_dsvllm.errors import EngineError
from hf_dsvllm.files import write_text
from hf_dsvllm.merged_copy import merged_copy, same_shape
from hf_dsvllm.snapshot import Snapshot
from hf_dsvllm.source import local_base
from hf_dsvllm.tasks import EvalTask, render_prompt

__all__ = ["EvalResult", "Evaluator", "Sampling", "metric_key"]

EVALS = "evals"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy.  `timeout_s` bounds one evaluation, server start included."""

    max_new_tokens: int
    temperature: float
    seed: int
    timeout_s: float
    stop_token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One evaluation: `scores` by metric key, and where the seconds went (`publish`: live weights to disk)."""

    step: int
    scores: Mapping[str, float]
    standard_errors: Mapping[str, float | None]
    samples: int
    generated_tokens: int
    weights_path: str
    weights_why: str
    publish_seconds: float
    wait_seconds: float
    sync_seconds: float
    generate_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.generate_seconds if self.generate_seconds else 0.0

    def _error(self, name: str) -> str:
        """The standard error, which one answer alone has not."""
        error = self.standard_errors[name]
        return "" if error is None else f" ± {error:.1%}"

    def line(self) -> str:
        """One line for the console."""
        scores = ", ".join(f"{name} {value:.1%}{self._error(name)}" for name, value in self.scores.items())
        return (
            f"step {self.step}: {scores} ({self.samples} prompts, {self.generated_tokens} tokens, "
            f"{self.tokens_per_second:.0f} tok/s, weights by {self.weights_path} in {self.sync_seconds:.2f} s, "
            f"{self.total_seconds:.1f} s in all)"
        )


class Evaluator:
    """One engine and the tasks it is asked; used on rank 0 only."""

    def __init__(
        self,
        *,
        server: EngineServer,
        tasks: Sequence[EvalTask],
        tokenizer: Any,
        sampling: Sampling,
        run_dir: Path,
        merge_base: Path | None = None,
    ) -> None:
        """`merge_base`: adapters are merged into this folder's weights first and served as a full model."""
        self.server = server
        self._first_model = server.spec.model
        self.client = EngineClient(server.uds, default_timeout_s=sampling.timeout_s)
        self.sync = WeightSync(server, self.client, restart_timeout_s=sampling.timeout_s)
        self.tasks = tuple(tasks)
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.run_dir = run_dir
        self.merge_base = merge_base
        self.prompts = {task.name: [render_prompt(sample, tokenizer) for sample in task.samples] for task in tasks}

    def evaluate(self, step: int, snapshot: Snapshot | None, publish_seconds: float = 0.0) -> EvalResult:
        """Answer every task with the weights of `snapshot`, or with the base model the engine started from if None.

        Raises EngineError when the engine cannot be brought to answer within the deadline.
        """
        started = time.monotonic()
        try:
            result = self._evaluate(step, snapshot, publish_seconds, started)
        except EngineError:
            self._revive()
            raise
        self._append(result)
        return result

    def _evaluate(self, step: int, snapshot: Snapshot | None, publish_seconds: float, started: float) -> EvalResult:
        deadline = started + self.sampling.timeout_s
        self._wait_ready()
        waited = time.monotonic() - started
        sync = self._push(snapshot)
        asked = time.monotonic()
        answers = {task.name: self._ask(task, sync.model_name, deadline) for task in self.tasks}
        generated = time.monotonic() - asked
        scores, errors = self._score_and_write(step, answers, sync)
        return EvalResult(
            step=step,
            scores=scores,
            standard_errors=errors,
            samples=sum(len(task.samples) for task in self.tasks),
            generated_tokens=sum(len(c.token_ids) for completions in answers.values() for c in completions),
            weights_path=sync.path_used,
            weights_why=sync.why,
            publish_seconds=publish_seconds,
            wait_seconds=waited,
            sync_seconds=sync.seconds,
            generate_seconds=generated,
            total_seconds=publish_seconds + time.monotonic() - started,
        )

    def close(self) -> None:
        """Stop the engine."""
        self.client.close()
        self.server.stop()

    def _wait_ready(self) -> None:
        """Wait for the engine; one that died is started once more (beside a loading trainer a start can fail)."""
        try:
            self.server.wait_ready(self.sampling.timeout_s)
        except EngineError:
            if self.server.alive:
                raise
            self._restart()
            self.server.wait_ready(self.sampling.timeout_s)

    def _revive(self) -> None:
        """After a failure, start an engine that died or hangs again at once: it loads while training goes on."""
        if not (self.server.alive and self.client.health()):
            with contextlib.suppress(EngineError):  # the next evaluation tries once more, and says why it cannot
                self._restart()

    def _restart(self, model: Path | str | None = None) -> None:
        """By default from the first model: a snapshot that it was restarted from may be gone or broken by now."""
        self.server.restart(model=self._first_model if model is None else model)
        self.client.connect(self.server.uds)

    def _push(self, snapshot: Snapshot | None) -> SyncResult:
        if snapshot is not None and snapshot.kind == "adapter" and self.merge_base is not None:
            return self._push_merged(snapshot, self.merge_base)
        if snapshot is not None and snapshot.kind == "adapter":
            folder = servable_adapter(snapshot.path, self.run_dir / "engine" / "adapter")
            return self.sync.push(folder, "adapter", snapshot.step)
        if snapshot is not None:
            return self.sync.push(snapshot.path, snapshot.kind, snapshot.step)
        name = self.server.spec.served_name
        return SyncResult(
            model_name=name, path_used="start", why="the untrained model the engine started from", seconds=0
        )

    def _push_merged(self, snapshot: Snapshot, base: Path) -> SyncResult:
        started = time.monotonic()
        dtype = torch.float32 if self.server.spec.dtype == "float32" else torch.bfloat16
        folder = merged_copy(base, snapshot.path, self.run_dir / "engine" / "merged", dtype=dtype)
        if not same_shape(folder, local_base(str(self.server.spec.model))):
            self._restart(folder)
            self.server.wait_ready(self.sampling.timeout_s)
        pushed = self.sync.push(folder, "full", snapshot.step)
        path = f"merge + {pushed.path_used}"
        return dataclasses.replace(pushed, path_used=path, seconds=time.monotonic() - started)

    def _ask(self, task: EvalTask, model: str, deadline: float) -> list[Completion]:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise EngineError(
                f"the evaluation took longer than {self.sampling.timeout_s:.0f} s before task {task.name} began. "
                "Raise --gen_eval_timeout or lower --gen_eval_limit."
            )
        return self.client.generate(
            self.prompts[task.name],
            model=model,
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            seed=self.sampling.seed,
            stop_token_ids=self.sampling.stop_token_ids,
            timeout_s=remaining,
        )

    def _score_and_write(
        self, step: int, answers: Mapping[str, Sequence[Completion]], sync: SyncResult
    ) -> tuple[dict[str, float], dict[str, float | None]]:
        means: dict[str, float] = {}
        errors: dict[str, float | None] = {}
        for task in self.tasks:
            # The training tokenizer decodes, so that scores do not depend on the server's.
            texts = [self.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in answers[task.name]]
            references = [sample.reference for sample in task.samples]
            ids = [sample.id for sample in task.samples]
            prompts = [sample.prompt for sample in task.samples]
            columns: dict[str, list[float | None]] = {}
            for spec in task.metrics:
                metric = metrics.resolve(spec)
                column = metrics.score(metric, texts, references, sample_ids=ids, prompts=prompts)
                columns[metric.name] = column
                if all(value is None for value in column):
                    continue  # a judge that was away, say; the reason has been printed
                summary = metrics.summarise(column)
                key = metric_key(task.name, metric.name)
                means[key], errors[key] = summary.mean, summary.standard_error
            rows = [
                {
                    "step": step,
                    "id": sample.id,
                    "prompt": sample.prompt,
                    "reference": sample.reference,
                    "answer": text,
                    "finish_reason": completion.finish_reason,
                    "model": sync.model_name,
                    "scores": {name: values[position] for name, values in columns.items()},
                }
                for position, (sample, text, completion) in enumerate(
                    zip(task.samples, texts, answers[task.name], strict=True)
                )
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False, default=dict) + "\n" for row in rows)
            write_text(self.run_dir / EVALS / f"step-{step:06d}.{task.name}.jsonl", lines)
        return means, errors

    def _append(self, result: EvalResult) -> None:
        """One line per evaluation in evals/scores.jsonl; a repeated step (after a resume) replaces its line."""
        path = self.run_dir / EVALS / "scores.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        row = dataclasses.asdict(result) | {"tokens_per_second": round(result.tokens_per_second, 1)}
        rows = sorted([*(r for r in rows if r["step"] != result.step), row], key=lambda r: r["step"])
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def metric_key(task: str, metric: str) -> str:
    """The name a score is logged under, usable as `metric_for_best_model`."""
    return f"eval_gen_{task}_{metric}"
