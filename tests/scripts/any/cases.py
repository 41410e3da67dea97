"""The pytest side of `many.py`: write model, data and the list of cases, launch once, read what came of each."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import torchrun
from tests.tiny import write_tiny_model

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 1100.0
LIMIT_S = 150.0  # for one case: 1 to 4 s on two idle cores, ten times that beside a compiler
ENGINE_LIMIT_S = 240.0  # with a vLLM server: 25 s on two idle cores
SHORT = (
    *("--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_strategy", "no"),
    *("--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "1e-2"),
)
TRL = {
    "sft": ("--max_length", "64"),
    "dpo": ("--max_length", "64"),
    "reward": ("--max_length", "64"),
    "kto": ("--max_length", "64"),
    "grpo": ("--reward_funcs", "think_format_reward", "--num_generations", "2", "--max_completion_length", "8"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One script: `argv` stands after `python -m hf_dsvllm.run`, for a `plain` one after `python`."""

    name: str
    argv: Sequence[str]
    plain: bool = False
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limit_s: float = LIMIT_S


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a case left: its exit code on each rank, what rank 0 said, its output folder."""

    codes: tuple[int, ...]
    log: str
    out: Path

    def trained(self) -> Outcome:
        """Itself, if the script ended well."""
        assert self.codes == (0, 0), self.log[-6000:]
        return self

    def refused(self) -> Outcome:
        """Itself, if we ended it with an error of ours."""
        assert self.codes == (2, 2), self.log[-6000:]
        return self

    @property
    def wired(self) -> str:
        """The line that says what was wired where."""
        return re.findall(r"hf-dsvllm: wired: (.*)", self.log)[0]

    @property
    def running(self) -> str:
        """The line read off the live trainer."""
        return re.findall(r"hf-dsvllm: running: (.*)", self.log)[0]

    def losses(self) -> list[float]:
        """The loss of every step, in full, as the Trainer saved it."""
        state = json.loads((self.out / "trainer_state.json").read_text(encoding="utf-8"))
        return [row["loss"] for row in state["log_history"] if "loss" in row]

    def printed_losses(self) -> list[str]:
        """The loss of every step as printed, in four digits."""
        return re.findall(r"\{'loss': '([^']+)'", self.log)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_place(folder: Path) -> Path:
    """A tiny model, and data for every script, in `folder`."""

    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    write_tiny_model(folder / "model")
    questions = [said("user", f"count from {n}") for n in range(16)]
    answers = [said("assistant", f"{n + 1} {n + 2}") for n in range(16)]
    wrong = [said("assistant", f"{n} {n}") for n in range(16)]
    pairs = list(zip(questions, answers, wrong, strict=True))
    write_jsonl(folder / "sft" / "train.jsonl", [{"messages": q + a} for q, a, _ in pairs])
    write_jsonl(folder / "dpo" / "train.jsonl", [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in pairs])
    labelled = [{"prompt": q, "completion": a, "label": n % 2 == 0} for n, (q, a, _) in enumerate(pairs)]
    write_jsonl(folder / "kto" / "train.jsonl", labelled)
    write_jsonl(folder / "grpo" / "train.jsonl", [{"prompt": q} for q in questions])
    write_jsonl(folder / "questions.jsonl", [{"messages": q + a} for q, a, _ in pairs[:4]])
    texts = [{"text": f"The number {n} comes before the number {n + 1}. " * 4} for n in range(16)]
    write_jsonl(folder / "texts.jsonl", texts)
    package = folder / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(HERE / "clm.py", package / "clm.py")
    (package / "train.py").write_text(
        'from .clm import main\n\nif __name__ == "__main__":\n    main()\n', encoding="utf-8"
    )
    return folder


def trl_words(folder: Path, script: str, name: str) -> list[str]:
    """`trl SCRIPT` and its arguments on the tiny model."""
    data = {"reward": "dpo"}.get(script, script)
    named = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / data)]
    return ["trl", script, *named, "--output_dir", str(folder / "out" / name), *SHORT, *TRL[script]]


def ours(preset: str, *more: str) -> list[str]:
    """Our own arguments."""
    return ["--ds_preset", preset, "--export_to", "none", *more]


def run_all(folder: Path, cases: Sequence[Case]) -> dict[str, Outcome]:
    """Run every case in one torchrun of two processes; their exit codes are for the tests to judge."""
    spec = [{**dataclasses.asdict(case), "log": str(folder), "folder": str(folder)} for case in cases]
    file = folder / "cases.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    done = torchrun(HERE / "many.py", nproc=2, args=[str(file)], timeout=TIMEOUT_S, env={})
    assert done.returncode == 0, done.stderr[-6000:]
    return {case.name: outcome(folder, case.name) for case in cases}


def outcome(folder: Path, name: str) -> Outcome:
    logs = [(folder / f"{name}.{rank}.log").read_text(encoding="utf-8", errors="replace") for rank in (0, 1)]
    codes = tuple(int(re.findall(r"^exit code (-?\d+)$", log, re.MULTILINE)[-1]) for log in logs)
    for code, log in zip(codes[1:], logs[1:], strict=True):
        if code != codes[0]:
            print(f"{name}: rank 1 ended with {code}:\n{log[:6000]}")  # shown when the test fails
    return Outcome(codes=codes, log=logs[0], out=folder / "out" / name)
