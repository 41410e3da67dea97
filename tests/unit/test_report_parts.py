"""`hf-dsvllm report`: what is chosen, drawn and marked, how large a page gets, and the command itself."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dsvllm.cli import main
from hf_dsvllm.errors import ReportError
from hf_dsvllm.report import watch_run, write_report
from hf_dsvllm.report.answers import MAX_SAMPLES, MAX_STEPS, chosen_steps
from hf_dsvllm.report.charts import MAX_POINTS, Series, lines, ticks
from hf_dsvllm.report.difference import changes
from hf_dsvllm.report.reading import read_run
from tests.report_run import MEASURED, STEPS, answer_row, jsonl, page_of, put, score_row, text_of, write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "orders-run")


# -- bounds


def test_ten_thousand_prompts_at_a_hundred_steps_stay_a_page(run_folder: Path) -> None:
    long = "ぶ<&" * 1000  # what grows most in bytes, and what grows most when escaped
    for step in (30, 990):
        rows = [answer_row(step, str(key), f"{key} {long}", float(key % 3 == step % 3)) for key in range(10_000)]
        rows[77] = answer_row(step, "77", "lost" if step == 990 else "had", float(step == 30))
        put(run_folder / f"evals/step-{step:06d}.orders.jsonl", "\n".join(json.dumps(row) for row in rows))
    for step in range(40, 990, 10):
        put(run_folder / f"evals/step-{step:06d}.orders.jsonl", jsonl(answer_row(step, "77", "had", 1.0)))
    put(run_folder / "evals/scores.jsonl", jsonl(*(score_row(step, 0.5) for step in range(5000))))
    put(run_folder / "checkpoint-20/trainer_state.json",
        {"log_history": [{"step": step, "loss": 1.0} for step in range(20_000)]})  # fmt: skip
    text = page_of(run_folder)
    assert len(text.encode()) < 4_000_000
    assert text.count('<details class="sample">') == MAX_SAMPLES
    assert f"{MAX_SAMPLES} of 10,000 prompts are shown" in text
    assert max(points.count(",") for points in re.findall(r'points="(.*?)"', text)) <= MAX_POINTS
    assert "neighbours are drawn as their mean" in text
    assert "40 of 5000 evaluations" in text
    assert " more characters" in text


def test_prompts_that_got_worse_are_among_those_shown(run_folder: Path) -> None:
    for step, lost in ((0, 1.0), (20, 0.0)):
        rows = [answer_row(step, str(key), "x", lost if key == 777 else 1.0) for key in range(1000)]
        put(run_folder / f"evals/step-{step:06d}.orders.jsonl", jsonl(*rows))
    (run_folder / "evals/step-000010.orders.jsonl").unlink()
    [task] = read_run(run_folder).tasks
    assert task.samples[0].id == "777"
    assert "1 of 1 that got worse" in task.gaps[0]


@pytest.mark.parametrize("best", [None, 0, 10, 450, 980, 990, 7])
def test_the_first_the_best_and_the_last_step_are_side_by_side(best: int | None) -> None:
    steps = list(range(0, 1000, 10))
    chosen = chosen_steps(steps, best)
    assert len(chosen) == MAX_STEPS
    assert {0, 990} <= set(chosen)
    assert best is None or best not in steps or best in chosen


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-5, 1e9), (2, 2), (0, 0), (-1e99, 1e99), (1e-300, 0)])
def test_the_numbers_on_an_axis_enclose_the_values_and_are_few(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1] or found[-1] - found[0] > 0.9
    assert 2 <= len(found) <= 12
    assert found == sorted(set(found))


def test_an_interval_is_1_96_standard_errors_and_a_share_ends_at_one() -> None:
    chart = lines("", [Series(name="x", points=[(0, 0.5, 0.1), (1, 0.95, 0.1)])], share=True)
    first, second = chart.lines[0].marks
    per_unit = chart.y_ticks[0].place - chart.y_ticks[-1].place
    assert first.low - first.y == pytest.approx(0.196 * per_unit, abs=0.2)
    assert second.high == chart.y_ticks[-1].place


# -- what changed


def test_the_pieces_of_a_comparison_join_to_both_answers() -> None:
    draw = random.Random(3)
    words = ["a", "b ", " ", "\n", "你", "好 ", "“", "é", "x1", "...", "\t", "ת"]
    for length in [*range(40), 900]:
        before, after = ("".join(draw.choices(words, k=length)) for _ in range(2))
        pieces = changes(before, after)
        assert "".join(text for kind, text in pieces if kind != "gone") == after
        assert "".join(text for kind, text in pieces if kind != "new") == before


def test_equal_answers_have_no_changes() -> None:
    for text in ("", "the same", "x" * 3, "long " * 2000):
        assert {kind for kind, _ in changes(text, text)} <= {"same"}


def test_an_answer_written_anew_is_shown_without_marks(run_folder: Path) -> None:
    put(run_folder / "evals/step-000020.orders.jsonl", jsonl(answer_row(20, "a", '{"qty": 1}', 1.0)))
    text = page_of(run_folder)
    assert "written anew since step 10" in text
    assert '<pre dir="auto">{&#34;qty&#34;: 1}</pre>' in text


# -- the command


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hf-dsvllm", "report", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command_prints_where_the_page_is(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, str(run_folder)) == 0
    assert capsys.readouterr().out.strip() == str(run_folder / "report.html")
    out = run_folder.parent / "new" / "page.html"
    assert call(monkeypatch, str(run_folder), "--out", str(out)) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_wrong_name_is_answered_with_the_nearest_ones(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, str(run_folder.parent / "order-run")) == 2
    assert "order-run is no folder: name the --output_dir of a run. Nearest beside it: orders-run." in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_folder_of_runs_and_a_folder_in_a_run_are_answered_with_the_run(run_folder: Path) -> None:
    with pytest.raises(ReportError, match=r"is no run: .* Runs near it: .*orders-run"):
        write_report(run_folder.parent)
    with pytest.raises(ReportError, match=r"is no run: .* Runs near it: .*orders-run"):
        write_report(run_folder / "snapshots")


def test_a_page_that_cannot_be_written_is_one_clear_error(run_folder: Path) -> None:
    with pytest.raises(ReportError, match="is a folder; name a file"):
        write_report(run_folder, run_folder)
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(run_folder, run_folder / "run.json" / "report.html")


def watching(run: Path, *steps: Callable[[], None]) -> list[bytes]:
    """The page at each look while `steps` happen one after the other; then Ctrl-C."""
    todo, pages = list(steps), []

    def pause(_: float) -> None:
        pages.append((run / "report.html").read_bytes())
        if not todo:
            raise KeyboardInterrupt
        todo.pop(0)()

    watch_run(run, pause=pause)
    return pages


def test_watching_writes_the_page_again_when_a_file_changes_and_ctrl_c_ends_it(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing() -> None:
        pass

    def another_score() -> None:
        rows = [score_row(step, 0.875) for step in (*STEPS, 30)]
        put(run_folder / "evals/scores.jsonl", jsonl(*rows))

    first, second, third = watching(run_folder, nothing, another_score)
    assert first == second
    assert b"step 30: 87.5%" in third
    assert b"step 30: 87.5%" not in first
    assert capsys.readouterr().err.count("written") == 2


def test_a_watched_page_follows_by_itself_until_the_run_or_the_watching_ends(run_folder: Path) -> None:
    (run_folder / "measured.json").unlink()
    (running,) = watching(run_folder)
    refresh = b'<meta http-equiv="refresh" content="10">'
    assert refresh in running
    assert refresh not in (run_folder / "report.html").read_bytes()
    put(run_folder / "measured.json", MEASURED)
    (ended,) = watching(run_folder)
    assert refresh not in ended


def test_a_file_that_vanishes_while_it_is_watched_is_no_reason_to_stop(run_folder: Path) -> None:
    pages = watching(run_folder, (run_folder / "evals/scores.jsonl").unlink)
    assert b"There are no scores" in pages[-1]


# -- several answers, comparisons, late scores


def test_further_answers_stand_below_the_first_and_one_metric_tells_the_journey(run_folder: Path) -> None:
    drawn = [{"answer": f"answer {n}", "scores": {"exact_match": n % 2}} for n in range(10)]
    row = answer_row(20, "a", "answer 0", 0.5, samples=drawn) | {"scores": {"exact_match": 0.5, "pass": 1.0}}
    put(run_folder / "evals/step-000020.orders.jsonl", jsonl(row))
    text = text_of(run_folder)
    assert "exact_match 0 → 1 → 0.5 Question a?" in text
    assert "9 more answers" in text
    assert "exact_match 1 answer 7" in text.replace("1answer", "1 answer")
    assert "answer 8" not in text
    assert "2 are not shown." in text


def test_the_newest_comparison_is_spelt_out_and_the_others_are_kept(run_folder: Path) -> None:
    def compared(step: int, sentence: str) -> dict[str, Any]:
        told = {"eval_gen_orders_exact_match": {"over_base": None, "over_best": None, "sentence": sentence}}
        return score_row(step, 0.5, comparisons=told)

    rows = [score_row(0, 0.5), compared(10, "first sentence"), compared(20, "second <b>sentence</b>")]
    put(run_folder / "evals/scores.jsonl", jsonl(*rows))
    text = text_of(run_folder)
    assert "Step 20 against the untrained model and the best step before it orders_exact_match: second <b>" in text
    assert "step 10, orders_exact_match: first sentence" in text


def test_a_late_score_stands_at_its_own_step(run_folder: Path) -> None:
    rows = [score_row(0, 0.25), score_row(20, 0.75), score_row(10, 0.5, late=True, evaluated_at_step=24)]
    put(run_folder / "evals/scores.jsonl", jsonl(*rows))
    found = read_run(run_folder).evaluations
    assert [(one.step, one.late, one.came_at) for one in found] == [(0, False, None), (10, True, 24), (20, False, None)]
    assert "10 (came late, at step 24)" in text_of(run_folder)


def test_the_time_of_lm_eval_is_a_phase_of_its_own(run_folder: Path) -> None:
    assert "lm-eval" not in read_run(run_folder).times.phases
    rows = [score_row(20, 0.5, harness_seconds=0.75)]
    put(run_folder / "evals/scores.jsonl", jsonl(*rows))
    phases = read_run(run_folder).times.phases
    assert (phases["lm-eval"], phases["scoring and writing"]) == (0.75, 0.25)
