"""Unmodified scripts under every kind of preset: TRL's own five, and those people write; two processes, one torchrun.

Each case is what a rank of `hf-dsvllm run` does; the command line around it is in test_run_command_line.py.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.scripts.any.cases import HERE, SHORT, TRL, Case, Outcome, ours, run_all, trl_words, write_place

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

TRL_PRESETS = ("zero2", "zero3", "qlora")
NO_DROPOUT = ["--lora_dropout", "0"]  # sequences laid end to end draw other random numbers
OWN_PRESETS = ("zero2", "zero3", "lora", "qlora")
RESUMED = ("lora", "qlora", "zero3", "zero3+lora")
OWN = ("clm", "fixed", "own_loss", "module")
ON_CPU = ("--use_cpu", "true", "--bf16", "false")
ENGINES = {
    "zero2": "DeepSpeedEngine, ZeRO stage 2, 2 processes",
    "zero3": "DeepSpeedEngine, ZeRO stage 3, 2 processes",
    "lora": "DistributedDataParallel, 2 processes",
    "qlora": "DistributedDataParallel, 2 processes",
}


def clm_words(folder: Path, name: str) -> list[str]:
    named = ["--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "texts.jsonl")]
    return [*named, "--output_dir", str(folder / "out" / name), *SHORT]


def trl_cases(folder: Path) -> list[Case]:
    def words(script: str, preset: str) -> list[str]:
        more = NO_DROPOUT if preset == "qlora" else []
        return [*trl_words(folder, script, f"{script}-{preset}"), *ours(preset), *more]

    return [Case(name=f"{script}-{preset}", argv=words(script, preset)) for preset in TRL_PRESETS for script in TRL]


def own_cases(folder: Path) -> list[Case]:
    cases = []
    for preset in OWN_PRESETS:
        for script in OWN:
            name = f"{script}-{preset}"
            if script == "clm":
                argv = [str(HERE / "clm.py"), *clm_words(folder, name)]
            elif script == "module":
                argv = ["-m", "package.train", *clm_words(folder, name)]
            else:
                argv = [str(HERE / f"{script}.py"), str(folder / "model"), str(folder / "out" / name)]
            cases.append(Case(name=name, argv=[*argv, *ours(preset)]))
    return cases


def plain_cases(folder: Path) -> list[Case]:
    """The same scripts with what a person would write by hand: a DeepSpeed JSON, TRL's adapter flags."""
    import trl

    cases = []
    scripts = Path(trl.__file__).parent / "scripts"
    for stage in (2, 3):
        # No train_batch_size: without a process group DeepSpeed takes the world for 1 when ZeRO-3 loads the model.
        config = {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
        file = folder / f"hand_written_{stage}.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        more = [*ON_CPU, "--deepspeed", str(file)]
        name = f"clm-plain{stage}"
        cases.append(Case(name=name, plain=True, argv=[str(HERE / "clm.py"), *clm_words(folder, name), *more]))
        name = f"sft-plain{stage}"
        cases.append(
            Case(name=name, plain=True, argv=[str(scripts / "sft.py"), *trl_words(folder, "sft", name)[2:], *more])
        )
    name = "sft-plainqlora"
    flags = [
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--load_in_4bit",
        "--use_bnb_nested_quant",
        *NO_DROPOUT,
    ]
    argv = [str(scripts / "sft.py"), *trl_words(folder, "sft", name)[2:], *ON_CPU, *flags]
    return [*cases, Case(name=name, plain=True, argv=argv)]


def resumed_cases(folder: Path) -> list[Case]:
    """Runs of a script that knows no presets, saving after each step, and for each one that goes on after the first."""
    cases = []
    for preset in RESUMED:
        saved = f"saved-{preset}"
        goes_on = ("--resume_from_checkpoint", str(folder / "out" / saved / "checkpoint-1"))
        for name, more in ((saved, ()), (f"resumed-{preset}", goes_on)):
            words = clm_words(folder, name)
            words[words.index("--save_strategy") + 1] = "steps"
            argv = [str(HERE / "clm.py"), *words, "--save_steps", "1", *more, *ours(preset)]
            cases.append(Case(name=name, argv=argv))
    return cases


def json_case(folder: Path) -> Case:
    """Everything, ours included, in the JSON that is the script's only argument."""
    words = [*clm_words(folder, "json"), *ours("zero2")]
    file = folder / "clm.json"
    values = {flag[2:]: value for flag, value in zip(words[::2], words[1::2], strict=True)}
    numbers = {name: int(values[name]) for name in ("max_steps", "per_device_train_batch_size", "logging_steps")}
    file.write_text(json.dumps({**values, **numbers, "disable_tqdm": True, "learning_rate": 1e-2}), encoding="utf-8")
    return Case(name="json", argv=[str(HERE / "clm.py"), str(file)])


ODD = {
    "made_whole_first": ("zero3",),
    "only_arguments": ("zero2",),
    "own_optimizer": ("lora",),
    "no_callbacks": ("zero2",),
    "catches_everything": ("lora",),
    "own_quantisation": ("qlora",),
    "classifier": ("qlora",),
    "from_config": ("zero3",),
    "second_trainer": ("lora",),
    "folds": ("lora",),
    "helper_first": ("qlora",),
    "hands_everything_on": ("qlora",),
    "compiled": ("ddp",),
    "saves_its_own_variable": ("lora",),
    "only_evaluates": ("ddp",),
    "default_arguments": ("lora",),
    "own_arguments": ("zero2",),
    "names_the_model": ("qlora",),
    "own_loop": ("ddp",),
    "own_train_goes_on": ("ddp",),
    "prompt_tuning": ("ddp",),
    "adapters_by_pattern": ("ddp",),
}


def odd_cases(folder: Path) -> list[Case]:
    cases = []
    for what, (preset,) in ODD.items():
        argv = [str(HERE / "odd.py"), what, str(folder / "model"), str(folder / "out" / what), *ours(preset)]
        cases.append(Case(name=what, argv=argv))
    recipe = HERE.parents[2] / "recipes" / "sft.py"
    cases.append(Case(name="recipe", argv=[str(recipe), *ours("zero2")]))
    questions = ["--gen_eval_file", str(folder / "questions.jsonl")]
    argv = [*trl_words(folder, "reward", "asked_reward"), *ours("zero2", *questions)]
    return [
        *cases,
        Case(name="asked_reward", argv=argv),
        Case(name="help", argv=["trl", "sft", "--help", *ours("zero2")]),
    ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    folder = write_place(tmp_path_factory.mktemp("scripts"))
    makers = (trl_cases, own_cases, plain_cases, resumed_cases, odd_cases)
    return run_all(folder, [*(case for make in makers for case in make(folder)), json_case(folder)])


# -- TRL's own scripts


@pytest.mark.parametrize("preset", TRL_PRESETS)
@pytest.mark.parametrize("script", TRL)
def test_trls_own_scripts_train_and_save(script: str, preset: str, outcomes: Mapping[str, Outcome]) -> None:
    done = outcomes[f"{script}-{preset}"].trained()
    assert done.running.startswith(ENGINES[preset])
    assert len(done.printed_losses()) == 2
    saved = "adapter_model.safetensors" if preset == "qlora" else "model.safetensors"
    assert (done.out / saved).stat().st_size > 10_000
    assert f"at {script}.py:" in done.wired
    if preset == "qlora":
        assert "layers in 4 bit" in done.running
        assert "adapter 'default' on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in done.wired


# -- scripts of one's own


@pytest.mark.parametrize("preset", OWN_PRESETS)
@pytest.mark.parametrize("script", OWN)
def test_scripts_that_know_nothing_of_presets_or_adapters_train_with_them(
    script: str, preset: str, outcomes: Mapping[str, Outcome]
) -> None:
    done = outcomes[f"{script}-{preset}"].trained()
    assert done.running.startswith(ENGINES[preset])
    assert len(done.losses()) == 2
    saved = "adapter_model.safetensors" if "lora" in preset else "model.safetensors"
    assert (done.out / saved).is_file()
    assert ("layers in 4 bit" in done.running) == (preset == "qlora")
    assert ("adapters in 14 layers" in done.running) == ("lora" in preset)


def test_the_line_at_the_start_names_the_doors_and_their_lines(outcomes: Mapping[str, Outcome]) -> None:
    wired = outcomes["clm-qlora"].wired
    for part in ("our flags in the parser at clm.py:", "TrainingArguments at clm.py:", "Trainer at clm.py:",
                 "LlamaForCausalLM loaded in 4 bit at clm.py:", "LlamaForCausalLM given adapters at clm.py:",
                 "no evaluation by generation"):  # fmt: skip
        assert part in wired
    assert "Doubled at own_loss.py:" in outcomes["own_loss-zero3"].wired


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_are_those_of_a_hand_written_deepspeed_file(stage: int, outcomes: Mapping[str, Outcome]) -> None:
    plain, preset = outcomes[f"clm-plain{stage}"].trained(), outcomes[f"clm-zero{stage}"]
    assert preset.losses() == pytest.approx(plain.losses(), rel=1e-6)  # whole layers add up in another order
    assert outcomes[f"module-zero{stage}"].losses() == preset.losses()
    assert outcomes[f"sft-zero{stage}"].printed_losses() == outcomes[f"sft-plain{stage}"].trained().printed_losses()


def test_losses_of_qlora_are_those_of_trls_own_flags(outcomes: Mapping[str, Outcome]) -> None:
    assert outcomes["sft-qlora"].printed_losses() == outcomes["sft-plainqlora"].trained().printed_losses()


@pytest.mark.parametrize("preset", RESUMED)
def test_a_plain_script_resumes_where_it_was(preset: str, outcomes: Mapping[str, Outcome]) -> None:
    saved, resumed = outcomes[f"saved-{preset}"].trained(), outcomes[f"resumed-{preset}"].trained()
    file = "adapter_model.safetensors" if "lora" in preset else "model.safetensors"
    assert (saved.out / "checkpoint-1" / file).is_file()
    assert len(resumed.printed_losses()) == 1, "it began anew"
    assert resumed.losses() == pytest.approx(saved.losses(), abs=1e-6)


def test_saved_arguments_load_without_this_package(outcomes: Mapping[str, Outcome]) -> None:
    with zipfile.ZipFile(outcomes["sft-zero2"].out / "training_args.bin") as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    strings = {value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)}
    assert any("SFTConfig" in text for text in strings)
    assert not any("hf_dsvllm" in text or "Dsvllm" in text for text in strings)


def test_a_script_with_everything_in_one_json_trains_the_same(outcomes: Mapping[str, Outcome]) -> None:
    assert outcomes["json"].trained().losses() == outcomes["clm-zero2"].losses()


# -- scripts that do something unusual


def test_a_script_may_classify(outcomes: Mapping[str, Outcome]) -> None:
    done = outcomes["classifier"].trained()
    assert "LlamaForSequenceClassification loaded in 4 bit" in done.wired


def test_a_model_made_from_a_configuration_is_sharded_too(outcomes: Mapping[str, Outcome]) -> None:
    assert "ZeRO stage 3" in outcomes["from_config"].trained().running


def test_a_second_trainer_is_wired_too(outcomes: Mapping[str, Outcome]) -> None:
    assert outcomes["second_trainer"].trained().log.count("hf-dsvllm: wired:") == 2


def test_each_fold_is_recorded_in_its_folder_and_its_model_freed(outcomes: Mapping[str, Outcome]) -> None:
    done = outcomes["folds"].trained()
    assert [(done.out / f"fold{fold}" / "run.json").is_file() for fold in (0, 1)] == [True, True]
    assert not (done.out / "run.json").exists()
    assert "models alive: 0" in done.log


def test_a_helper_that_is_loaded_first_decides_nothing(outcomes: Mapping[str, Outcome]) -> None:
    done = outcomes["helper_first"].trained()
    assert "trained: PeftModelForCausalLM None" in done.log
    assert "LlamaForSequenceClassification loaded in 4 bit" in done.wired


def test_a_trainer_that_hands_its_arguments_on_gets_trls_adapters(outcomes: Mapping[str, Outcome]) -> None:
    done = outcomes["hands_everything_on"].trained()
    assert "14 layers in 4 bit" in done.running
    assert "peft_config given to the trainer at odd.py:" in done.wired


def test_a_compiled_model_trains_together(outcomes: Mapping[str, Outcome]) -> None:
    assert outcomes["compiled"].trained().running.startswith("DistributedDataParallel, 2 processes")


def test_the_scripts_own_variable_saves_its_adapters(outcomes: Mapping[str, Outcome]) -> None:
    mine = outcomes["saves_its_own_variable"].trained().out / "mine"
    assert (mine / "adapter_model.safetensors").is_file()
    assert not (mine / "model.safetensors").exists()


def test_a_script_that_only_evaluates_ends_well_and_says_so(outcomes: Mapping[str, Outcome]) -> None:
    assert "did not call train()" in outcomes["only_evaluates"].trained().log


def test_a_trainer_without_arguments_gets_ours(outcomes: Mapping[str, Outcome]) -> None:
    assert "adapters in 14 layers" in outcomes["default_arguments"].trained().running


def test_arguments_with_a_constructor_of_their_own_keep_it(outcomes: Mapping[str, Outcome]) -> None:
    assert "ZeRO stage 2" in outcomes["own_arguments"].trained().running


def test_a_model_that_is_loaded_by_the_name_of_the_argument_is_loaded_in_four_bits(
    outcomes: Mapping[str, Outcome],
) -> None:
    assert "LlamaForCausalLM loaded in 4 bit" in outcomes["names_the_model"].trained().wired


def test_a_train_method_that_goes_on_to_the_trainers_is_that_of_a_trainer(outcomes: Mapping[str, Outcome]) -> None:
    done = outcomes["own_train_goes_on"].trained()
    assert "before training" in done.log
    assert done.log.count("hf-dsvllm: wired:") == 1


def test_adapters_by_a_pattern_of_the_scripts_are_named_by_it(outcomes: Mapping[str, Outcome]) -> None:
    assert r"adapter 'default' on .*\.q_proj;" in outcomes["adapters_by_pattern"].trained().wired


def test_our_flags_are_in_the_scripts_help(outcomes: Mapping[str, Outcome]) -> None:
    done = outcomes["help"].trained()
    for flag in ("--gen_eval_file", "--vllm_args", "--learning_rate", "--dataset_name"):
        assert flag in done.log
    assert "(default: zero2)" in done.log


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("made_whole_first", r"the model is made at odd.py:\d+, the training arguments at odd.py:\d+\n    fix: swap"),
        ("only_arguments", "the script made TrainingArguments and no Trainer"),
        ("own_optimizer", r"the trainer at odd.py:\d+ gets an optimizer made before the adapters of preset lora exist"),
        ("no_callbacks", "Trainer starts to train without the callback of this run"),
        ("prompt_tuning", r"the trainer at odd.py:\d+ trains prompts \(PROMPT_TUNING\)"),
        ("own_loop", r"OwnLoop\.train came back without on_train_begin"),
        ("catches_everything", r"(?s)went on after ConfigError.*gets an optimizer made before the adapters"),
        ("own_quantisation", r"preset qlora trains on a 4-bit model, the one given to the trainer at odd.py:\d+"),
        ("asked_reward", "--gen_eval_file asks for answers in text, a reward model gives none"),
        ("recipe", "DsvllmSFTConfig is an argument class of hf_dsvllm"),
    ],
)
def test_what_cannot_be_wired_stops_with_the_reason(name: str, reason: str, outcomes: Mapping[str, Outcome]) -> None:
    assert re.search(reason, outcomes[name].refused().log), outcomes[name].log[-3000:]
