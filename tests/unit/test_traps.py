"""Every configuration that goes wrong late or silently is refused, with its fix, where a script would meet it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_dsvllm import arguments, preflight, toolchain, traps
from hf_dsvllm.ds_config import RunShape, build
from hf_dsvllm.ds_keys import REMOVED_OPTIMIZERS, REMOVED_TOP_LEVEL, REMOVED_ZERO
from hf_dsvllm.errors import ConfigError
from hf_dsvllm.launch import Launch
from hf_dsvllm.presets import Preset, available_presets, get_preset
from tests.door import enter, leave, problems_of, sound


@pytest.fixture(autouse=True)
def _left_behind() -> Iterator[None]:
    yield
    leave()


def zero(stage: int = 2, **more: Any) -> dict[str, Any]:
    return sound(zero_optimization={"stage": stage, **more})


OFFLOAD = {"device": "cpu", "pin_memory": False}
NVME = {"device": "nvme", "pin_memory": False}

# name: (DeepSpeed configuration, other arguments, part of the problem, part of its fix)
TRAPS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "unknown key": (sound(zero_optimisation={"stage": 3}), {}, "'zero_optimisation'", "write 'zero_optimization'"),
    "unknown key like no other": (sound(qqqq=1), {}, "'qqqq'", "remove it"),
    "unknown zero key": (zero(overlap_com=True), {}, "'zero_optimization.overlap_com'", "write 'overlap_comm'"),
    "unknown aio key": (sound(aio={"blocksize": 1}), {}, "'aio.blocksize'", "write 'block_size'"),
    "unknown data type": (sound(data_types={"grad_acc_dtype": "fp32"}), {}, "'data_types.grad_acc", "grad_accum_dtype"),
    "unknown offload key": (
        zero(offload_optimizer={**OFFLOAD, "pin_mem": True}),
        {},
        "'zero_optimization.offload_optimizer.pin_mem'",
        "write 'pin_memory'",
    ),
    "block that is no object": (sound(zero_optimization=3), {}, "zero_optimization=3 is not an object", "{…}"),
    "clipping against the Trainer's": (
        sound(gradient_clipping=0.5), {"max_grad_norm": 1.0}, "gradient_clipping=0.5 but max_grad_norm=1.0", '"auto"'
    ),
    "micro batch against the Trainer's": (
        sound(train_micro_batch_size_per_gpu=4), {"per_device_train_batch_size": 2}, "per_gpu=4 but", '"auto"'
    ),
    "accumulation against the Trainer's": (
        sound(gradient_accumulation_steps=4), {}, "steps=4 but gradient_accumulation_steps=1", '"auto"'
    ),
    "batch against the Trainer's": (
        sound(train_batch_size=7), {}, "train_batch_size=7 but micro batch x accumulation x processes=8", '"auto"'
    ),
    "learning rate against the Trainer's": (
        sound(optimizer={"type": "Lion", "params": {"lr": 0.1}}), {}, "lr=0.1 but learning_rate=5e-05", '"auto"'
    ),
    "bf16 against the Trainer's": (sound(bf16={"enabled": True}), {"bf16": False}, "bf16.enabled=True", '"auto"'),
    "fp16 against the Trainer's": (sound(fp16={"enabled": True}), {}, "fp16.enabled=True but fp16=False", '"auto"'),
    "8-bit Adam offloaded": (
        zero(offload_optimizer=OFFLOAD), {"optim": "adamw_bnb_8bit"}, "become Adam with L2 regul", "adamw_torch"
    ),
    "Adafactor offloaded": (zero(offload_optimizer=OFFLOAD), {"optim": "adafactor"}, "optim=adafactor", "adamw_torch"),
    "SGD offloaded": (zero(3, offload_optimizer=OFFLOAD), {"optim": "sgd"}, "optim=sgd would", "without optimizer off"),
    "an optimizer split between GPU and host": (
        zero(3, offload_optimizer={**OFFLOAD, "ratio": 0.5}), {}, "that no schedule changes", "remove ratio"
    ),
    "optimizer block and --optim": (
        sound(optimizer={"type": "Lion"}), {"optim": "adafactor"}, "optim=adafactor would be ignored", "remove the opt"
    ),
    "offload to NVMe without a path": (zero(3, offload_param=NVME), {}, "its nvme_path is None", '"nvme_path"'),
    "offload to NVMe named none": (
        zero(3, offload_param={**NVME, "nvme_path": "none"}), {}, "its nvme_path is 'none'", "local NVMe disk"
    ),
    "auto that nobody fills in": (zero(allgather_bucket_size="auto"), {}, "filled in by nobody", "give zero_optimi"),
    "stage 3 auto below stage 3": (
        zero(2, stage3_prefetch_bucket_size="auto"), {}, "filled in by nobody", "give zero_optimization.stage3"
    ),
    "batch size search under ZeRO-3": (zero(3), {"auto_find_batch_size": True}, "cannot restart", "--per_device_train"),
    "compilation that only logs": (sound(compile={"deepcompile": True}), {}, "only logs", "--torch_compile"),
    **{
        f"removed {key}": (sound(**{key: {}}), {}, f"DeepSpeed removed {key!r}", f"delete {key!r}")
        for key in REMOVED_TOP_LEVEL
    },
    **{
        f"removed {key}": (zero(3, **{key: 1}), {}, f"DeepSpeed removed 'zero_optimization.{key}'", "delete the key")
        for key in REMOVED_ZERO
    },
    **{
        f"removed {name}": (sound(optimizer={"type": name}), {}, "not in the installed DeepSpeed", "deepspeed<=0.19.6")
        for name in sorted(REMOVED_OPTIMIZERS)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_one_problem_with_its_fix(name: str, tmp_path: Path) -> None:
    config, kwargs, what, fix = TRAPS[name]
    (problem,) = problems_of(tmp_path, deepspeed=config, **kwargs)
    assert what in problem.what
    assert fix in problem.fix


def test_an_optimizer_on_nvme_cannot_be_resumed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-4"
    (checkpoint / "global_step4").mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()
    config = zero(3, offload_optimizer={**NVME, "nvme_path": "nvme"})
    (problem,) = problems_of(tmp_path, deepspeed=config, resume_from_checkpoint=str(checkpoint))
    assert "does not restore an optimizer that lies on NVMe" in problem.what
    assert "zero3_offload" in problem.fix


def test_a_sound_configuration_has_no_problem(tmp_path: Path) -> None:
    assert problems_of(tmp_path, deepspeed=sound()) == ()


def test_all_traps_of_one_configuration_are_reported_at_once(tmp_path: Path) -> None:
    config = sound(
        zero_optimisation={},
        elasticity={},
        gradient_clipping=0.5,
        optimizer={"type": "OneBitAdam"},
        compile={"deepcompile": True},
        zero_optimization={"stage": 3, "mics_shard_size": 2, "reduce_bucket_size": "auto", "offload_param": NVME},
    )
    with pytest.raises(ConfigError) as caught:
        enter(tmp_path, deepspeed=config, optim="adafactor", auto_find_batch_size=True, ds_preset="zer3")
    text = str(caught.value)
    assert text.startswith("10 problems in this configuration:")
    expected = (
        *("unknown preset 'zer3'", "'zero_optimisation'", "'elasticity'", "mics_shard_size", "gradient_clipping=0.5"),
        *("optimizer.type='OneBitAdam'", "optim=adafactor", "nvme_path", "auto_find_batch_size", "deepcompile"),
    )
    assert [part for part in expected if part not in text] == []
    assert text.count("fix: ") == 10


@pytest.mark.parametrize(("variable", "what"), [("DEEPSPEED", "a DeepSpeed configuration"), ("FSDP", "asks for FSDP")])
def test_a_second_configuration_from_accelerate_is_refused(
    variable: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "")  # its launcher sets this beside it
    (problem,) = problems_of(tmp_path, ds_preset="zero2")
    assert what in problem.what
    assert "default_config.yaml" in problem.what
    assert "torchrun" in problem.fix


def test_fsdp_by_accelerate_is_refused_with_presets_that_leave_deepspeed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (problem,) = problems_of(tmp_path, ds_preset="lora")
    assert "asks for FSDP" in problem.what
    assert "--ds_preset zero3" in problem.fix
    assert problems_of(tmp_path) == ()


def tiny_llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1, num_key_value_heads=1))


def test_a_model_made_before_the_arguments_is_refused_under_zero3_alone(tmp_path: Path) -> None:
    model = tiny_llama()
    (problem,) = problems_of(tmp_path, ds_preset="zero3")
    assert "a model was loaded before the training arguments" in problem.what
    assert "arguments first" in problem.fix
    assert problems_of(tmp_path, ds_preset="zero2") == ()
    assert model is not None


def test_a_model_that_is_gone_or_on_meta_is_no_model_made_before_the_arguments() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    assert not preflight._a_model_is_loaded()
    assert model is not None


def test_a_model_let_go_but_still_in_a_reference_cycle_does_not_count() -> None:
    model = tiny_llama()
    model.itself = [model]
    del model
    assert not preflight._a_model_is_loaded()


def test_a_dead_weak_proxy_does_not_disturb_the_search_for_models() -> None:
    import weakref

    class Mortal:
        pass

    mortal = Mortal()
    proxy = weakref.proxy(mortal)
    kept = [proxy]
    del mortal
    assert preflight._a_model_is_loaded() in (True, False)
    assert kept


@pytest.mark.parametrize(
    ("stage", "storage", "what"),
    [
        (2, "float16", "corrupts the weights silently"),
        (2, "float32", "corrupts the weights silently"),
        (3, "float16", "corrupts the weights silently"),
        (3, "uint8", "integer tensors cannot be partitioned"),
    ],
)
@pytest.mark.parametrize("form", ["dictionary", "object"])
def test_four_bit_storage_that_the_engine_would_break_is_refused(
    stage: int, storage: str, what: str, form: str, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    quantization: Any = {"load_in_4bit": True, "bnb_4bit_quant_storage": storage}
    if form == "object":
        quantization = BitsAndBytesConfig(**quantization)
    kwargs: dict[str, Any] = {"bf16": True, "model_init_kwargs": {"quantization_config": quantization}}
    (problem,) = problems_of(tmp_path, SFTConfig, deepspeed=zero(stage), **kwargs)
    assert what in problem.what
    assert "bnb_4bit_quant_storage=bfloat16" in problem.fix


@pytest.mark.parametrize(("stage", "storage"), [(2, "uint8"), (2, "bfloat16"), (3, "bfloat16")])
def test_four_bit_storage_that_stays_intact_is_accepted(stage: int, storage: str) -> None:
    assert list(traps.quant_storage_problems(storage, "bfloat16", stage)) == []


def test_a_device_map_is_refused_under_zero3(tmp_path: Path) -> None:
    from trl import SFTConfig

    (problem,) = problems_of(tmp_path, SFTConfig, ds_preset="zero3", model_init_kwargs={"device_map": "auto"})
    assert "device_map='auto' places whole weights" in problem.what
    assert problem.fix == "remove device_map"


def test_an_optimizer_block_that_needs_a_cuda_compiler_is_refused_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "training_device", lambda args: "cuda")
    monkeypatch.setattr(traps.shutil, "which", lambda name: None)
    (problem,) = problems_of(tmp_path, deepspeed=sound(optimizer={"type": "AdamW"}))
    assert "FusedAdam, and no nvcc is on the PATH" in problem.what
    assert "--optim adamw_torch_fused" in problem.fix


# -- what is corrected instead, and printed


def test_omitted_clipping_follows_the_trainer_instead_of_being_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sound()
    del config["gradient_clipping"]
    args = enter(tmp_path, deepspeed=config, max_grad_norm=0.3)
    assert args.deepspeed["gradient_clipping"] == "auto"
    assert args.hf_deepspeed_config.config["gradient_clipping"] == 0.3
    assert "gradient_clipping" not in config, "the user's own dictionary stays as it was"
    assert "deepspeed.gradient_clipping: (omitted) → auto" in capsys.readouterr().err


def test_a_zero3_save_gathers_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = enter(tmp_path, deepspeed=zero(3))
    assert args.deepspeed["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "no usable safetensors" in capsys.readouterr().err


def test_the_best_model_can_be_loaded_although_only_models_were_to_be_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = {"save_only_model": True, "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    args = enter(tmp_path, ds_preset="zero2", eval_steps=5, save_steps=5, **best)
    assert args.save_only_model is False
    assert "save_only_model: True → False" in capsys.readouterr().err


def test_accelerate_is_kept_from_dropping_deepspeed_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    enter(tmp_path, ds_preset="zero2", use_cpu=True)
    assert os.environ["ACCELERATE_USE_CPU"] == "false"
    assert "drops DeepSpeed silently" in capsys.readouterr().err


def test_plain_python_becomes_a_group_of_one_instead_of_looking_for_mpi(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    enter(tmp_path, ds_preset="zero2")
    assert os.environ["WORLD_SIZE"] == "1"
    assert "running as a one-process group" in capsys.readouterr().err


# -- our own presets fall into none


@pytest.mark.parametrize("preset", [*available_presets(), get_preset("zero3+lora")], ids=lambda preset: preset.name)
@pytest.mark.parametrize("world_size", [1, 4])
def test_no_preset_falls_into_a_trap_on_gpus(preset: Preset, world_size: int, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    arguments._argument_defaults(args, preset)
    args.bf16 = True
    launch = Launch(
        rank=0, local_rank=0, world_size=world_size, local_world_size=world_size, launched=True, asked_processes=None
    )
    config = build(preset, RunShape(world_size=world_size, gpus_per_node=world_size, nvme_path=tmp_path))
    assert preflight.trap_problems(args, config, launch, "cuda") == []


@pytest.mark.parametrize(
    "preset", [p for p in available_presets() if p.min_processes == 1], ids=lambda preset: preset.name
)
def test_every_preset_for_one_process_is_accepted_on_a_cpu(preset: Preset, tmp_path: Path) -> None:
    if preset.needs_nvme and not toolchain.links_libaio():
        pytest.skip("libaio is not installed")
    args = enter(tmp_path, ds_preset=preset.name, nvme_path=str(tmp_path))
    assert (args.deepspeed is not None) == preset.uses_deepspeed
    assert args.bf16 == (preset.name == "zero2_lowmem"), "CPUs train in float32, where the preset can"


def test_the_optimizers_that_offload_leaves_alone_are_those_accelerate_maps_to_their_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read off accelerate itself: which class it takes for each `optim`, and whether in AdamW's mode."""
    import deepspeed.ops.adagrad
    import deepspeed.ops.adam
    import deepspeed.ops.lion
    import torch
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed
    from transformers import Trainer, TrainingArguments

    def taken(name: str) -> Any:
        return lambda groups, **options: (name, options["adamw_mode"])

    for module, name in (("adam", "Adam"), ("adagrad", "Adagrad"), ("lion", "Lion")):
        monkeypatch.setattr(getattr(deepspeed.ops, module), f"DeepSpeedCPU{name}", taken(name))
    kept = {}
    for optim in ("adamw_torch", "paged_adamw_32bit", "adagrad", "lion_32bit", "paged_lion_32bit",
                  "adamw_bnb_8bit", "adafactor", "sgd", "lion_8bit", "rmsprop"):  # fmt: skip
        args = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, report_to=[])
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
        found, decoupled = map_pytorch_optim_to_deepspeed(cls([torch.nn.Parameter(torch.ones(2))], **options))
        kept[optim] = decoupled or found != "Adam"
        config = zero(offload_optimizer=OFFLOAD)
        problems = traps.find_problems(traps.Request(config=config, world_size=1, device="cpu", optim=optim))
        assert kept[optim] != any("would silently become Adam" in problem.what for problem in problems), optim
    assert sum(kept.values()) == 5


def test_an_optimizer_that_deepspeed_is_told_to_keep_is_no_trap(tmp_path: Path) -> None:
    config = zero(offload_optimizer=OFFLOAD) | {"zero_force_ds_cpu_optimizer": False}
    assert problems_of(tmp_path, deepspeed=config, optim="sgd") == ()
