"""`hf-dsvllm report`: the page says everything a run folder holds, nothing of it as markup, and what is missing."""

from __future__ import annotations

import datetime
import html.parser
import json
import os
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
from hf_dsvllm.report.page import page
from hf_dsvllm.report.reading import read_run

NOW = datetime.datetime(2026, 11, 22, 12, 0, tzinfo=datetime.UTC)
VOID = {"meta", "br", "hr", "link", "img", "input"}
HOSTILE = "</pre></title></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'> onload='x' {{ 7*7 }} {% raw %}"
STEPS = (0, 10, 20)
MEASURED = {
    "steps": 20,
    "step_seconds": 40.0,
    "median_step_seconds": 2.0,
    "tokens": 8000,
    "tokens_per_second": 200.0,
    "gpu_peak_allocated_gib": 8.0,
    "gpu_peak_reserved_gib": 9.5,
    "host_peak_all_gib": 4.0,
    "phases": {"steps": {"host_gib": 2.5, "allocated_gib": 8.0}, "end": {"host_gib": 2.6}},
}


class Tree(html.parser.HTMLParser):
    """The page as a browser's parser sees it: tags in order, attributes, text; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return "".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def score_row(step: int, score: float, key: str = "eval_gen_orders_exact_match", **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "scores": {key: score},
        "standard_errors": {key: 0.1},
        "samples": 2,
        "generated_tokens": 50,
        "weights_path": "hot-load",
        "weights_why": "adapters, and the engine lives",
        "publish_seconds": 1.0,
        "wait_seconds": 2.0,
        "sync_seconds": 3.0,
        "generate_seconds": 4.0,
        "total_seconds": 11.0,
        "tokens_per_second": 12.5,
        **more,
    }


def answer_row(step: int, key: str, answer: str, score: float | None, **more: Any) -> dict[str, Any]:
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"Question {key}?"}]
    row = {"step": step, "id": key, "prompt": prompt, "reference": "right", "answer": answer, "finish_reason": "stop"}
    return row | {"model": "base", "scores": {"exact_match": score}} | more


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run of 20 steps with three evaluations of two prompts."""
    run = tmp_path / "orders-run"
    versions = {"torch": "2.13.0", "hf-dsvllm": "0.1.0"}
    put(run / "run.json", {"base_model": "my-model", "preset": "zero2", "world_size": 2, "versions": versions})
    predicted = {
        "gpu_allocated_bytes": {"forward": 6 * 2**30, "backward": 10 * 2**30},
        "gpu_parts_bytes": {"forward": {"weights": 6 * 2**30}, "backward": {"weights": 6 * 2**30, "logits": 2**32}},
        "host_bytes": 4 * 2**30,
        "step_seconds": 1.5,
    }
    put(run / "plan.json", {"predicted": predicted, "measured": MEASURED})
    put(run / "measured.json", MEASURED)
    put(run / "ds_config.json", {"zero_optimization": {"stage": 2}})
    put(run / "snapshots/best.json", {"step": 10, "metric": "eval_gen_orders_exact_match", "score": 0.5})
    put(run / "evals/scores.jsonl", jsonl(*(score_row(step, step / 20) for step in STEPS)))
    for step, word in zip(STEPS, ("wrong", "right", "right"), strict=True):
        rows = [answer_row(step, key, f"The answer is {word}.", float(word == "right")) for key in ("a", "b")]
        put(run / f"evals/step-{step:06d}.orders.jsonl", jsonl(*rows))
    history = [{"step": step, "loss": 3.0 / step} for step in range(1, 21)] + [{"step": 20, "eval_loss": 0.5}]
    put(run / "checkpoint-20/trainer_state.json", {"log_history": history})
    proof = {"mean_abs_difference": 0.05, "mean_limit": 0.2, "greedy_agreement": 1.0, "greedy_limit": 0.97}
    proof |= {"prompts": 12, "tokens": 300, "device": "cpu"}
    report = {"step": 20, "format": "merged", "parameters": 1234567, "verification": proof, "notes": ["a note"]}
    put(run / "export/export_report.json", report)
    return run


def page_of(run: Path) -> str:
    return page(read_run(run), version="0.1.0", now=NOW)


def text_of(run: Path) -> str:
    return re.sub(r"\s+", " ", Tree(page_of(run)).text)


# -- the page of a whole run


def test_every_part_of_the_run_is_on_the_page(run_folder: Path) -> None:
    text = text_of(run_folder)
    for words in (
        "Training has ended, after 20 steps", "Best snapshot: step 10, orders_exact_match 50.0%",
        "base model", "my-model", "From checkpoint-20/trainer_state.json: 3 at step 1, 0.15 at step 20.",
        "50.0% ± 10.0%", "hot-load", "adapters, and the engine lives", "Question a?", "Be short.",
        "GPU, allocated10 GiB8 GiB+25%", "one step1.5 s2 s-25%", "measured peak", "training steps40.0 s",
        "wait6.0 s", "scoring and writing3.0 s", "mean difference of the logits0.05at most 0.2",
        "same next token1at least 0.97", "1,234,567", "a note", "2.13.0", '"stage": 2',
        "Written 2026-11-22 12:00 UTC by hf-dsvllm 0.1.0",
    ):  # fmt: skip
        assert words in text, words


def test_nothing_is_said_to_be_missing_where_nothing_is(run_folder: Path) -> None:
    assert 'class="gap"' not in page_of(run_folder)


def test_the_page_needs_no_network_and_runs_no_script(run_folder: Path) -> None:
    tree = Tree(page_of(run_folder))
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tree.tags)
    links = [value or "" for name, value in tree.attributes if name in ("href", "src", "action", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not [name for name, _ in tree.attributes if name.startswith("on")]
    style = page_of(run_folder).partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_every_link_leads_to_a_section_and_every_wide_table_is_reached_by_the_keyboard(run_folder: Path) -> None:
    tree = Tree(page_of(run_folder))
    ids = [value for name, value in tree.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {(value or "")[1:] for name, value in tree.attributes if name == "href"} <= set(ids)
    assert page_of(run_folder).count('class="wide"') == page_of(run_folder).count('class="wide" tabindex="0"') > 3


def test_what_changed_from_step_to_step_is_marked(run_folder: Path) -> None:
    text = page_of(run_folder)
    assert "The answer is <del>wrong</del><ins>right</ins>." in text
    assert "; as at step 10" in text


def test_the_page_follows_the_colours_and_the_width_of_the_device(run_folder: Path) -> None:
    text = page_of(run_folder)
    assert "@media (prefers-color-scheme: dark)" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


# -- hostile and odd content


def plant(run: Path, text: str) -> None:
    """`text` wherever a run folder holds text."""
    key = f"eval_gen_orders_{text}"
    put(run / "run.json", {"base_model": text, "preset": text, "versions": {text: text}})
    put(run / "ds_config.json", {text: text})
    put(run / "plan.json", {"predicted": {"gpu_parts_bytes": {text: {text: 2**30}}}, "measured": {}})
    put(run / "measured.json", MEASURED | {"phases": {text: {text: 1.0}}})
    put(run / "snapshots/best.json", {"step": 10, "metric": text, "score": 1})
    rows = [score_row(step, 0.5, key=key, weights_path=text, weights_why=text) for step in STEPS]
    put(run / "evals/scores.jsonl", jsonl(*rows))
    prompt = [{"role": text, "content": text}, {"role": "tool", "content": None, "tool_calls": [text]}, text]
    for step in STEPS:
        row = answer_row(step, text, f"{text} {step}", 1.0, prompt=prompt, reference=text, finish_reason=text)
        put(run / f"evals/step-{step:06d}.orders.jsonl", jsonl(row | {"scores": {text: 1.0}}))
    report = {"step": text, "format": text, "verification_skipped": text, "notes": [text]}
    put(run / "export/export_report.json", report | {"verification": {"device": text, "tokens": text}})


def test_no_text_of_a_run_becomes_markup(run_folder: Path) -> None:
    plant(run_folder, "harmless")
    harmless = Tree(page_of(run_folder))
    plant(run_folder, HOSTILE)
    hostile = Tree(page_of(run_folder))
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert HOSTILE in hostile.text


def test_a_folder_and_a_task_may_be_called_anything(run_folder: Path) -> None:
    run = run_folder.rename(run_folder.with_name("a<b>&'\" run"))
    (run / "evals/step-000020.orders.jsonl").rename(run / "evals/step-000020.<i>x.y.jsonl")
    tree = Tree(page_of(run))
    assert "i" not in tree.tags
    assert "Run a<b>&'\" run" in tree.text
    assert "<i>x.y" in tree.text


@pytest.mark.parametrize(
    "text", ["שלום עולם", "你好，世界", "🦙🏽‍🚀 naïve", "\u202eabc", "é" * 5000, "", " \n\n ", "a\tb"]
)
def test_text_of_every_language_is_shown(text: str, run_folder: Path) -> None:
    plant(run_folder, text)
    target = write_report(run_folder)
    assert text[:80].strip() in Tree(target.read_text(encoding="utf-8")).text


def test_what_no_page_may_hold_is_replaced(run_folder: Path) -> None:
    plant(run_folder, "lone \ud800, null \x00, escape \x1b[31m")
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert "lone \ufffd, null \ufffd, escape \ufffd[31m" in Tree(text).text
    assert not re.search("[\x00\x1b]", text)


def test_values_of_any_type_anywhere_are_no_reason_to_fail(run_folder: Path) -> None:
    strange = (None, [], {}, "x", -1, 1e400, float("nan"), True, [{"a": 1}], 10**200, 1e-320)
    files = [path for path in run_folder.rglob("*.json*") if path.is_file()]
    for path in files:
        before = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in before.splitlines()] if path.suffix == ".jsonl" else [json.loads(before)]
        for key in rows[-1]:
            for value in strange:
                changed = [*rows[:-1], rows[-1] | {key: value}]
                path.write_text("\n".join(json.dumps(row) for row in changed), encoding="utf-8")
                page_of(run_folder)
        path.write_text(before, encoding="utf-8")


# -- runs in progress, and parts that are missing


def test_a_half_written_last_line_is_left_out_and_said(run_folder: Path) -> None:
    for name in ("scores.jsonl", "step-000020.orders.jsonl"):
        with (run_folder / "evals" / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 30, "id": "half", "answ')
    text = text_of(run_folder)
    assert "scores.jsonl: 1 line is half-written or broken and left out." in text
    assert "step-000020.orders.jsonl: 1 line is half-written or broken and left out." in text
    assert "50.0% ± 10.0%" in text


def test_a_run_in_progress_says_what_is_not_known_yet(run_folder: Path) -> None:
    for name in ("measured.json", "export/export_report.json", "checkpoint-20/trainer_state.json"):
        (run_folder / name).unlink()
    text = text_of(run_folder)
    for words in ("Training is under way, or was stopped", "Nothing is measured yet", "Seconds in training steps are",
                  "There is no export in the run folder", "There is no log of the loss"):  # fmt: skip
        assert words in text, words


def test_a_folder_with_nothing_but_its_record_is_a_page_of_gaps(tmp_path: Path) -> None:
    put(tmp_path / "run.json", {"preset": "lora"})
    text = text_of(tmp_path)
    for words in ("There are no scores", "There are no answers", "Nothing was predicted", "No versions are recorded",
                  "There is no ds_config.json"):  # fmt: skip
        assert words in text, words


def test_measures_of_an_earlier_run_in_the_folder_are_not_this_runs(run_folder: Path) -> None:
    plan = json.loads((run_folder / "plan.json").read_text(encoding="utf-8"))
    put(run_folder / "plan.json", {"predicted": plan["predicted"]})
    text = text_of(run_folder)
    assert "measured.json is of an earlier run" in text
    assert "GPU, allocated10 GiB––" in text


def test_the_loss_is_read_from_the_log_written_last(run_folder: Path) -> None:
    put(run_folder / "checkpoint-5/trainer_state.json", {"log_history": [{"step": 5, "loss": 7.0}]})
    newer = run_folder / "checkpoint-5/trainer_state.json"
    older = run_folder / "checkpoint-20/trainer_state.json"
    os.utime(older, ns=(10**18, 10**18))
    os.utime(newer, ns=(2 * 10**18, 2 * 10**18))
    assert read_run(run_folder).loss.training == ((5, 7.0),)
    os.utime(newer, ns=(5 * 10**17, 5 * 10**17))
    assert len(read_run(run_folder).loss.training) == 20
    assert "This log is older than run.json" in text_of(run_folder)


def test_a_broken_record_is_said_and_the_rest_shown(run_folder: Path) -> None:
    (run_folder / "run.json").write_text('{"preset": ', encoding="utf-8")
    (run_folder / "plan.json").write_text("[]", encoding="utf-8")
    text = text_of(run_folder)
    assert "run.json cannot be read (JSONDecodeError" in text
    assert "plan.json holds no JSON object." in text
    assert "Question a?" in text


def test_a_score_that_is_no_number_is_said_to_be_not_scored(run_folder: Path) -> None:
    put(run_folder / "evals/step-000020.orders.jsonl", jsonl(answer_row(20, "a", "x", None)))
    assert "0 → 1 → not scored" in text_of(run_folder)


def test_one_evaluation_is_enough_for_a_chart(run_folder: Path) -> None:
    for step in (0, 10):
        (run_folder / f"evals/step-{step:06d}.orders.jsonl").unlink()
    put(run_folder / "evals/scores.jsonl", jsonl(score_row(20, 1.0)))
    put(run_folder / "checkpoint-20/trainer_state.json", {"log_history": [{"step": 20, "loss": 0.0}]})
    text = page_of(run_folder)
    assert "orders_exact_match, step 20: 100.0%" in text
    assert "<del>" not in text.partition('<section id="answers">')[2].partition("<details")[2]


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


def test_a_file_that_vanishes_while_it_is_watched_is_no_reason_to_stop(run_folder: Path) -> None:
    pages = watching(run_folder, (run_folder / "evals/scores.jsonl").unlink)
    assert b"There are no scores" in pages[-1]
