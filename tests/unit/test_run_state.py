"""What `run` does for a trainer is done for that trainer: its arguments, its model, its folder, its memory."""

from __future__ import annotations

import copy
import gc
import pickle
import pickletools
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import trl
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_dsvllm import callback, run_folder, session, with_presets
from hf_dsvllm.errors import ConfigError, Problem, WiringError
from hf_dsvllm.run.command import AdapterOptions, Command, Given
from hf_dsvllm.run.for_arguments import ForArguments
from hf_dsvllm.run.for_models import ForModels, has_head
from hf_dsvllm.run.for_trainers import ForTrainers, SavesAdapters, _where, accepted, given_to
from hf_dsvllm.run.state import Run, task_type
from hf_dsvllm.run.target import Target
from tests.door import leave
from tests.tiny import write_tiny_model


@pytest.fixture(autouse=True)
def _left_behind() -> Iterator[None]:
    yield
    leave()


def a_run(preset: str = "lora") -> Run:
    given = {"ds_preset": Given(preset, "the command line")}
    target = Target(name="x", path=None, file=None)
    return Run(Command(target=target, script_args=(), given=given, adapter=AdapterOptions(), words=()))


def arguments(folder: Path, cls: type = TrainingArguments, **more: Any) -> Any:
    return with_presets(cls)(output_dir=str(folder), ds_preset="lora", use_cpu=True, bf16=False, **more)


def model_of(cls: str, name: str, **config: Any) -> Any:
    """An object of transformers' class `cls` with a configuration and no weights."""
    kind = getattr(transformers, cls)
    model = kind.__new__(kind)
    model.__dict__["config"] = SimpleNamespace(_name_or_path=name, **config)
    return model


# -- arguments


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sessions that only remember what they were made for, in order; `engine` is None once it was stopped."""
    made: list[Any] = []

    def prepare(args: Any, model_args: Any, *, trained: bool, constructed: bool = False) -> Any:
        assert not trained, "a script may load a teacher first"
        run_folder.occupy(Path(args.output_dir))
        one = SimpleNamespace(args=args, model_args=model_args, run_dir=Path(args.output_dir), engine="on", preset=None)
        one.device, one.constructed, one.stop_engine = "cpu", constructed, lambda: setattr(one, "engine", None)
        made.append(one)
        return one

    monkeypatch.setattr(session, "prepare", prepare)
    return made


def begun(folder: Path) -> tuple[Run, Any]:
    run = a_run()
    args = arguments(folder)
    run.use(args)
    run.settle_model(model_of("LlamaForCausalLM", "m"), transformers.Trainer)
    run.prepare()
    return run, args


def test_what_was_prepared_for_other_arguments_is_dropped(tmp_path: Path, prepared: list[Any]) -> None:
    run, _ = begun(tmp_path / "stage2")
    run.use(arguments(tmp_path / "stage1"))
    run.prepare()
    assert [one.engine for one in prepared] == [None, "on"]
    assert run.give_out().run_dir == tmp_path / "stage1"
    assert not (tmp_path / "stage2" / run_folder.LOCK).exists()


def test_what_was_prepared_for_another_output_dir_is_dropped(tmp_path: Path, prepared: list[Any]) -> None:
    run, args = begun(tmp_path)
    args.output_dir = str(tmp_path / "run-x")
    run.prepare()
    assert run.give_out().run_dir == tmp_path / "run-x"
    assert not (tmp_path / run_folder.LOCK).exists()


def test_a_copy_of_the_arguments_keeps_the_engine_that_was_started(tmp_path: Path, prepared: list[Any]) -> None:
    run, args = begun(tmp_path)
    twin = copy.copy(args)
    run.use(twin)
    run.prepare()
    assert len(prepared) == 1
    assert run.give_out().args is twin


def test_nothing_is_prepared_for_arguments_that_have_their_trainer(tmp_path: Path, prepared: list[Any]) -> None:
    run, args = begun(tmp_path)
    run.give_out()
    run.prepare()
    assert run.session is None
    run.use(args)
    run.settle_model(model_of("LlamaForCausalLM", "m"), transformers.Trainer)
    run.prepare(constructed=True)
    assert [one.constructed for one in prepared] == [False, True]


def test_the_folder_of_a_trainer_stays_occupied(tmp_path: Path, prepared: list[Any]) -> None:
    run, args = begun(tmp_path)
    run.give_out()
    run.use(args)
    run.settle_model(model_of("LlamaForCausalLM", "m"), transformers.Trainer)
    run.prepare()
    run.use(arguments(tmp_path / "other"))
    run.prepare()
    assert (tmp_path / run_folder.LOCK).exists()


# -- the model that is trained


@pytest.mark.parametrize(
    ("cls", "encoder_decoder", "expected"),
    [
        ("LlamaForCausalLM", False, "CAUSAL_LM"),
        ("T5ForConditionalGeneration", True, "SEQ_2_SEQ_LM"),
        ("BartForSequenceClassification", True, "SEQ_CLS"),
        ("BertForTokenClassification", False, "TOKEN_CLS"),
    ],
)
def test_the_task_type_is_that_of_the_class(cls: str, encoder_decoder: bool, expected: str) -> None:
    assert task_type(getattr(transformers, cls), SimpleNamespace(is_encoder_decoder=encoder_decoder)) == expected


@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "GPT2LMHeadModel", "FlaubertWithLMHeadModel", "BertForMaskedLM"])
def test_a_model_with_a_head_is_one_to_train(cls: str) -> None:
    assert has_head(getattr(transformers, cls))


@pytest.mark.parametrize("cls", ["LlamaModel", "RoFormerModel", "LongformerModel"])
def test_a_model_without_a_head_is_a_helper(cls: str) -> None:
    assert not has_head(getattr(transformers, cls))


@pytest.mark.parametrize("name", ["reward", "policy"])
def test_a_helper_loaded_first_decides_nothing(name: str, tmp_path: Path, prepared: list[Any]) -> None:
    run = a_run()
    door = ForModels(run, ForArguments(run))
    run.use(arguments(tmp_path))
    door.before_load(transformers.LlamaForSequenceClassification, name, {"revision": "r1", "trust_remote_code": True})
    assert prepared == []
    door.before_load(transformers.LlamaForCausalLM, "policy", {"revision": "r2"})
    door.before_load(transformers.LlamaForCausalLM, "reference", {})
    run.settle_model(model_of("LlamaForCausalLM", "policy"), transformers.Trainer)
    run.prepare()
    found = run.give_out().model_args
    assert (found.model_name_or_path, found.model_revision) == ("policy", "r2")
    assert not hasattr(found, "trust_remote_code")
    assert (found.lora_task_type, found.lora_modules_to_save) == ("CAUSAL_LM", None)
    assert len(prepared) == 1


def test_a_models_revision_stays_its_own(tmp_path: Path, prepared: list[Any]) -> None:
    run = a_run()
    door = ForModels(run, ForArguments(run))
    run.use(arguments(tmp_path))
    door.before_load(transformers.LlamaForCausalLM, "teacher", {"revision": "old", "trust_remote_code": True})
    door.before_load(transformers.LlamaForCausalLM, "student", {})
    for name, expected in (("student", ("main", False)), ("teacher", ("old", True))):
        run.settle_model(model_of("LlamaForCausalLM", name), transformers.Trainer)
        assert (run.model_args.model_revision, getattr(run.model_args, "trust_remote_code", False)) == expected


def test_a_classifier_gets_its_task_type_also_in_a_script_with_a_model_config() -> None:
    run = a_run()
    run.model_args, run.described = trl.ModelConfig(model_name_or_path="m", use_peft=True), False
    run.settle_model(model_of("LlamaForSequenceClassification", "m"), transformers.Trainer)
    assert run.model_args.lora_task_type == "SEQ_CLS"


def test_a_reward_trainer_given_a_name_trains_a_classifier() -> None:
    run = a_run()
    run.settle_model("m", trl.RewardTrainer)
    assert run.model_args.lora_task_type == "SEQ_CLS"


@pytest.mark.parametrize(
    ("config", "loaded", "four_bit"),
    [
        ("SFTConfig", "LlamaForCausalLM", True),
        ("GRPOConfig", "LlamaForSequenceClassification", False),
        ("RewardConfig", "LlamaForSequenceClassification", True),
        ("RewardConfig", "LlamaForCausalLM", False),
    ],
)
def test_what_trls_arguments_show_to_be_a_helper_is_not_quantised(
    config: str, loaded: str, four_bit: bool, tmp_path: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run("qlora")
    args = with_presets(getattr(trl, config))(output_dir=str(tmp_path), ds_preset="qlora", use_cpu=True, bf16=False)
    run.use(args)
    kwargs = ForModels(run, ForArguments(run)).before_load(getattr(transformers, loaded), "some/model", {})
    assert ("quantization_config" in kwargs) == four_bit
    said = capsys.readouterr()
    assert (f"{loaded} loaded in 4 bit" in said.out + said.err) == four_bit
    assert (": some/model" in said.out + said.err) == four_bit


@pytest.mark.parametrize(("preset", "fix"), [("auto", "name a preset"), ("zero2", "name a preset"), ("zero3", "use")])
def test_a_whole_model_before_the_arguments_is_named_by_its_line(preset: str, fix: str) -> None:
    run = a_run(preset)
    arguments = ForArguments(run)
    door = ForModels(run, arguments)
    if run.shards_weights:
        door.made()
    else:
        door.before_load(transformers.LlamaModel, "m", {})
    (problem,) = arguments._lines_to_swap(ConfigError([Problem("loaded before the training arguments", "")]))
    assert problem.what.startswith("the model is made at ")
    assert fix in problem.fix


def test_a_model_that_is_sharded_early_is_no_whole_one() -> None:
    run = a_run("zero3")
    arguments = ForArguments(run)
    ForModels(run, arguments).before_load(transformers.LlamaForCausalLM, "m", {})
    assert arguments.whole_model is None
    assert arguments.sharded_early is not None


# -- constructors


class Passes(trl.SFTTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class TakesOne(Passes):
    def __init__(self, *args: Any, mine: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class TakesNoMore(trl.SFTTrainer):
    def __init__(self, model: Any) -> None:
        super().__init__(model)


def test_arguments_that_are_handed_on_are_found_where_they_arrive() -> None:
    assert given_to(Passes, None, ("m",), {"args": 1}) == {"model": "m", "args": 1}
    assert given_to(TakesOne, None, (), {"model": "m", "mine": 2}) == {"model": "m", "mine": 2}
    assert {"peft_config", "quantization_config", "mine"} <= accepted(TakesOne)
    assert "peft_config" not in accepted(TakesNoMore)


# -- the script's own variable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("run") / "model")


def adapted(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained = SavesAdapters(model, wrapped)
    return model


def saves_adapters(model: Any, out: Path) -> bool:
    model.save_pretrained(out)
    return (out / "adapter_model.safetensors").is_file() and not (out / "model.safetensors").exists()


def test_a_copy_saves_its_own_adapters(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    twin = copy.deepcopy(model)
    assert twin.save_pretrained.model is twin
    assert twin.save_pretrained.wrapped.get_base_model() is twin
    assert saves_adapters(twin, tmp_path)


def test_a_pickled_model_saves_its_adapters_and_knows_nothing_of_us(folder: Path, tmp_path: Path) -> None:
    pickled = pickle.dumps(adapted(folder))
    assert not any("hf_dsvllm" in str(value) for _, value, _ in pickletools.genops(pickled))
    again = pickle.loads(pickled)
    assert again.save_pretrained.__self__.get_base_model() is again
    assert saves_adapters(again, tmp_path)


def test_a_merged_model_saves_itself(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    merged = model.save_pretrained.wrapped.merge_and_unload()
    assert merged is model
    assert not saves_adapters(model, tmp_path)
    assert pickle.loads(pickle.dumps(model)).save_pretrained.__func__ is transformers.PreTrainedModel.save_pretrained


def test_a_model_nobody_holds_is_freed(folder: Path, tmp_path: Path) -> None:
    run = a_run()
    door = ForTrainers(run)
    given = door.inside({"model": AutoModelForCausalLM.from_pretrained(folder), "args": arguments(tmp_path)})
    again = door.inside({"model": given["model"].get_base_model(), "args": given["args"]})
    assert again["model"] is given["model"]
    seen = weakref.ref(given["model"].get_base_model())
    del given, again
    gc.collect()
    assert seen() is None


# -- exports


def a_trainer(folder: Path, export_to: str | None) -> Any:
    args = arguments(folder, export_to=export_to)
    ours = object.__new__(callback.SessionCallback)
    ours.session = SimpleNamespace(args=args, run_dir=folder)  # type: ignore[assignment]

    class Trained(SimpleNamespace):
        __hash__ = object.__hash__

    return Trained(args=args, callback_handler=SimpleNamespace(callbacks=[ours]), session=ours.session)


@pytest.mark.parametrize("asked", ["shared", None])
def test_an_export_never_overwrites_that_of_an_earlier_trainer(
    asked: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    door = ForTrainers(a_run())
    export_to = str(tmp_path / asked) if asked else None
    target = tmp_path / (asked or "export")
    first, second, third = (a_trainer(tmp_path, export_to) for _ in range(3))
    for trainer, expected in ((first, export_to), (first, export_to), (second, f"{target}-2"), (third, f"{target}-3")):
        door.before_training(trainer)
        assert trainer.session.args.export_to == expected
        assert trainer.args.export_to == export_to
        door.after_training(trainer)
    said = capsys.readouterr()
    assert f"export_to={target}-2: {target} is the export of an earlier trainer of this script" in said.out + said.err


def test_a_trainer_that_failed_has_no_export_to_keep(tmp_path: Path) -> None:
    door = ForTrainers(a_run())
    failed, second = a_trainer(tmp_path, None), a_trainer(tmp_path, None)
    door.before_training(failed)
    door.before_training(second)
    assert second.session.args.export_to is None


# -- training


def test_a_train_method_without_the_trainers_moments_is_an_error(tmp_path: Path) -> None:
    run = a_run()
    door, trainer = ForTrainers(run), a_trainer(tmp_path, None)
    with pytest.raises(WiringError, match=r"Trained\.train came back without on_train_begin"), door.training(trainer):
        pass
    assert isinstance(run.failed, WiringError)
    assert not run.trained


def test_a_train_method_inside_another_counts_once(tmp_path: Path) -> None:
    run = a_run()
    door, trainer = ForTrainers(run), a_trainer(tmp_path, None)
    for _ in range(2):
        with door.training(trainer), door.training(trainer):
            assert run.busy == 1
            door._has_begun(trainer)
    assert run.trained


# -- what adapters are said to be on


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(target_modules=["a.q_proj", "b.q_proj", "v_proj"]), "on q_proj, v_proj"),
        (LoraConfig(target_modules=r".*\.q_proj"), r"on .*\.q_proj"),
        (PromptTuningConfig(num_virtual_tokens=4), "of type PROMPT_TUNING"),
    ],
)
def test_an_adapter_is_named_by_its_layers_where_it_has_some(config: Any, expected: str) -> None:
    assert _where(config) == expected
