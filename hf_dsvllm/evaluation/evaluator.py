"""Generation evaluation: weights into the engine, prompts out, answers scored, every sample kept in the run folder.

`Evaluator` lives on rank 0 only; `hf_dsvllm.callback` makes the collective steps around it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm import metrics
from hf_dsvllm.console import say
from hf_dsvllm.engine.client import Completion
from hf_dsvllm.engine.remote import RemoteServer
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.engine.sync import SyncResult
from hf_dsvllm.errors import EngineError, EvalFileError
from hf_dsvllm.evaluation.canary import Canary
from hf_dsvllm.evaluation.delivery import Asked, Delivery
from hf_dsvllm.evaluation.history import EVALS, ScoreHistory, answers_file, metric_key
from hf_dsvllm.evaluation.result import EvalResult, HarnessTasks, Sampling, sampling_of
from hf_dsvllm.evaluation.scores import Drawn, cut_at_stop, score_task
from hf_dsvllm.files import write_text
from hf_dsvllm.forwarder import MODEL, Forwarder, expose_key
from hf_dsvllm.harness import HarnessScores, Worker, run_tasks
from hf_dsvllm.measure import gib_of_others
from hf_dsvllm.statistics import Comparison
from hf_dsvllm.tasks import EvalTask, render_prompt

__all__ = ["EVALS", "EvalResult", "Evaluator", "HarnessTasks", "Sampling", "metric_key", "sampling_of"]


HARNESS_LENGTH = 2048  # lm-eval's own default of max_length, in tokens


class Evaluator:
    """One engine and the tasks it is asked; used on rank 0 only."""

    def __init__(
        self,
        *,
        server: EngineServer | RemoteServer,
        tasks: Sequence[EvalTask],
        tokenizer: Any,
        sampling: Sampling,
        run_dir: Path,
        merge_base: Path | None = None,
        canary: Canary | None = None,
        harness: HarnessTasks | None = None,
        expose_port: int | None = None,
        lower_is_better: Collection[str] = (),
    ) -> None:
        """`merge_base`: adapters are merged into this folder's weights first and served as a full model.

        `expose_port`: the model answers there between and during evaluations, 0 for any free port.  `lower_is_better`:
        metric keys whose lowest score is the best.
        """
        self.delivery = Delivery(
            server, run_dir=run_dir, timeout_s=sampling.timeout_s, merge_base=merge_base, canary=canary
        )
        self.tasks = tuple(tasks)
        # A copy: evaluation may run beside training, and two threads may not pad and cut with one fast tokenizer.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.sampling = sampling
        self.run_dir = run_dir
        self.harness = harness
        self._lm_eval = Worker(run_dir / "engine" / "lm-eval.log")
        self.history = ScoreHistory(run_dir, lower_is_better=lower_is_better)
        self.prompts = {task.name: [render_prompt(sample, tokenizer) for sample in task.samples] for task in tasks}
        self._told_few = False
        if harness is not None:
            self._lm_eval.start()
        self.door = None if expose_port is None else self._expose(expose_port)

    def evaluate(self, asked: Asked) -> EvalResult:
        """Answer every task with the weights asked for.

        Raises EngineError when the engine cannot be brought to answer within the deadline, or its weights are others,
        and EvalFileError when no metric of any task has a score.
        """
        started = time.monotonic()
        try:
            result = self._evaluate(asked, started)
        except EngineError:
            self.delivery.revive()
            raise
        finally:  # whatever failed, training goes on and needs its memory
            self.rest()
        result = self._rested(result)
        self._append(result, asked.step if asked.now is None else asked.now())
        return result

    def _evaluate(self, weights: Asked, started: float) -> EvalResult:
        step = weights.step
        deadline = started + self.sampling.timeout_s
        self.delivery.wait_ready()
        waited = time.monotonic() - started
        self.shut_door(step)
        sync, proof = self.delivery.deliver(weights)
        if self.door is not None:
            self.door.resume(sync.model_name, self.delivery.server.uds)
        asked, asked_at = time.monotonic(), time.time()
        answers: dict[str, list[Completion]] = {}
        task_seconds: dict[str, float] = {}
        for task in self.tasks:
            begun = time.monotonic()
            answers[task.name] = self._ask(task, sync.model_name, deadline)
            task_seconds[task.name] = time.monotonic() - begun
        generated = time.monotonic() - asked
        harness = self._ask_harness(step, sync.model_name, deadline)
        harnessed = time.monotonic() - asked - generated
        answered_at = time.time()
        scores, errors, columns = self._score_and_write(step, answers, sync)
        self._add_harness(step, harness, sync, scores, errors, columns)
        if self.tasks and not scores:
            count = sum(len(completions) for completions in answers.values())
            raise EvalFileError(f"none of {count} answers could be scored; what each metric lacked is said above.")
        directions = self._directions(harness)
        self.history.lower_is_better |= {key for key, higher in directions.items() if not higher}
        comparisons = self.history.compare(step, columns)
        self._say_few(comparisons)
        parts = (*harness.tasks, *harness.parts) if harness else ()
        return EvalResult(
            step=step,
            scores=scores,
            standard_errors=errors,
            comparisons=comparisons,
            higher_is_better=directions,
            samples=sum(len(task.samples) for task in self.tasks) + sum(len(part.rows) for part in parts),
            generated_tokens=sum(len(c.token_ids) for completions in answers.values() for c in completions),
            weights_path=sync.path_used,
            weights_why=sync.why,
            proof=proof,
            publish_seconds=weights.publish_seconds,
            wait_seconds=waited,
            sync_seconds=sync.seconds,
            generate_seconds=generated,
            harness_seconds=harnessed if self.harness else 0.0,
            total_seconds=weights.publish_seconds + time.monotonic() - started,
            phases={**weights.phases, **sync.phases, "engine's canary": self.delivery.proof_seconds},
            task_seconds=task_seconds,
            asked_at=asked_at,
            answered_at=answered_at,
        )

    def _rested(self, result: EvalResult) -> EvalResult:
        """With what sleep took and leaves, where the engine sleeps now."""
        slept = self.delivery.sleep_seconds
        if slept is None:
            return result
        asleep = gib_of_others(self.delivery.processes)
        return dataclasses.replace(result, phases={**result.phases, "sleep": slept}, asleep_gib=asleep)

    def rest(self) -> None:
        """Give training its memory back, where the engine sleeps between evaluations."""
        if self.door is not None and self.delivery.sleeps:
            self.door.pause("the engine sleeps between evaluations, and training has its memory")
        self.delivery.rest()

    def shut_door(self, step: int) -> None:
        """Nobody asks while weights are on their way: before an evaluation, and before live weights are sent."""
        if self.door is not None:
            self.door.pause(f"the weights of step {step} are on their way into the engine")

    def close(self) -> None:
        """Stop the engine."""
        with contextlib.ExitStack() as ends:  # each of them, whatever the others raise
            ends.callback(self.delivery.close)
            ends.callback(self._lm_eval.close)
            if self.door is not None:
                ends.callback(self.door.close)

    def _ask(self, task: EvalTask, model: str, deadline: float) -> list[Completion]:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise EngineError(
                f"the evaluation took longer than {self.sampling.timeout_s:.0f} s before task {task.name} began. "
                "Raise --gen_eval_timeout or lower --gen_eval_limit."
            )
        sampling = sampling_of(task, self.sampling)
        return self.delivery.client.generate(
            self.prompts[task.name],
            model=model,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            stop_token_ids=sampling.stop_token_ids,
            stop=task.settings.stop,
            n=sampling.samples,
            timeout_s=remaining,
        )

    def _drawn(self, task: EvalTask, completions: Sequence[Completion]) -> list[list[Drawn]]:
        """The answers to each prompt.  The training tokenizer decodes, so scores do not depend on the server's."""
        drawn = [
            Drawn(
                text=cut_at_stop(self.tokenizer.decode(c.token_ids, skip_special_tokens=True), task.settings.stop),
                finish_reason=c.finish_reason,
            )
            for c in completions
        ]
        count = len(drawn) // len(task.samples)
        return [drawn[first : first + count] for first in range(0, len(drawn), count)]

    def _score_and_write(
        self, step: int, answers: Mapping[str, Sequence[Completion]], sync: SyncResult
    ) -> tuple[dict[str, float], dict[str, float | None], dict[str, Mapping[str, float | None]]]:
        """Means, their standard errors, and the scores prompt by prompt, all by metric key."""
        means: dict[str, float] = {}
        errors: dict[str, float | None] = {}
        columns: dict[str, Mapping[str, float | None]] = {}
        for task in self.tasks:
            scored = score_task(task, self._drawn(task, answers[task.name]), step=step, model=sync.model_name)
            for metric, column in scored.columns.items():
                key = metric_key(task.name, metric)
                columns[key] = column
                if all(value is None for value in column.values()):
                    continue  # a judge that was away, say; the reason has been printed
                summary = metrics.summarise(list(column.values()))
                means[key], errors[key] = summary.mean, summary.standard_error
            self._write_rows(step, task.name, scored.rows)
        return means, errors, columns

    def _write_rows(self, step: int, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False, default=dict) + "\n" for row in rows)
        write_text(answers_file(self.run_dir, step, task), lines)

    # -- lm-evaluation-harness, and a door for others ---------------------------------------------------------------

    def _ask_harness(self, step: int, model: str, deadline: float) -> HarnessScores | None:
        """None without such tasks, or where lm-eval failed, which is said: the other scores stand."""
        if self.harness is None:
            return None
        own, spec = self.run_dir / "tokenizer", self.delivery.server.spec
        key = secrets.token_urlsafe()
        try:
            with Forwarder(key=key) as forwarder:
                forwarder.resume(model, self.delivery.server.uds)
                return run_tasks(
                    self._lm_eval,
                    self.harness.names,
                    url=forwarder.url,
                    key=key,
                    model=MODEL,
                    tokenizer=str(own if own.is_dir() else spec.tokenizer or spec.model),
                    max_length=spec.max_model_len or HARNESS_LENGTH,
                    limit=self.harness.limit,
                    trust_remote_code=self.harness.trust_remote_code,
                    seed=self.sampling.seed,
                    timeout_s=max(0.0, deadline - time.monotonic()),
                )
        except EngineError as error:
            say(f"step {step}: no scores of lm-evaluation-harness. {error}")
            return None

    def _add_harness(
        self,
        step: int,
        harness: HarnessScores | None,
        sync: SyncResult,
        means: dict[str, float],
        errors: dict[str, float | None],
        columns: dict[str, Mapping[str, float | None]],
    ) -> None:
        """lm-eval's scores beside ours, and its prompts and answers in the same files."""
        for result in harness.tasks if harness else ():
            for metric, value in result.scores.items():
                key = metric_key(result.name, metric)
                means[key], errors[key] = value, result.errors.get(metric)
                column = {row["id"]: row["scores"].get(metric) for row in result.rows}
                if is_mean_of(value, column.values()):
                    columns[key] = column
        for part in (*harness.tasks, *harness.parts) if harness else ():
            if part.rows:
                rows = [{"step": step, **row, "model": sync.model_name} for row in part.rows]
                self._write_rows(step, part.name, rows)

    def _directions(self, harness: HarnessScores | None) -> dict[str, bool]:
        """Whether more is better, by metric key, where it is known: of our metrics by their names."""
        ours = {
            metric_key(task.name, name): True
            for task in self.tasks
            for name in metrics.score_names(task.metrics, sampling_of(task, self.sampling).samples)
            if not metrics.less_is_better(name)
        }
        told = {
            metric_key(result.name, name): higher
            for result in (harness.tasks if harness else ())
            for name, higher in result.higher_is_better.items()
        }
        return ours | told

    def _expose(self, port: int) -> Forwarder | None:
        """The door for a user's own client; one that cannot be opened is no reason not to train."""
        try:
            key, where = expose_key(self.run_dir)
            door = Forwarder(key=key, port=port)
        except (EngineError, OSError) as error:
            say(f"the model in training cannot be asked: {error}")
            return None
        say(f'from the first evaluation on, OpenAI clients can ask the model "{MODEL}" at {door.url}; {where}')
        return door

    def _say_few(self, comparisons: Mapping[str, Comparison]) -> None:
        """Once: why no score of this run is held against another."""
        if comparisons and not self._told_few and not any(found.brief for found in comparisons.values()):
            self._told_few = True
            say(f"scores {next(iter(comparisons.values())).sentence}")

    def _append(self, result: EvalResult, known_at: int) -> None:
        """One line per evaluation in evals/scores.jsonl; a repeated step (after a resume) replaces its line.

        `known_at`: the step training has reached by now, written where the scores are late.
        """
        path = self.run_dir / EVALS / "scores.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        row = dataclasses.asdict(result) | {"tokens_per_second": round(result.tokens_per_second, 1)}
        if known_at != result.step:
            row |= {"late": True, "evaluated_at_step": known_at}
        rows = sorted([*(r for r in rows if r["step"] != result.step), row], key=lambda r: r["step"])
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def is_mean_of(value: float, scores: Collection[float | None]) -> bool:
    """Whether prompts can be compared in place of `value`: a perplexity's have log-likelihoods as their scores."""
    known = [score for score in scores if score is not None]
    return bool(known) and math.isclose(value, sum(known) / len(known), rel_tol=1e-6, abs_tol=1e-6)
