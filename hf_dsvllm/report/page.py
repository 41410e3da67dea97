"""`RunReport` → one HTML page without network or script; the template engine escapes every text."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from hf_dsvllm.report.answers import spread
from hf_dsvllm.report.charts import Bars, Lines, Series, bars, lines, thin
from hf_dsvllm.report.difference import Change, changes, clip
from hf_dsvllm.report.records import Answer, Evaluation, LossLog, Memory, RunReport, Sample, Times

__all__ = ["page"]

GIB = 1 << 30
MAX_METRICS = 16
MAX_EVALUATIONS = 200  # in a chart of scores
MAX_ROWS = 40  # of a table of evaluations
MAX_BARS = 12
MAX_ANSWER = 1200  # characters
MAX_PROMPT = 2000
MAX_MESSAGES = 8
MAX_OTHERS = 7  # further answers to one prompt
MAX_OTHER = 300  # characters of each
REFRESH_S = 10  # of a page that is watched
HEADLINE = 90
REWRITTEN = 1 / 3  # of an answer's characters must have been there before for its changes to be marked
# Neither may stand in a page: what UTF-8 cannot hold, and control characters other than tab and line ends.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MetricChart:
    """One metric over the steps; `share`: every value is between 0 and 1."""

    name: str
    share: bool
    chart: Lines


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerView:
    """One column: the answer in pieces, against the column before it; `left` characters are not shown.

    `rewritten`: so little of the earlier answer is left that marks would only be noise, so there are none.
    """

    answer: Answer
    pieces: Sequence[Change]
    left: int
    before: int | None
    same: bool
    rewritten: bool
    others: Sequence[tuple[str, int, Mapping[str, float | None]]]
    others_left: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleView:
    """One prompt, cut to a readable length."""

    id: str
    sample: Sample
    headline: str
    prompt: Sequence[tuple[str, str, int]]
    messages_left: int
    reference: str
    reference_left: int
    answers: Sequence[AnswerView]


def page(report: RunReport, *, version: str, now: datetime.datetime, watched: bool = False) -> str:
    """The page as text; `now` is what it says it was written at.  A `watched` one loads itself again."""
    names = list(dict.fromkeys(name for evaluation in report.evaluations for name in evaluation.scores))
    shares = {name: is_share(report.evaluations, name) for name in names}
    shown = names[:MAX_METRICS]
    return template().render(
        report=report,
        loss_chart=loss_chart(report.loss),
        thinned=len(thin(report.loss.training)) < len(report.loss.training),
        metrics=[metric_chart(report.evaluations, name, shares[name]) for name in shown],
        metrics_left=len(names) - len(shown),
        shares=shares,
        rows=spread(report.evaluations, MAX_ROWS),
        refresh=REFRESH_S if watched else None,
        tasks=[(task, [sample_view(sample) for sample in task.samples]) for task in report.tasks],
        memory_chart=memory_chart(report.memory),
        whole_chart=whole_chart(report.times),
        time_chart=time_chart(report.evaluations),
        version=version,
        now=f"{now:%Y-%m-%d %H:%M} UTC",
    )


@functools.cache
def template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "score": score, "seconds": seconds, "metric": metric_name}
    return environment.get_template("page.html.jinja")


def printable(value: Any) -> Any:
    """Text without what a page may not hold; anything else, and what the template itself made, as it is."""
    if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
        return UNPRINTABLE.sub("\ufffd", value)
    return value


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def score(value: float | None, share: bool = False) -> str:
    if value is None:
        return "not scored"
    return f"{value:.1%}" if share else figure(value)


def seconds(value: float | None) -> str:
    """3.2 s, 4 min 10 s, 2 h 5 min."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def metric_name(key: str) -> str:
    """`eval_gen_orders_json_equal` as it is read: `orders_json_equal`."""
    return key.removeprefix("eval_gen_")


def is_share(evaluations: Sequence[Evaluation], name: str) -> bool:
    return all(0 <= evaluation.scores.get(name, 0) <= 1 for evaluation in evaluations)


def loss_chart(loss: LossLog) -> Lines | None:
    named = (("training loss", loss.training), ("evaluation loss", loss.evaluation))
    series = [Series(name=name, points=[(x, y, None) for x, y in thin(points)]) for name, points in named if points]
    return lines("Loss by optimizer step", series) if series else None


def metric_chart(evaluations: Sequence[Evaluation], name: str, share: bool) -> MetricChart:
    with_it = spread([evaluation for evaluation in evaluations if name in evaluation.scores], MAX_EVALUATIONS)
    points = [(float(found.step), found.scores[name], found.standard_errors.get(name)) for found in with_it]
    title = f"{metric_name(name)} by optimizer step"
    return MetricChart(
        name=name, share=share, chart=lines(title, [Series(name=metric_name(name), points=points)], share=share)
    )


def sample_view(sample: Sample) -> SampleView:
    views: list[AnswerView] = []
    earlier: Answer | None = None
    for answer in sample.answers:
        text, left = clip(answer.text, MAX_ANSWER)
        pieces: Sequence[Change] = [("same", text)]
        if earlier is not None:
            pieces = changes(clip(earlier.text, MAX_ANSWER)[0], text)
        rewritten = sum(len(part) for kind, part in pieces if kind == "same") < REWRITTEN * len(text)
        views.append(
            AnswerView(
                answer=answer,
                pieces=[("same", text)] if rewritten else pieces,
                left=left,
                before=None if earlier is None else earlier.step,
                same=earlier is not None and earlier.text == answer.text,
                rewritten=rewritten,
                others=[(*clip(text, MAX_OTHER), scores) for text, scores in answer.others[:MAX_OTHERS]],
                others_left=max(0, len(answer.others) - MAX_OTHERS),
            )
        )
        earlier = answer
    prompt = sample.prompt[-MAX_MESSAGES:]
    reference, reference_left = clip(sample.reference, MAX_ANSWER)
    each = MAX_PROMPT // max(1, len(prompt))
    return SampleView(
        id=clip(sample.id, HEADLINE)[0],
        sample=sample,
        headline=clip(" ".join(prompt[-1][1].split()), HEADLINE)[0] if prompt else "",
        prompt=[(clip(role, 40)[0], *clip(text, each)) for role, text in prompt],
        messages_left=len(sample.prompt) - len(prompt),
        reference=reference,
        reference_left=reference_left,
        answers=views,
    )


def memory_chart(memory: Memory) -> Bars | None:
    if not memory.parts:
        return None
    rows = {phase: {name: size / GIB for name, size in sizes.items()} for phase, sizes in memory.parts.items()}
    whose = "one GPU" if memory.of_gpu else "the tensors of one process"
    return bars(f"Predicted memory of {whose} by phase, GiB", rows, "GiB", line=memory.line_gib)


def whole_chart(times: Times) -> Bars | None:
    parts = {"training": times.training} if times.training is not None else {}
    parts |= times.phases
    return bars("Seconds of the whole run by phase", {"whole run": parts}, "s") if any(parts.values()) else None


def time_chart(evaluations: Sequence[Evaluation]) -> Bars | None:
    rows = {f"step {found.step:,}": found.seconds for found in spread(evaluations, MAX_BARS)}
    return bars("Seconds of each evaluation by phase", rows, "s") if rows else None
