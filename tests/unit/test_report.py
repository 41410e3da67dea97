"""`hf-dsvllm report`: the page says everything a run folder holds, nothing of it as markup, and what is missing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import hf_dsvllm
from hf_dsvllm.report import write_report
from hf_dsvllm.report.charts import COLOURS
from hf_dsvllm.report.reading import read_run
from tests.report_run import MEASURED, STEPS, Tree, answer_row, jsonl, page_of, put, score_row, text_of, write_run

HOSTILE = "</pre></title></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'> onload='x' {{ 7*7 }} {% raw %}"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "orders-run")


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


def test_every_colour_of_a_chart_is_defined_for_light_and_dark() -> None:
    style = (Path(hf_dsvllm.__file__).parent / "report" / "page.css").read_text(encoding="utf-8")
    for place in range(COLOURS):
        assert len(re.findall(rf"--c{place}: #", style)) == 2
        assert f".s{place} {{ --c: var(--c{place}); }}" in style


def test_what_a_bar_shows_by_length_and_colour_is_there_in_words_too(run_folder: Path) -> None:
    text = text_of(run_folder)
    assert text.count("In numbers") == 3
    assert "backward: logits 4 GiB" in text.partition("In numbers")[2]


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
    strange = (None, [], {}, "x", -1, float("nan"), [{"a": 1}], 10**200)
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


def test_a_run_in_progress_shows_what_it_measured_until_now(run_folder: Path) -> None:
    put(run_folder / "measured.json", MEASURED | {"finished": False})
    plan = run_folder / "plan.json"
    put(plan, {"predicted": json.loads(plan.read_text(encoding="utf-8"))["predicted"]})
    os.utime(plan, (0, 0))
    assert "The run is not finished, or was ended: what was measured is until then." in text_of(run_folder)
    assert "Training is under way, or was stopped" in text_of(run_folder)
    assert not read_run(run_folder).ended
    os.utime(run_folder / "measured.json", (0, 0))
    os.utime(plan)
    assert "measured.json is of an earlier run" in text_of(run_folder)


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
    assert "this export was made by hand, or is of an earlier run" in text
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
