"""Each score against the first and the best before it, in one process or after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from hf_dsvllm.evaluation.history import ScoreHistory, answers_file, metric_key

KEY = metric_key("t", "exact_match")
PROMPTS = 40


def column(right: int) -> dict[str, float | None]:
    """The first `right` of 40 prompts are answered well."""
    return {str(n): float(n < right) for n in range(PROMPTS)}


def write(run: Path, step: int, scores: dict[str, float | None]) -> None:
    rows = [{"step": step, "id": name, "scores": {"exact_match": value}} for name, value in scores.items()]
    file = answers_file(run, step, "t")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_score_is_held_against_step_0_and_the_best_step_before(tmp_path: Path) -> None:
    history = ScoreHistory(tmp_path)
    assert history.compare(0, {KEY: column(4)}) == {}
    first = history.compare(20, {KEY: column(30)})[KEY]
    assert "points over step 0" in first.sentence
    assert first.over_best is None  # step 0 is the best so far
    second = history.compare(40, {KEY: column(29)})[KEY]
    assert "no worse than the best so far within noise (step 20: -2.5 points" in second.sentence
    assert second.brief.endswith("within noise of step 20")
    assert "worse than the best so far (step 20" in history.compare(60, {KEY: column(10)})[KEY].sentence
    assert history.compare(80, {KEY: column(40)})[KEY].brief.endswith("better than step 20")


def test_a_resumed_run_reads_it_all_from_the_files(tmp_path: Path) -> None:
    once = ScoreHistory(tmp_path)
    for step, right in ((0, 4), (20, 30), (40, 10)):
        once.compare(step, {KEY: column(right)})
        write(tmp_path, step, column(right))
    resumed = ScoreHistory(tmp_path).compare(60, {KEY: column(28)})
    assert resumed == once.compare(60, {KEY: column(28)})


def test_going_back_to_an_earlier_step_forgets_what_came_after(tmp_path: Path) -> None:
    for step, right in ((0, 4), (20, 10), (40, 40)):
        write(tmp_path, step, column(right))
    found = ScoreHistory(tmp_path).compare(30, {KEY: column(30)})[KEY]
    assert "step 40" not in found.sentence
    assert "better than the best so far (step 20" in found.sentence


def test_a_metric_without_scores_is_left_out_and_remembers_nothing(tmp_path: Path) -> None:
    history = ScoreHistory(tmp_path)
    nothing: dict[str, float | None] = {str(n): None for n in range(PROMPTS)}
    history.compare(0, {KEY: column(4)})
    history.compare(20, {KEY: column(20)})
    assert history.compare(40, {KEY: nothing}) == {}
    assert "step 20" in history.compare(60, {KEY: column(20)})[KEY].sentence


def test_where_lower_is_better_the_lowest_is_the_best(tmp_path: Path) -> None:
    history = ScoreHistory(tmp_path, lower_is_better=[KEY])
    for step, right in ((0, 30), (20, 10), (40, 25)):
        found = history.compare(step, {KEY: column(right)})
    assert "worse than the best so far (step 20" in found[KEY].sentence


def test_too_few_prompts_are_said_but_not_in_the_console_line(tmp_path: Path) -> None:
    history = ScoreHistory(tmp_path)
    few: dict[str, float | None] = {str(n): 1.0 for n in range(5)}
    history.compare(0, {KEY: few})
    found = history.compare(10, {KEY: few})[KEY]
    assert "5 prompts have a score in both, an interval needs 30" in found.sentence
    assert found.brief == ""


def test_broken_lines_of_an_earlier_process_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 0, column(4))
    with answers_file(tmp_path, 0, "t").open("a") as file:
        file.write('{"id": "x", "scores"\n[1]\n{"id": "y"}\n')
    assert ScoreHistory(tmp_path).compare(10, {KEY: column(30)})[KEY].over_base is not None
