"""`--dry_run`: a shell script that trains the same way without this package."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from hf_dsvllm.run.command import AdapterOptions, read_command
from hf_dsvllm.run.dry import LORA, as_text
from hf_dsvllm.run.parent import LaunchOptions, make_plan
from tests.unit.test_run_parent import _in_a_folder, gpus, plan

__all__ = ["_in_a_folder"]


def shell_words(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_dry_run_is_a_shell_script_that_does_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    text = as_text(plan("--lr", "1", "--ds_preset", "zero3", num_processes="2"))
    written = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert written.returncode == 0, written.stderr
    lines = shell_words(text)
    start_, end = lines.index("cat > ds_zero3.json <<'HF_DSVLLM_END'"), lines.index("HF_DSVLLM_END")
    assert json.loads("\n".join(lines[start_ + 1 : end]))["zero_optimization"]["stage"] == 3
    assert lines[end + 1 :] == [lines[-1]]
    assert lines[-1].endswith("train.py --lr 1 --deepspeed ds_zero3.json --bf16 false --use_cpu true")
    assert "hf_dsvllm" not in lines[-1]


def test_a_script_with_arguments_of_its_own_is_reached_through_the_environment() -> None:
    Path("train.py").write_text("TrainingArguments('out')", encoding="utf-8")
    last = shell_words(as_text(plan("--ds_preset", "zero2")))[-1]
    assert last.startswith("ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=ds_zero2.json ")
    assert last.endswith(" train.py")


def test_every_reason_of_a_preset_is_given() -> None:
    text = as_text(plan("--ds_preset", "zero2_lowmem", num_processes="2"))
    made = plan("--ds_preset", "zero2_lowmem", num_processes="2").preset
    assert made is not None
    assert made.deepspeed
    for setting in (*made.deepspeed, *made.arguments):
        assert setting.why in text or setting.key == "zero_optimization.overlap_comm"
    assert "#   zero_optimization.overlap_comm = false: " in text, "a CPU has no streams, and the JSON says so"


def test_adapters_become_trls_flags_or_code_to_add() -> None:
    assert "get_peft_model" in as_text(plan("--ds_preset", "qlora"))
    Path("train.py").write_text("from trl import ModelConfig, TrlParser", encoding="utf-8")
    assert "--use_peft --lora_target_modules all-linear --load_in_4bit" in as_text(plan("--ds_preset", "qlora"))


def test_adapter_options_are_in_the_dry_run_as_trls_flags() -> None:
    Path("train.py").write_text("from trl import ModelConfig, TrlParser", encoding="utf-8")
    options = AdapterOptions(lora_r=4, lora_dropout=0.0, lora_target_modules=("q_proj", "v_proj"))
    command = read_command(["train.py", "--dtype", "float16", "--ds_preset", "lora"], adapter=options)
    words = shell_words(as_text(make_plan(LaunchOptions(), command)))[-1]
    assert "--use_peft --lora_target_modules q_proj v_proj --lora_r 4 --lora_dropout 0.0" in words
    assert words.count("--lora_target_modules") == words.count("--dtype") == 1


def test_adapter_options_are_in_the_dry_run_as_code() -> None:
    Path("train.py").write_text("AutoModelForSequenceClassification.from_pretrained('m')", encoding="utf-8")
    options = AdapterOptions(lora_r=4, lora_alpha=8, lora_target_modules=("q_proj",))
    text = as_text(make_plan(LaunchOptions(), read_command(["train.py", "--ds_preset", "qlora"], adapter=options)))
    assert "LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=['q_proj']," in text
    assert "task_type='SEQ_CLS'" in text
    assert "model = AutoModelForSequenceClassification.from_pretrained(" in text


def test_a_reward_script_is_told_its_task_type() -> None:
    Path("train.py").write_text("from trl import ModelConfig, RewardConfig, TrlParser", encoding="utf-8")
    assert "--lora_task_type SEQ_CLS" in as_text(plan("--ds_preset", "lora"))


def test_the_values_of_the_dry_run_are_trls_defaults() -> None:
    from trl import ModelConfig

    assert {name: getattr(ModelConfig(), name) or "all-linear" for name in LORA} == LORA


def written(text: str, name: str) -> str:
    """What the script of the dry run would write into the file `name`."""
    lines = text.splitlines()
    start = lines.index(f"cat > {name} <<'HF_DSVLLM_END'")
    return "\n".join(lines[start + 1 : lines.index("HF_DSVLLM_END", start)])


@pytest.mark.parametrize("joined", [False, True])
def test_our_keys_are_left_out_of_a_copy_of_the_scripts_yaml(joined: bool) -> None:
    Path("run.yaml").write_text("ds_preset: zero2\nlearning_rate: 1e-4\ntags: [a, 'no']\n", encoding="utf-8")
    text = as_text(plan(*(["--config=run.yaml"] if joined else ["--config", "run.yaml"])))
    copy = written(text, "run_without_hf_dsvllm.yaml")
    assert yaml.safe_load(copy) == {"learning_rate": "1e-4", "tags": ["a", "no"]}
    assert f"--config{'=' if joined else ' '}run_without_hf_dsvllm.yaml" in shell_words(text)[-1]
    assert " run.yaml" not in shell_words(text)[-1]


def test_a_yaml_without_our_keys_is_the_scripts_own() -> None:
    Path("run.yaml").write_text("learning_rate: 1e-4\n", encoding="utf-8")
    assert "--config run.yaml " in shell_words(as_text(plan("--config", "run.yaml", "--ds_preset", "zero2")))[-1]


def test_a_json_that_is_the_only_argument_stays_the_only_one() -> None:
    Path("run.json").write_text(json.dumps({"ds_preset": "zero2", "max_steps": 2}), encoding="utf-8")
    text = as_text(plan("run.json"))
    assert shell_words(text)[-1].endswith(" train.py run_without_hf_dsvllm.json")
    expected = {"max_steps": 2, "deepspeed": "ds_zero2.json", "bf16": False, "use_cpu": True}
    assert json.loads(written(text, "run_without_hf_dsvllm.json")) == expected


def test_what_has_to_go_from_the_args_file_is_said() -> None:
    Path("train.args").write_text("--ds_preset lora --max_steps 2", encoding="utf-8")
    assert "# FIRST take --ds_preset out of train.args, which then reads:\n#   --max_steps 2\n" in as_text(plan())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "--bf16 true --optim adamw_torch"),
        (("--fp16", "true"), "--optim adamw_torch"),
        (("--fp16", "false"), "--bf16 true --optim adamw_torch"),
        (("--fp16", "--optim=adafactor"), ""),
        (("--bf16", "false", "--optim", "adafactor"), ""),
    ],
)
def test_what_was_typed_is_not_typed_over(
    words: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 1)
    last = shell_words(as_text(plan("--ds_preset", "zero3_offload", *words)))[-1]
    assert last.endswith(" ".join(["train.py", *words, "--deepspeed ds_zero3_offload.json", expected]).strip())


def test_on_a_cpu_bf16_is_off_whatever_was_typed() -> None:
    last = shell_words(as_text(plan("--ds_preset", "zero2", "--bf16", "true", "--use_cpu", "true")))[-1]
    assert last.endswith("--use_cpu true --deepspeed ds_zero2.json --bf16 false")


@pytest.mark.parametrize(("count", "expected"), [(1, "bf16=True"), (0, "bf16=False, use_cpu=True")])
def test_arguments_that_are_written_out_are_told_the_precision(
    count: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    Path("train.py").write_text("TrainingArguments('out')", encoding="utf-8")
    text = as_text(plan("--ds_preset", "zero2"))
    assert f"# and in its TrainingArguments, where it leaves them alone: {expected}\n" in text


def test_a_modules_source_tells_what_it_knows() -> None:
    command = read_command(["trl.scripts.sft", "--ds_preset", "qlora"], module=True)
    text = as_text(make_plan(LaunchOptions(module=True), command))
    assert "knows no adapters" not in text
    assert "-m trl.scripts.sft --bf16 false" in shell_words(text)[-1]
    assert "--use_peft --lora_target_modules all-linear --load_in_4bit" in shell_words(text)[-1]
