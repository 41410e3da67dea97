"""Lower bounds of memory: the table's rows, measured points, and what is refused."""

from __future__ import annotations

import pytest

from hf_dsvllm.errors import ModelShapeError
from hf_dsvllm.hardware import Gpu, Machine, parse_machine
from hf_dsvllm.memory import NF4_BYTES, TrainingMemory, estimate, fits
from hf_dsvllm.model_shape import ModelShape, shape_from_config

GIB = 2**30
QWEN3_4B = shape_from_config(
    {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
)
P = QWEN3_4B.parameters


def memory(shape: ModelShape = QWEN3_4B, **options: object) -> TrainingMemory:
    defaults = {"zero_stage": 2, "world_size": 1, "micro_batch_size": 1, "seq_len": 512, "gradient_checkpointing": True}
    return estimate(shape, **{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "resident", "step_peak"),
    [
        ({"zero_stage": None}, 8, 8),
        ({"zero_stage": None, "weight_dtype": "float32"}, 16, 16),
        ({"zero_stage": None, "optimizer_state_bytes": 2}, 6, 6),
        ({"zero_stage": 0}, 16, 16),
        ({"zero_stage": 0, "weight_dtype": "float32"}, 16, 16),
        ({"zero_stage": 1, "world_size": 4, "fp32_accumulation": False}, 2 + 14 / 4, 2 + 20 / 4),
        ({"zero_stage": 1, "world_size": 4}, 6 + 12 / 4, 6 + 12 / 4),
        ({"zero_stage": 2, "world_size": 4, "fp32_accumulation": False}, 2 + 14 / 4, 2 + 20 / 4),
        ({"zero_stage": 2, "world_size": 4}, 2 + 16 / 4, 2 + 16 / 4),
        ({"zero_stage": 2, "world_size": 4, "weight_dtype": "float32"}, 4 + 16 / 4, 4 + 16 / 4),
        ({"zero_stage": 2, "offload_optimizer": "cpu"}, 2, 2),
        ({"zero_stage": 3, "world_size": 8}, 18 / 8, 18 / 8 + 4 / 8),
        ({"zero_stage": 3, "world_size": 8, "fp32_accumulation": False}, 16 / 8, 16 / 8 + 6 / 8),
        ({"zero_stage": 3}, 18, 18 + 4e9 / P),
    ],
)
def test_bytes_per_parameter_follow_the_table(options, resident, step_peak):
    result = memory(**options)
    assert result.gpu_resident_bytes == pytest.approx(resident * P, rel=1e-8)
    assert result.gpu_step_peak_bytes == pytest.approx(step_peak * P, rel=1e-8)


@pytest.mark.parametrize(("fp32_accumulation", "measured_gib"), [(False, 82.5), (True, 71.9)])
def test_zero2_is_below_and_within_a_tenth_of_what_an_h200_measured(fp32_accumulation, measured_gib):
    """ZeRO-2, one H200, micro-batch 2 of 4096 tokens, checkpointed: peak allocated, deepspeed 0.19.8."""
    result = memory(micro_batch_size=2, seq_len=4096, fp32_accumulation=fp32_accumulation)
    assert 0.9 * measured_gib < result.peak_bytes / GIB <= measured_gib


def test_offloaded_states_are_on_the_host_or_on_nvme():
    assert memory(offload_optimizer="cpu").host_bytes == 18 * P
    zero3 = memory(zero_stage=3, world_size=2, offload_optimizer="cpu", offload_param="cpu")
    assert (zero3.host_bytes, zero3.nvme_bytes, zero3.gpu_resident_bytes) == (20 * P, 0, 0)
    assert zero3.gpu_step_peak_bytes == 2 * QWEN3_4B.largest_matrix
    nvme = memory(zero_stage=3, offload_optimizer="nvme", offload_param="nvme")
    assert (nvme.host_bytes, nvme.nvme_bytes) == (2 * P, 18 * P)


def test_lora_keeps_the_base_once_and_states_for_the_adapter_alone():
    adapters = QWEN3_4B.lora_parameters(8)
    assert memory(zero_stage=None, adapter="lora", lora_r=8).gpu_resident_bytes == 2 * P + 8 * adapters
    sharded = memory(zero_stage=3, adapter="lora", lora_r=8, world_size=4)
    assert sharded.by_part["frozen_weights"] == pytest.approx(2 * P / 4)
    offloaded = memory(zero_stage=3, adapter="lora", offload_param="cpu", offload_optimizer="cpu")
    assert offloaded.by_part["frozen_weights"] == 0
    assert offloaded.host_bytes > 2 * P


@pytest.mark.parametrize("options", [{"zero_stage": None}, {"zero_stage": 3, "world_size": 8}])
def test_qlora_loads_the_whole_4_bit_model_in_every_process(options):
    linear = QWEN3_4B.linear_parameters
    result = memory(adapter="qlora", **options)
    assert result.by_part["frozen_weights"] == pytest.approx(NF4_BYTES * linear + 2 * (P - linear))
    assert 0.51 < NF4_BYTES < 0.52
    assert result.by_part["gathered"] == 2 * 2560 * 9728


def test_checkpointing_keeps_one_hidden_state_per_layer_and_one_layer():
    full = memory(gradient_checkpointing=False).by_part["activations"]
    kept = memory(gradient_checkpointing=True).by_part["activations"]
    assert kept == full // 36 + 36 * 2 * 512 * 2560
    twice = memory(gradient_checkpointing=True, micro_batch_size=2).by_part["activations"]
    assert twice == 2 * kept


def test_on_cpu_everything_is_host_memory_of_all_processes():
    on_cpu = memory(device="cpu", world_size=2, weight_dtype="float32")
    on_gpu = memory(world_size=2, weight_dtype="float32")
    assert (on_cpu.gpu_resident_bytes, on_cpu.gpu_step_peak_bytes) == (0, 0)
    assert on_cpu.host_bytes == 2 * on_gpu.gpu_step_peak_bytes
    assert on_cpu.peak_bytes == on_cpu.host_bytes + 2 * on_cpu.by_part["activations"]
    assert on_gpu.peak_bytes == on_gpu.gpu_step_peak_bytes + on_gpu.by_part["activations"]


@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 4},
        {"zero_stage": None, "offload_optimizer": "cpu"},
        {"zero_stage": 2, "offload_param": "cpu"},
        {"world_size": 0},
    ],
)
def test_layouts_that_deepspeed_does_not_have_are_refused(options):
    with pytest.raises(ValueError):
        memory(**options)


def test_a_lora_rank_below_one_is_refused():
    with pytest.raises(ModelShapeError):
        memory(adapter="lora", lora_r=0)


def test_what_cannot_fit_is_refused_with_numbers_parts_and_a_fix():
    (problem,) = fits(memory(), parse_machine("L4"))
    assert "67.4 GiB on each GPU" in problem.what
    assert "optimizer 45.0 GiB" in problem.what
    assert "L4-24GB has 22.5 GiB" in problem.what
    assert "zero3_offload" in problem.fix


def test_what_may_fit_is_not_refused():
    assert fits(memory(), parse_machine("H100")) == []
    assert fits(memory(adapter="qlora"), parse_machine("L4")) == []
    assert fits(memory(zero_stage=3, world_size=4), parse_machine("4xL4")) == []


def test_activations_never_refuse_a_run():
    assert fits(memory(micro_batch_size=64, seq_len=8192, gradient_checkpointing=False), parse_machine("H100")) == []


def host(ram_gib: int, gpus: int) -> Machine:
    cards = tuple(Gpu(name="card", memory_bytes=80 * GIB, index=index) for index in range(gpus))
    return Machine(gpus=cards, cpu_count=8, ram_bytes=ram_gib * GIB)


def test_host_memory_is_checked_where_it_is_known():
    offloaded = memory(offload_optimizer="cpu")
    (problem,) = fits(offloaded, host(ram_gib=64, gpus=1))
    assert "67.4 GiB of host memory" in problem.what
    assert "zero3_nvme" in problem.fix
    assert fits(offloaded, host(ram_gib=72, gpus=1)) == []
    assert fits(offloaded, parse_machine("H100")) == []


def test_one_node_of_several_carries_its_own_share():
    assert fits(memory(world_size=4, offload_optimizer="cpu"), host(ram_gib=40, gpus=2)) == []
    assert len(fits(memory(world_size=4, offload_optimizer="cpu"), host(ram_gib=40, gpus=4))) == 1


def test_a_model_too_large_for_a_cpu_machine_is_refused_and_a_small_one_is_not():
    (problem,) = fits(memory(device="cpu", world_size=2), host(ram_gib=24, gpus=0))
    assert "in each of 2" in problem.what
    tiny = shape_from_config(
        {
            "model_type": "llama",
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        }
    )
    assert fits(memory(tiny, device="cpu", world_size=2, weight_dtype="float32"), host(ram_gib=24, gpus=0)) == []
