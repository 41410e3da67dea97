"""What a run folder says, as values: read by `reading` and `answers`, drawn by `page`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = [
    "Answer",
    "Evaluation",
    "Export",
    "LossLog",
    "Memory",
    "RunReport",
    "Sample",
    "Section",
    "TaskAnswers",
    "Times",
    "Versus",
]

Point = tuple[int, float]  # step, value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Part of every section: `gaps` are sentences about what is missing, broken or left out."""

    gaps: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossLog(Section):
    """Losses by step, from `source`, the newest trainer_state.json."""

    training: tuple[Point, ...] = ()
    evaluation: tuple[Point, ...] = ()
    source: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One line of evals/scores.jsonl; `seconds` by phase, which add up to `total_seconds`.

    `compared`: by metric a sentence on step 0 and the best step before.  `late`: the score came while training went on,
    when it was at step `came_at` (None where that is not recorded).
    """

    step: int
    scores: Mapping[str, float]
    standard_errors: Mapping[str, float]
    samples: int | None
    generated_tokens: int | None
    tokens_per_second: float | None
    weights_path: str
    weights_why: str
    seconds: Mapping[str, float]
    total_seconds: float | None
    compared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    late: bool = False
    came_at: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model wrote at `step`, and how each metric scored it; None: it could not be scored.

    Where several answers were drawn `text` is the first, `others` the rest with their scores, and `scores` are those of
    the prompt.
    """

    step: int
    text: str
    finish_reason: str
    scores: Mapping[str, float | None]
    others: tuple[tuple[str, Mapping[str, float | None]], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt as (role, text) pairs, its reference, and the answers in the order of steps."""

    id: str
    prompt: tuple[tuple[str, str], ...]
    reference: str
    answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskAnswers(Section):
    """The answers of one task: `samples` are those shown of `total` prompts, `steps` those shown of `steps_total`."""

    task: str
    total: int
    steps: tuple[int, ...]
    steps_total: int
    samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Versus:
    """A figure that was predicted, measured or both, in `unit`."""

    name: str
    predicted: float | None
    measured: float | None
    unit: str

    @property
    def off(self) -> float | None:
        """How far the prediction is off, as a share of what was measured."""
        return self.predicted / self.measured - 1 if self.predicted is not None and self.measured else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Section):
    """`parts`: predicted bytes by phase and kind, of one GPU or (on CPUs) of one process's tensors.

    `phases`: measured GiB by phase, of the main process.  `line_gib`: the measured peak on the GPU.
    """

    rows: tuple[Versus, ...] = ()
    parts: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    phases: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    line_gib: float | None = None
    of_gpu: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all measured peaks."""
        return tuple(dict.fromkeys(name for peaks in self.phases.values() for name in peaks))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Times(Section):
    """Seconds in training steps (None until the run has ended) and in each phase of the evaluations together."""

    training: float | None = None
    steps: int | None = None
    median_step: float | None = None
    tokens_per_second: float | None = None
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One export_report.json: `facts` and `proof` are (name, value, limit) rows, `skipped` why nothing was compared."""

    folder: str
    facts: tuple[tuple[str, str], ...]
    proof: tuple[tuple[str, str, str], ...]
    skipped: str | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One run folder, whatever of it is there."""

    name: str
    ended: bool
    facts: tuple[tuple[str, str], ...]
    best: tuple[int, str, float] | None
    loss: LossLog
    evaluations: tuple[Evaluation, ...]
    evaluation_gaps: tuple[str, ...]
    tasks: tuple[TaskAnswers, ...]
    task_gaps: tuple[str, ...]
    memory: Memory
    times: Times
    exports: tuple[Export, ...]
    export_gaps: tuple[str, ...]
    versions: Mapping[str, str]
    ds_config: str | None
    gaps: tuple[str, ...]
