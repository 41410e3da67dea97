"""A small synthetic run folder for the tests of `hf-dsvllm report`, and its page as a parser sees it."""

from __future__ import annotations

import datetime
import html.parser
import json
import re
from pathlib import Path
from typing import Any

from hf_dsvllm.report.page import page
from hf_dsvllm.report.reading import read_run

NOW = datetime.datetime(2026, 11, 22, 12, 0, tzinfo=datetime.UTC)
VOID = {"meta", "br", "hr", "link", "img", "input"}
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


def write_run(run: Path) -> Path:
    """A finished run of 20 steps with three evaluations of two prompts, in the folder `run`."""
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
