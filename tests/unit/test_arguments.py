"""`with_presets`: the arguments parse, copy, pickle and refuse like any TrainingArguments, with the presets on top."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from transformers import HfArgumentParser, TrainingArguments

from hf_dsvllm import DsvllmSFTConfig, DsvllmTrainingArguments, arguments, preflight, with_presets
from hf_dsvllm.ds_config import RunShape, build
from hf_dsvllm.fields import added_fields
from hf_dsvllm.presets import get_preset
from hf_dsvllm.session import Session
from tests.door import enter, leave, problems_of, sound

CLASSES = (
    TrainingArguments,
    *(getattr(trl, name) for name in ("SFTConfig", "DPOConfig", "RewardConfig", "GRPOConfig", "KTOConfig")
      if hasattr(trl, name)),
)  # fmt: skip
ZERO2_ON_CPU = build(get_preset("zero2"), RunShape(device="cpu"))


@pytest.fixture(autouse=True)
def _left_behind() -> Iterator[None]:
    yield
    leave()


# -- the class


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_of_arguments_can_have_presets(cls: type, tmp_path: Path) -> None:
    args = enter(tmp_path, cls, ds_preset="zero2", learning_rate=1e-3)
    assert isinstance(args, cls)
    assert args.deepspeed == ZERO2_ON_CPU
    assert args.learning_rate == 1e-3
    assert set(added_fields()) <= {field.name for field in dataclasses.fields(args)}


@pytest.mark.parametrize("cls", CLASSES)
def test_the_extended_class_is_the_same_each_time(cls: type) -> None:
    extended = with_presets(cls)
    assert with_presets(cls) is extended
    assert with_presets(extended) is extended
    assert extended.__name__ == f"Dsvllm{cls.__name__}"


def test_the_ready_made_classes_are_the_extended_ones() -> None:
    assert DsvllmTrainingArguments is with_presets(TrainingArguments)
    assert DsvllmSFTConfig is with_presets(trl.SFTConfig)
    with pytest.raises(AttributeError, match="no attribute 'DsvllmNothing'"):
        _ = arguments.DsvllmNothing


def test_only_training_arguments_can_have_presets() -> None:
    with pytest.raises(TypeError, match="ModelConfig is not a TrainingArguments class"):
        with_presets(trl.ModelConfig)


def test_a_class_that_uses_one_of_the_names_is_refused() -> None:
    @dataclasses.dataclass
    class Own(TrainingArguments):
        vllm_args: str = ""

    with pytest.raises(TypeError, match=r"Own has fields named \['vllm_args'\] of its own"):
        with_presets(Own)


@pytest.mark.parametrize("cls", CLASSES)
def test_without_a_preset_nothing_changes(cls: type, tmp_path: Path) -> None:
    ours = enter(tmp_path, cls, use_cpu=True, bf16=False).to_dict()
    theirs = cls(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True, bf16=False).to_dict()
    assert {name: value for name, value in ours.items() if name not in added_fields()} == theirs


# -- the ways arguments are given


@pytest.mark.parametrize("cls", CLASSES)
def test_the_command_line_is_read_by_the_trainers_parser(cls: type, tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--report_to", "none", "--ds_preset", "zero2", "--gen_eval_temperature", "1"]
    (args,) = HfArgumentParser(with_presets(cls)).parse_args_into_dataclasses(line)
    assert args.ds_preset == "zero2"
    assert args.gen_eval_temperature == 1.0
    assert args.gen_eval_on_start is True
    assert args.deepspeed == ZERO2_ON_CPU


def test_lists_and_switches_are_read(tmp_path: Path) -> None:
    from hf_dsvllm.fields import PresetFields

    line = ["--gen_eval_file", "a.jsonl", "b.jsonl", "--gen_eval_metrics", "contains", "--gen_eval_on_start", "false"]
    (fields,) = HfArgumentParser(PresetFields).parse_args_into_dataclasses(line)
    assert fields.gen_eval_file == ["a.jsonl", "b.jsonl"]
    assert fields.gen_eval_metrics == ["contains"]
    assert fields.gen_eval_on_start is False


def test_the_help_shows_our_flags_beside_the_trainers() -> None:
    text = HfArgumentParser(with_presets(TrainingArguments)).format_help()
    assert [name for name in (*added_fields(), "learning_rate") if f"--{name}" not in text] == []


def test_trls_parser_reads_the_command_line_a_yaml_file_and_its_environment(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/run\nreport_to: none\nds_preset: zero2\ngen_eval_temperature: 0.5\n"
        "env:\n  DSVLLM_TEST_VARIABLE: from-yaml\n",
        encoding="utf-8",
    )
    parser = trl.TrlParser((trl.ScriptArguments, with_presets(trl.SFTConfig), trl.ModelConfig))
    line = ["--config", str(config), "--dataset_name", "d", "--ds_preset", "zero3", "--lora_r", "8"]
    script, args, model = parser.parse_args_and_config(line)
    assert (script.dataset_name, model.lora_r) == ("d", 8)
    assert args.ds_preset == "zero3", "the command line wins over the file"
    assert args.gen_eval_temperature == 0.5
    assert args.deepspeed["zero_optimization"]["stage"] == 3
    assert os.environ["DSVLLM_TEST_VARIABLE"] == "from-yaml"


# -- copies


@pytest.mark.parametrize("cls", [TrainingArguments, trl.SFTConfig])
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, dataclasses.replace, lambda args: type(args)(**args.to_dict())],
    ids=["copy", "deepcopy", "replace", "to_dict"],
)
@pytest.mark.parametrize("preset", ["zero2", "zero3_offload", "lora"])
def test_a_copy_has_the_same_preset_and_configuration(duplicate: Any, cls: type, preset: str, tmp_path: Path) -> None:
    args = enter(tmp_path, cls, ds_preset=preset)
    again = duplicate(args)
    assert type(again) is type(args)
    assert again is not args
    for name in ("ds_preset", "deepspeed", "optim", "bf16", "use_cpu"):
        assert getattr(again, name) == getattr(args, name), name


def test_a_copy_with_a_change_keeps_the_rest(tmp_path: Path) -> None:
    again = dataclasses.replace(enter(tmp_path, ds_preset="zero2"), learning_rate=0.5)
    assert (again.learning_rate, again.ds_preset, again.deepspeed) == (0.5, "zero2", ZERO2_ON_CPU)


def test_saved_arguments_load_in_a_fresh_process(tmp_path: Path) -> None:
    for index, cls in enumerate((TrainingArguments, trl.SFTConfig)):
        torch.save(enter(tmp_path, cls, ds_preset="zero2", seed=17 + index), tmp_path / f"{index}.bin")
    code = (
        "import sys, torch\n"
        "for path in sys.argv[1:]:\n"
        "    a = torch.load(path, weights_only=False)\n"
        "    print(type(a).__mro__[0].__name__, a.ds_preset, a.seed, a.deepspeed['zero_optimization']['stage'])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "0.bin"), str(tmp_path / "1.bin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-2:]
    assert lines == ["DsvllmTrainingArguments zero2 17 2", "DsvllmSFTConfig zero2 18 2"]


@dataclasses.dataclass
class OwnConfig(DsvllmTrainingArguments):  # type: ignore[misc, valid-type]
    """A user's class on top of ours."""

    flavour: str = "plain"


def test_a_users_subclass_stays_itself_when_copied_and_parsed(tmp_path: Path) -> None:
    args = OwnConfig(output_dir=str(tmp_path), report_to=[], ds_preset="zero2", flavour="vanilla")
    again = copy.deepcopy(args)
    assert type(again) is OwnConfig
    assert (again.flavour, again.ds_preset) == ("vanilla", "zero2")
    (parsed,) = HfArgumentParser(OwnConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert parsed.flavour == "plain"


def test_saving_writes_nothing_but_plain_values_to_json(tmp_path: Path) -> None:
    assert json.loads(enter(tmp_path, ds_preset="zero2").to_json_string())["ds_preset"] == "zero2"
    torch.save(enter(tmp_path, ds_preset="zero2"), io.BytesIO())


@dataclasses.dataclass
class FourGpus(TrainingArguments):
    """What transformers finds on a host of four GPUs without a launcher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 4


@pytest.mark.parametrize(("preset", "more"), [("lora", ""), ("qlora", ""), ("none", " --ds_preset ddp")])
def test_one_process_trains_on_one_gpu_and_says_what_would_use_all(
    preset: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = enter(tmp_path, FourGpus, ds_preset=preset, per_device_train_batch_size=2)
    assert (args.n_gpu, args.train_batch_size) == (1, 2)
    assert f"torchrun --nproc_per_node 4 SCRIPT …{more}" in capsys.readouterr().err
    assert enter(tmp_path, FourGpus).n_gpu == 4, "without a preset nothing changes"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs, all visible."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("given", "processes", "kept"),
    [
        *(({"ds_preset": name}, 1, True) for name in ("none", "ddp", "lora", "qlora")),
        ({"ds_preset": "lora"}, 2, False),
        ({"ds_preset": "lora", "use_cpu": True}, 1, False),
        ({"ds_preset": "zero2", "deepspeed": {"bf16": {}}}, 1, False),
        ({"ds_preset": None}, 1, False),
    ],
)
def test_one_process_loads_its_model_on_its_one_gpu(
    given: dict[str, Any], processes: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processes > 1:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    args: Any = SimpleNamespace(**{"deepspeed": None, "use_cpu": False} | given)
    settings = SimpleNamespace(dtype="bfloat16", model_revision="main", attn_implementation=None)
    session: Any = SimpleNamespace(args=args, model_args=settings)
    assert arguments.on_one_gpu(args) == ({"device_map": {"": 0}} if kept else {})
    assert ("device_map" in Session.model_init_kwargs(session)) == kept


@pytest.mark.parametrize("preset", ["zero2", "lora"])
def test_a_second_run_in_a_process_is_not_taken_for_one_of_accelerates_launcher(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate leaves the variable behind a run with DeepSpeed; a LoRA run would be ZeRO-2 by it."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args = enter(tmp_path, ds_preset=preset)
    assert (args.deepspeed_plugin is not None) == (preset == "zero2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "zero_stage")
    (problem,) = problems_of(tmp_path, ds_preset="zero2")
    assert "accelerate launch brings a DeepSpeed configuration of its own" in problem.what


# -- a preset and a configuration of one's own


@pytest.mark.parametrize("given", ["file", "text", "dictionary"])
def test_two_deepspeed_configurations_are_one_clear_error(given: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(sound()), encoding="utf-8")
    forms = {"file": str(file), "text": json.dumps(sound()), "dictionary": sound()}
    (problem,) = problems_of(tmp_path, deepspeed=forms[given], ds_preset="zero3")
    assert "--deepspeed and --ds_preset zero3 both bring a DeepSpeed configuration" in problem.what
    assert "hf-dsvllm presets show" in problem.fix


@pytest.mark.parametrize("preset", [None, "lora", "qlora"])
@pytest.mark.parametrize("given", ["file", "path object", "text", "base64"])
def test_ones_own_configuration_wins_beside_a_preset_that_brings_none(
    given: str, preset: str | None, tmp_path: Path
) -> None:
    import base64

    file = tmp_path / "ds.json"
    text = json.dumps(sound(zero_optimization={"stage": 1}))
    file.write_text(text, encoding="utf-8")
    coded = base64.urlsafe_b64encode(text.encode()).decode()
    forms = {"file": str(file), "path object": file, "text": text, "base64": coded}
    args = enter(tmp_path, deepspeed=forms[given], ds_preset=preset)
    assert args.deepspeed["zero_optimization"] == {"stage": 1}
    assert args.hf_deepspeed_config.is_zero2() is False


@pytest.mark.parametrize(
    ("text", "what"),
    [("{", "Expecting property name"), ('{"a": }', "line 1"), ("[1]", "holds a list, not an object")],
)
def test_a_file_that_is_no_json_object_is_named_with_its_line(text: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text, encoding="utf-8")
    (problem,) = problems_of(tmp_path, deepspeed=str(file))
    assert str(file) in problem.what
    assert what in problem.what


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, deepspeed=str(tmp_path / "absent.json"))
    assert "no such file" in problem.what


# -- what a preset changes and says


def test_an_unknown_preset_is_one_problem_with_the_nearest_names(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, ds_preset="zero3_ofload")
    assert "did you mean zero3_offload" in problem.what


@pytest.mark.parametrize(("preset", "says"), [("zero2", True), ("zero1", True), ("lora_zero2", True),
                                              ("zero2_offload", False), ("zero3", False), ("lora", False)])  # fmt: skip
def test_sharding_on_one_process_says_that_it_shards_nothing_and_what_would_help(
    preset: str, says: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, ds_preset=preset)
    text = capsys.readouterr().err
    assert ("shards nothing" in text) == says
    assert ("What would help: more GPUs, qlora" in text) == says


def test_an_experimental_preset_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enter(tmp_path, ds_preset="zero2_lowmem")
    assert "preset zero2_lowmem is experimental" in capsys.readouterr().err


def test_only_the_main_process_says_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    for name in added_fields():
        setattr(args, name, None)
    args.ds_preset = "lora"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments._before(args)
    assert capsys.readouterr().err == ""


def test_an_argument_the_user_set_is_kept(tmp_path: Path) -> None:
    assert enter(tmp_path, ds_preset="ddp").ddp_find_unused_parameters is False
    assert enter(tmp_path, ds_preset="ddp", ddp_find_unused_parameters=True).ddp_find_unused_parameters is True


def test_offload_takes_the_optimizer_it_will_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight._plain(enter(tmp_path, ds_preset="zero2_offload").optim) == "adamw_torch"
    assert "optim: adamw_torch_fused → adamw_torch" in capsys.readouterr().err


@pytest.mark.parametrize(("threads", "says"), [("1", True), ("8", False), (None, False)])
def test_an_offloaded_optimizer_on_one_thread_is_pointed_out(
    threads: str | None, says: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_dsvllm.arguments.usable_cpus", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    enter(tmp_path, ds_preset="zero2_offload")
    assert ("Start with OMP_NUM_THREADS=16" in capsys.readouterr().err) == says


@pytest.mark.parametrize(
    ("cls", "given", "device", "bf16"),
    [
        (TrainingArguments, {}, "cuda", True),
        (TrainingArguments, {"fp16": True}, "cuda", False),
        (trl.SFTConfig, {}, "cuda", True),
        (trl.SFTConfig, {"bf16": False}, "cuda", False),
        (TrainingArguments, {"bf16": True}, "cpu", False),
        (trl.SFTConfig, {}, "cpu", False),
    ],
)
def test_presets_train_in_bf16_on_gpus_and_in_float32_on_cpus(
    cls: type, given: dict[str, bool], device: str, bf16: bool
) -> None:
    args = object.__new__(cls)
    for field in dataclasses.fields(cls):
        setattr(args, field.name, field.default)
    for name, value in given.items():
        setattr(args, name, value)
    arguments._precision(args, get_preset("zero2"), None, device)
    assert bool(args.bf16) == bf16


def test_ones_own_configuration_decides_its_precision(tmp_path: Path) -> None:
    args = enter(tmp_path, deepspeed=sound(bf16={"enabled": True}), bf16=True)
    assert args.bf16 is True
    args = enter(tmp_path, trl.SFTConfig, deepspeed=sound())
    assert args.bf16 is False, "TRL's default of bf16 is left to GPUs"
