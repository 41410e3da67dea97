"""The `hf-dsvllm` command as it is typed: results on stdout, explanations on stderr, our errors with exit code 2."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_dsvllm
from hf_dsvllm.cli import main
from hf_dsvllm.cli_models import parse_size
from hf_dsvllm.ds_config import RunShape, build
from hf_dsvllm.errors import ExportError
from hf_dsvllm.presets import available_presets, get_preset
from tests.tiny import write_tiny_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("presets", "show", "zero2")` gives exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-dsvllm", *words])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"hf-dsvllm {hf_dsvllm.__version__}\n", "")


def test_the_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert [name for name in ("presets", "export", "serve", "doctor") if name not in out] == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("preset",), "Did you mean 'presets'"),
        (("presets", "shw"), "Did you mean 'show'"),
        (("presets", "--jsn"), "--json"),
        (("export", "run"), "--out"),
        (("presets", "show", "zero2", "--num_processes", "0"), "'--num_processes'"),
    ],
)
def test_a_slip_of_the_keyboard_is_answered_without_a_traceback(words: tuple[str, ...], hint: str, run: Run) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert hint in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [("presets", "show"), ("export",), ("serve",), ("doctor",)])
def test_options_are_written_with_underscores_as_in_the_trainers_world(command: tuple[str, ...], run: Run) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert re.findall(r"--[a-z]+-[a-z-]+", out) == []


# -- presets


def test_presets_are_listed_with_all_that_decides_between_them(run: Run) -> None:
    code, out, err = run("presets")
    assert code == 0
    assert [preset.name for preset in available_presets() if preset.name not in out] == []
    assert [heading for heading in ("shards", "where it lives", "constraints") if heading not in out] == []
    assert "experimental" in out
    assert "zero3+lora" in err


def test_presets_are_listed_for_programs(run: Run) -> None:
    _, out, err = run("presets", "--json")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == [preset.name for preset in available_presets()]
    assert set(rows[0]) >= {"name", "summary", "shards", "lives", "constraints", "experimental"}
    assert err == ""


@pytest.mark.parametrize("name", [p.name for p in available_presets()] + ["zero3+lora"])
def test_a_preset_is_shown_as_the_exact_json(name: str, run: Run, tmp_path: Path) -> None:
    processes = max(2, get_preset(name).min_processes)
    code, out, err = run("presets", "show", name, "--num_processes", str(processes), "--nvme_path", str(tmp_path))
    shape = RunShape(world_size=processes, gpus_per_node=processes, device="cuda", nvme_path=tmp_path)
    assert code == 0
    assert json.loads(out) == build(get_preset(name), shape)
    missing = [
        setting.key
        for setting in (*get_preset(name).deepspeed, *get_preset(name).arguments)
        if setting.key not in err or setting.why not in err
    ]
    assert missing == []
    assert ("--use_peft" in err) == (get_preset(name).adapter is not None)


def test_every_value_of_the_json_is_shown_with_its_reason(run: Run, tmp_path: Path) -> None:
    _, out, err = run("presets", "show", "zero3_nvme", "--num_processes", "2", "--nvme_path", str(tmp_path))
    assert json.loads(out)["zero_optimization"]["offload_param"]["buffer_count"] == 5
    for line in ('zero_optimization.offload_param.device = "nvme": ', 'bf16.enabled = "auto": as --bf16 says',
                 'train_batch_size = "auto": ', "offload_optimizer.pin_memory = true: "):  # fmt: skip
        assert line in err


def test_dashes_are_as_good_as_underscores(run: Run, tmp_path: Path) -> None:
    with_underscores = run("presets", "show", "zero3_nvme", "--num_processes", "4", "--nvme_path", str(tmp_path))
    with_dashes = run("presets", "show", "zero3-nvme", "--num-processes", "4", "--nvme-path", str(tmp_path))
    assert with_dashes == with_underscores


def test_a_preset_for_a_cpu_is_another_json(run: Run) -> None:
    _, out, err = run("presets", "show", "zero3_offload", "--cpu")
    zero = json.loads(out)["zero_optimization"]
    assert zero["overlap_comm"] is False
    assert zero["offload_optimizer"]["pin_memory"] is False
    assert "--bf16 false" in err


def test_a_preset_without_deepspeed_is_null_and_says_so(run: Run) -> None:
    code, out, err = run("presets", "show", "qlora")
    assert (code, json.loads(out)) == (0, None)
    assert "no DeepSpeed" in err
    assert "--load_in_4bit --use_bnb_nested_quant --bnb_4bit_quant_storage uint8" in err


def test_sequence_parallelism_is_shown_as_python_needs_it(run: Run) -> None:
    _, _, err = run("presets", "show", "long_context", "--num_processes", "4")
    assert 'ParallelismConfig(sp_size=4, sp_backend="deepspeed", dp_replicate_size=1)' in err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("zero3_ofload",), "did you mean zero3_offload"),
        (("zero3_nvme",), "--nvme_path FOLDER"),
        (("long_context", "--num_processes", "1"), "--num_processes 2"),
        (("zero3_offload+qlora",), "zero3_offload_optimizer+qlora"),
    ],
)
def test_a_preset_that_cannot_be_shown_is_one_error_with_its_fix(words: tuple[str, ...], hint: str, run: Run) -> None:
    code, out, err = run("presets", "show", *words)
    assert (code, out) == (2, "")
    assert "hf-dsvllm: error:" in err
    assert hint in err
    assert "Traceback" not in err


# -- export


def test_a_model_is_exported_and_its_folder_printed(run: Run, tmp_path: Path) -> None:
    source, out_folder = write_tiny_model(tmp_path / "checkpoint"), tmp_path / "export"
    code, out, err = run(
        "export", str(source), "--out", str(out_folder), "--dtype", "float32", "--max-shard-size", "1MB"
    )
    assert code == 0, err
    assert out.splitlines()[-1] == str(out_folder), "DeepSpeed may greet on stdout before"
    assert (out_folder / "config.json").is_file()
    assert "written:" in err
    assert "hf-dsvllm serve" in err
    code, _, err = run("export", str(source), "--out", str(out_folder), "--dtype", "float32", "--max_shard_size", "1MB")
    assert code == 0
    assert "already there:" in err


def test_an_export_of_nothing_is_one_error(run: Run, tmp_path: Path) -> None:
    code, out, err = run("export", str(tmp_path / "absent"), "--out", str(tmp_path / "export"))
    assert (code, out) == (2, "")
    assert "hf-dsvllm: error:" in err
    assert not (tmp_path / "export").exists()


def test_only_the_three_kinds_of_weights_can_be_named(run: Run, tmp_path: Path) -> None:
    code, _, err = run("export", str(tmp_path), "--out", str(tmp_path / "x"), "--which", "newest")
    assert code == 2
    assert "best" in err
    assert "latest" in err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("1.5 gib", 1_610_612_736), ("200", 200), ("7mb", 7_000_000)]
)
def test_sizes_are_read_as_save_pretrained_reads_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "5 G B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match="write it like 5GB"):
        parse_size(text)


# -- serve


def test_the_command_line_of_vllm_is_printed_with_ones_own_arguments(run: Run, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "export")
    words = ("--port", "8123", "--name", "mine", "--max-model-len", "512", "--vllm_python", "/env/bin/python")
    code, out, err = run("serve", str(folder), *words, "--print", "--", "--gpu-memory-utilization", "0.5")
    assert code == 0, err
    assert f"/env/bin/python -m vllm.entrypoints.openai.api_server --model {folder}" in out
    assert "--port 8123" in out
    assert "--served-model-name mine" in out
    assert "--max-model-len 512" in out
    assert out.rstrip().endswith("--gpu-memory-utilization 0.5")


def test_serving_what_is_no_model_is_one_error(run: Run, tmp_path: Path) -> None:
    code, _, err = run("serve", str(tmp_path / "absent"), "--print")
    assert code == 2
    assert "is no folder" in err


def test_the_exit_code_of_the_server_is_ours(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dsvllm.serve.command.serve", lambda path, **options: 3)
    assert run("serve", str(tmp_path))[0] == 3


# -- run


@pytest.mark.parametrize(
    ("flag", "fix"), [("--ds_preset=zero2", "after the script"), ("--num_proceses=2", "did you mean --num_processes?")]
)
def test_flags_in_front_of_the_script_are_told_their_place(run: Run, tmp_path: Path, flag: str, fix: str) -> None:
    script = tmp_path / "train.py"
    script.write_text("from transformers import TrainingArguments\n", encoding="utf-8")
    code, _, err = run("run", flag, str(script))
    assert code == 2
    assert fix in err


# -- doctor


def registered(engine_id: str, *, host: str, owner: tuple[int, str | None]) -> Path:
    """A record as the supervisor writes it, of an engine whose processes are gone."""
    from hf_dsvllm.engine.registry import record_path

    gone = {"pid": 2**22 + 1, "birth": "1"}
    record = {"engine_id": engine_id, "host": host, "owner": dict(zip(("pid", "birth"), owner, strict=True))}
    file = record_path(engine_id)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = record | {"supervisor": gone, "engine": gone, "run_dir": None, "command": []}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.fixture
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dsvllm import run_folder

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(run_folder, "socket_bases", tuple)


@pytest.mark.usefixtures("own_registry")
def test_the_doctor_names_versions_machine_and_tools(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    subjects = ("torch", "transformers", "deepspeed", "machine", "cpu", "vllm", "C++ compiler", "libaio")
    assert [subject for subject in subjects if subject not in out] == []
    assert "no engine is on record" in out


@pytest.mark.usefixtures("own_registry")
def test_the_doctor_says_how_to_install_a_vllm_that_is_not_there(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--vllm_python", str(tmp_path / "python"))
    assert code == 0
    assert "cannot be run" in out


@pytest.mark.usefixtures("own_registry")
def test_the_doctor_shows_what_was_left_behind_and_ends_it_when_asked(run: Run) -> None:
    here = registered("a" * 16, host=os.uname().nodename, owner=(2**22 + 2, "1"))
    elsewhere = registered("b" * 16, host="another-host", owner=(1, "1"))
    _, out, err = run("doctor")
    assert f"engine {'a' * 16}: gone" in out
    assert f"engine {'b' * 16}: elsewhere on another-host" in out
    assert "no run left files behind" in out
    assert "doctor --reap" in err
    assert here.exists()
    code, out, _ = run("doctor", "--reap")
    assert code == 0
    assert f"engine {'a' * 16}: nothing was left; forgotten" in out
    assert not here.exists()
    assert elsewhere.exists()
    assert "nothing to end" in run("doctor", "--reap")[1]


@pytest.mark.parametrize(
    ("forbidden", "there", "noted"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_imports_that_every_process_compiles_anew_are_noted(
    forbidden: bool, there: bool, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_dsvllm import doctor

    compiled = tmp_path / "__init__.pyc"
    if there:
        compiled.write_bytes(b"")
    monkeypatch.setattr("sys.dont_write_bytecode", forbidden)
    monkeypatch.setattr("importlib.util.cache_from_source", lambda origin: str(compiled))
    found = [finding for finding in doctor.examine() if finding.subject == "bytecode"]
    assert len(found) == noted
    assert all("compileall" in finding.value and finding.status == "note" for finding in found)


@pytest.mark.usefixtures("own_registry")
def test_an_engine_that_does_not_end_is_an_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dsvllm import doctor
    from hf_dsvllm.errors import EngineError

    def refuse(record: object) -> tuple[int, ...]:
        raise EngineError("processes [7] do not end")

    registered("c" * 16, host=os.uname().nodename, owner=(2**22 + 2, "1"))
    monkeypatch.setattr(doctor, "reap", refuse)
    code, out, _ = run("doctor", "--reap")
    assert code == 1
    assert "processes [7] do not end" in out
