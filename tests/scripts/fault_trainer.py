"""The trainer of a fault: prepare, load, attach, train, through the package's own session, as a recipe does it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.scripts.fault_cases import STEPS, Fault

FAKE = Path(__file__).with_name("killable_vllm.py")
QUESTIONS = "".join(json.dumps({"prompt": f"Number {n}?", "reference": str(n)}) + "\n" for n in range(3))
METRIC = "def broken(completion, reference):\n    raise ValueError('no such thing')\n"
POLL_S = 0.01


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run and everything it could leave is."""

    fault: Fault
    model: Path
    run: Path
    control: Path
    temporary: Path
    state: Path
    files: Path


def import_everything() -> None:
    """What every trainer needs; nothing here starts a thread."""
    import peft
    import torch
    import transformers.trainer
    import trl

    import hf_dsvllm.session

    trl.get_peft_config(trl.ModelConfig(model_name_or_path="x"))
    del peft, torch, transformers, hf_dsvllm


def train(place: Place) -> None:
    """The whole run; leaves by SystemExit where the package's command line would."""
    from hf_dsvllm.console import friendly
    from hf_dsvllm.files import write_text

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background
    tempfile.tempdir = str(place.temporary)
    os.environ.update(TMPDIR=str(place.temporary), XDG_STATE_HOME=str(place.state), HF_DSVLLM_FAKE=str(place.control))
    file = place.files / "questions.jsonl"
    write_text(file, QUESTIONS)  # atomically: each rank writes it, and reads it while another does
    metrics = ["exact_match"]
    for name in place.fault.spoil:
        metrics = SPOILS[name](place, metrics)
    watch_snapshots(place)
    friendly(run)(place, file, metrics)


def run(place: Place, file: Path, metrics: list[str]) -> None:
    from transformers import Trainer, default_data_collator
    from trl import ModelConfig

    import hf_dsvllm.engine_size
    import hf_dsvllm.session
    from hf_dsvllm import DsvllmTrainingArguments, prepare

    fault = place.fault
    if fault.adapter:
        hf_dsvllm.engine_size.why_merge_for_engine = lambda *_: None  # as on a GPU: vLLM loads the adapter itself
    # The stand-in computes no log-probabilities; its answers tell which weights gave them, which the tests compare.
    hf_dsvllm.session.canary_of = lambda *_, **__: None
    args = DsvllmTrainingArguments(
        output_dir=str(place.run), ds_preset="lora" if fault.adapter else "ddp" if fault.ranks > 1 else "none",
        max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, export_to="none", use_cpu=True, gen_eval_file=[str(file)],
        gen_eval_metrics=metrics, gen_eval_steps=1, gen_eval_max_new_tokens=8, gen_eval_timeout=fault.timeout_s,
        vllm_python=str(interpreter(place)),
    )  # fmt: skip
    session = prepare(args, ModelConfig(model_name_or_path=str(place.model), lora_r=4))
    rows = [{"input_ids": [4 + (n + k) % 90 for k in range(16)]} for n in range(16)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    trainer = Trainer(model=session.load_model(), args=args, train_dataset=rows, data_collator=default_data_collator,
                      processing_class=tokenizer(place))  # fmt: skip
    session.attach(trainer)
    trainer.add_callback(steps(place))
    trainer.train()
    if trainer.state.global_step == STEPS and os.environ.get("RANK", "0") == "0":
        (place.files / "trained").touch()


def steps(place: Place) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            at(place, f"step.{state.global_step}")

    return Steps()


def at(place: Place, point: str) -> None:
    """Tell that this point is reached, and wait if told to; the first rank only."""
    if os.environ.get("RANK", "0") != "0":
        return
    (place.control / point).touch()
    if (place.control / f"hold.{point}").exists():
        while not (place.control / f"go.{point}").exists():
            time.sleep(POLL_S)


def interpreter(place: Place) -> Path:
    """What --vllm_python names: it has vLLM, says the probe, and starts the fake in its place."""
    script = place.files / "python"
    if not script.exists():
        draft = script.with_suffix(f".{os.getpid()}")  # the other rank may be here as well
        draft.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nshift\nexec "{sys.executable}" -I -S "{FAKE}" "$@"\n')
        draft.chmod(0o755)
        draft.replace(script)
    return script


def tokenizer(place: Place) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place.model)


def watch_snapshots(place: Place) -> None:
    """Note which answer the weights of each step give, and stop at publish.N with the snapshot half-way there."""
    import hf_dsvllm.callback
    import hf_dsvllm.live.snapshot

    publish, atomic_folder = hf_dsvllm.callback.publish, hf_dsvllm.live.snapshot.atomic_folder
    decode = tokenizer(place).decode
    expected = {0: answer(place.model, decode)}
    written = []

    @contextlib.contextmanager
    def watched(target: Path, **how: Any) -> Iterator[Path]:
        with atomic_folder(target, **how) as folder:
            yield folder
            at(place, f"publish.{len(written)}")
            written.append(target)

    def noted(*args: Any, **kwargs: Any) -> Any:
        snapshot = publish(*args, **kwargs)
        if os.environ.get("RANK", "0") == "0":
            expected[snapshot.step] = answer(snapshot.path, decode)
            (place.files / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
            if "cut_snapshot_2" in place.fault.spoil and snapshot.step == 2:
                os.truncate(weights_file(snapshot.path), 2000)
        return snapshot

    hf_dsvllm.live.snapshot.atomic_folder = watched
    hf_dsvllm.callback.publish = noted


def answer(folder: Path, decode: Any) -> str:
    """What the fake engine answers with the weights in a folder, as the training tokenizer reads it."""
    text = hashlib.sha256(weights_file(folder).read_bytes()).hexdigest()[:8]
    return str(decode([4 + byte for byte in text.encode()], skip_special_tokens=True))


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*model.safetensors")
    return file


# -- what is wrong from the start: each changes the world or the metrics, and returns the metrics


def without_vllm(place: Place, metrics: list[str]) -> list[str]:
    script = place.files / "python"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    return metrics


def cut_snapshot_2(place: Place, metrics: list[str]) -> list[str]:
    return metrics  # see watch_snapshots


def small_disk(place: Place, metrics: list[str]) -> list[str]:
    return metrics  # mounted, where that is allowed, before this process began


def unwritable_temporary_folders(place: Place, metrics: list[str]) -> list[str]:
    """For root every folder is writable, so the call is refused."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    tempfile.mkdtemp = refused
    return metrics


def break_file(place: Place, metrics: list[str]) -> list[str]:
    lines = QUESTIONS.splitlines()
    (place.files / "questions.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2]]), encoding="utf-8")
    return metrics


def raising_metric(place: Place, metrics: list[str]) -> list[str]:
    (place.files / "metric.py").write_text(METRIC, encoding="utf-8")
    return [f"{place.files / 'metric.py'}:broken"]


def hanging_judge(place: Place, metrics: list[str]) -> list[str]:
    from hf_dsvllm.metrics import judge

    judge.REQUEST_S, judge.PAUSES_S = 0.2, (0.0, 0.0)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    port = listener.getsockname()[1]
    listener.detach()  # open for good, and never accepted from
    return [*metrics, f"judge:http://127.0.0.1:{port}/v1?model=m"]


SPOILS = {
    function.__name__: function
    for function in (without_vllm, cut_snapshot_2, small_disk, unwritable_temporary_folders, break_file,
                     raising_metric, hanging_judge)
}  # fmt: skip
