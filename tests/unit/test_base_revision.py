"""A base that is trained on from another revision than the main one is that one everywhere: engine, record, export."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig, SFTTrainer

from hf_dsvllm import adapters, engine_start
from hf_dsvllm.engine import command
from hf_dsvllm.engine_size import EngineSize
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.fingerprint import fingerprint
from hf_dsvllm.export.job import Job, open_job
from hf_dsvllm.export.source import base_commit, find_source, local_base
from hf_dsvllm.placement import Place
from hf_dsvllm.run.command import AdapterOptions, Command
from hf_dsvllm.run.state import Run
from hf_dsvllm.run.target import Target
from hf_dsvllm.serve.plan import plan_servers
from hf_dsvllm.session import Session
from tests.door import enter, leave
from tests.export_runs import write_run
from tests.tiny import write_tiny_model

NAME = "me/tiny"
MAIN, STEP = "a" * 40, "b" * 40
SPARE = Place(kind="spare", reason="a test", gpus=("0",))
SIZE = EngineSize(
    max_model_len=64, kv_cache_bytes=1 << 30, usual_cache_bytes=1 << 30, merge_adapters=False, compiled=False, reason=""
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with two revisions of one model: `main` and `step1000`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--me--tiny"
    (folder / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate({"main": MAIN, "step1000": STEP}.items()):
        (folder / "refs" / name).write_text(commit)
        write_tiny_model(folder / "snapshots" / commit, seed=seed, dtype="bfloat16")
    return folder / "snapshots"


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Path:
    """A run with one adapter trained on `step1000`, its record as of old: the name alone, the dtype as it was asked."""
    folder = write_run(tmp_path / "run", cache / STEP)
    config = folder / "snapshots" / "step-4" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": NAME}))
    record(folder, base_model=NAME)
    return folder


def record(run: Path, **changes: Any) -> None:
    file = run / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def opened(run: Path, base: str | None = None) -> Job:
    with contextlib.ExitStack() as stack:
        return open_job(find_source(run, "latest"), torch.bfloat16, base, stack)


def test_a_base_is_found_at_its_revision(cache: Path) -> None:
    assert local_base(NAME) == cache / MAIN
    assert local_base(NAME, "step1000") == local_base(NAME, STEP) == cache / STEP
    with pytest.raises(ExportError, match=r"'me/tiny' at revision 'step7' is neither"):
        local_base(NAME, "step7")
    assert local_base(str(cache / MAIN), "step1000") == cache / MAIN, "a folder has no revisions"


def test_a_revision_is_recorded_as_the_commit_that_it_is_now(cache: Path) -> None:
    assert [base_commit(NAME, revision) for revision in (None, "main", "step1000", STEP)] == [MAIN, MAIN, STEP, STEP]
    assert base_commit("me/elsewhere", "v1") == base_commit("no/name/at/all", "v1") == "v1"
    assert base_commit(str(cache / MAIN), "main") is None


def test_an_export_merges_into_the_revision_that_was_trained_on(run: Path, cache: Path) -> None:
    assert opened(run).base == cache / MAIN, "old records have no other revision"
    record(run, base_revision=STEP, base_fingerprint=fingerprint(cache / STEP))
    assert opened(run).base == opened(run, NAME).base == cache / STEP
    with pytest.raises(ExportError, match="is not the base that"):
        opened(run, str(cache / MAIN))


def test_a_bare_adapter_that_names_its_revision_is_merged_into_that(run: Path, cache: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(run / "snapshots" / "step-4", tmp_path / "elsewhere" / "one" / "adapter")
    assert opened(bare).base == cache / MAIN
    config = bare / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": "step1000"}))
    assert opened(bare).base == cache / STEP


def model_args(**more: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path=NAME, model_revision="step1000", use_peft=True, **more)


def begin(run: Path, cache: Path, **more: Any) -> dict[str, Any]:
    """The record that a run writes when training begins."""
    model = AutoModelForCausalLM.from_pretrained(cache / STEP)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = SimpleNamespace(
        model=get_peft_model(model, settings),
        train_dataset=None,
        state=SimpleNamespace(global_step=1),
        processing_class=None,
    )
    session: Any = SimpleNamespace(
        run_dir=run,
        model_args=model_args(**more),
        args=SimpleNamespace(ds_preset="lora"),
        device="cpu",
        forecast=None,
        ds_config=None,
        _predicted_gib=lambda: None,
    )
    wiring: Any = SimpleNamespace(world_size=1, zero_stage=0, trainable_parameters=1)
    Session.start_record(session, trainer, wiring)
    return dict(json.loads((run / "run.json").read_text()))


def test_a_run_records_revision_and_dtype_so_that_its_export_finds_them(run: Path, cache: Path) -> None:
    written = begin(run, cache, dtype="auto")
    assert (written["base_model"], written["base_revision"]) == (NAME, STEP)
    assert written["base_fingerprint"] == fingerprint(cache / STEP) != fingerprint(cache / MAIN)
    assert written["dtype"] == "bfloat16"
    assert (opened(run).base, opened(run).base_dtype) == (cache / STEP, torch.bfloat16)


@pytest.mark.parametrize("where", ["dtype", "torch_dtype", "nowhere"])
def test_an_automatic_dtype_in_an_old_record_is_the_bases_own(run: Path, cache: Path, where: str) -> None:
    config = cache / MAIN / "config.json"
    settings = json.loads(config.read_text())
    settings.pop("dtype")
    config.write_text(json.dumps(settings | ({} if where == "nowhere" else {where: "float16"})))
    record(run, dtype="auto")
    assert opened(run).base_dtype == (torch.bfloat16 if where == "nowhere" else torch.float16)


def test_adapters_carry_the_revision_of_their_base() -> None:
    assert adapters.peft_config_of(model_args()).revision == "step1000"
    assert adapters.peft_config_of(ModelConfig(model_name_or_path=NAME, use_peft=True)).revision is None
    assert adapters.peft_config_of(ModelConfig(model_name_or_path=NAME)) is None


def test_the_engine_starts_from_the_revision(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_start, "find_vllm", lambda python: Path("/venv/bin/python"))
    args: Any = SimpleNamespace(
        gen_eval_tensor_parallel=1,
        gen_eval_data_parallel=1,
        vllm_python=None,
        vllm_args=None,
        fp16=False,
        seed=0,
    )
    monkeypatch.setattr(engine_start, "tensor_parallel_size", lambda *_: 1)
    spec = engine_start.engine_spec(NAME, SPARE, SIZE, args, model_args())
    line = command(spec, Path("/run/api.sock"))
    assert line[line.index("--revision") + 1] == line[line.index("--tokenizer-revision") + 1] == "step1000"
    # Restarted on a snapshot without tokenizer: the folder has no revision, the first model's tokenizer has.
    (tmp_path / "step-4").mkdir()
    later = command(dataclasses.replace(spec, model=tmp_path / "step-4", tokenizer=NAME), Path("/run/api.sock"))
    assert "--revision" not in later
    assert later[later.index("--tokenizer-revision") + 1] == "step1000"
    folder = engine_start.engine_spec(cache / MAIN, SPARE, SIZE, args, model_args())
    assert not {"--revision", "--tokenizer-revision"} & set(command(folder, Path("/run/api.sock")))


def test_an_adapter_is_served_on_the_revision_of_its_run(run: Path) -> None:
    snapshot = run / "snapshots" / "step-4"
    (server,) = plan_servers([snapshot])
    assert "--revision" not in server.model_arguments()
    record(run, base_revision=STEP)
    (server,) = plan_servers([snapshot])
    line = server.model_arguments()
    assert (line[line.index("--model") + 1], line[line.index("--revision") + 1]) == (NAME, STEP)
    shutil.rmtree(run / "tokenizer")
    for file in snapshot.glob("tokenizer*"):
        file.unlink()
    (server,) = plan_servers([snapshot])
    line = server.model_arguments()
    assert line[line.index("--tokenizer-revision") + 1] == STEP


def test_the_revision_that_trls_trainer_loads_is_the_runs_too(tmp_path: Path) -> None:
    target = Target(name="x", path=None, file=None)
    run = Run(Command(target=target, script_args=(), given={}, adapter=AdapterOptions(), words=()))
    run.use(enter(tmp_path, SFTConfig, use_cpu=True, bf16=False, model_init_kwargs={"revision": "step1000"}))
    run.settle_model(NAME, SFTTrainer)
    assert run.model_args.model_revision == "step1000"
    leave()
