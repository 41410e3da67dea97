"""One run as the formulas see it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hf_dsvllm.features import FUSED_ACTIVATIONS, FUSED_TYPES, LARGEST_LAYER
from hf_dsvllm.model_shape import ModelShape
from hf_dsvllm.planner.activations import Method, Numerics, Traced, frozen_input_bytes, layer_bytes
from hf_dsvllm.presets import Preset

__all__ = ["NODE_GPUS", "Loss", "Setup"]

Loss = Literal["trl", "plain"]
NODE_GPUS = 8  # of one machine, where several are needed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run: a model under a preset.  `micro` sequences of `length` tokens a process, `accumulation` times a step."""

    shape: ModelShape
    preset: Preset
    world: int
    micro: int
    accumulation: int = 1
    length: int
    recompute: bool
    loss: Loss = "trl"
    lora_r: int = 16
    lora_dropout: bool = True  # TRL's ModelConfig: 0.05
    file_bytes: int = 5_000_000_000  # the largest file of weights; most of the hub's were saved in files of 5 GB
    optimizer_bytes: float = 8.0  # of state for each parameter stepped in fp32 (hf_dsvllm.optimizers)
    device: Literal["cuda", "cpu"] = "cuda"
    traced: Traced | None = None
    features: frozenset[str] = frozenset()  # speed features in force (hf_dsvllm.features.planned)

    @property
    def layer_bytes(self) -> int:
        """Bytes one layer saves for a token: counted where the model was traced, else computed."""
        if self.traced:
            return self.traced.of(self.numerics) + frozen_input_bytes(self.shape, self.numerics)
        return layer_bytes(self.shape, self.numerics)

    @property
    def tokens(self) -> int:
        """Tokens of one process in one forward pass."""
        length = -(-self.length // self.world) if self.preset.sequence_parallel else self.length
        return self.micro * length

    @property
    def step_tokens(self) -> int:
        """Tokens of all processes in one optimizer step."""
        replicas = 1 if self.preset.sequence_parallel else self.world
        return replicas * self.micro * self.accumulation * self.length

    @property
    def sums_on_gpu(self) -> bool:
        """Whether an offloaded optimizer's gradients wait on the GPU for the end of the step (`hf_dsvllm.offload`)."""
        offloads = self.preset.offload_optimizer == "cpu"
        return offloads and self.accumulation > 1 and "gpu_gradients" in self.features

    @property
    def overlaps_offload(self) -> bool:
        """Whether an offloaded optimizer's copies go on behind other work (`hf_dsvllm.overlap_offload`)."""
        return self.preset.offload_optimizer == "cpu" and "overlap_offload" in self.features

    @property
    def whole_layers(self) -> bool:
        """Whether ZeRO-3 gathers a decoder layer as one unit (`hf_dsvllm.whole_layers`); never from the host."""
        preset = self.preset
        can = preset.zero_stage == 3 and preset.offload_param == "none" and self.layer_parameters <= LARGEST_LAYER
        return can and "whole_layers" in self.features

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer without its norms, the mean where they differ."""
        kinds = self.shape.parameters_by_kind
        return (kinds["attention"] + kinds["mlp"] + kinds["experts"]) // max(1, self.shape.layers)

    @property
    def method(self) -> Method:
        return self.preset.adapter or "full"

    @property
    def trainable(self) -> int:
        return self.shape.parameters if self.method == "full" else self.shape.lora_parameters(self.lora_r)

    @property
    def numerics(self) -> Numerics:
        """How `hf_dsvllm.adapters` and the Trainer set this preset up."""
        adapted = self.method != "full"
        keeps_inputs = self.method == "lora" and self.preset.zero_stage == 3
        if self.device == "cpu":
            return Numerics(
                method=self.method,
                weight_bytes=4,
                lora_r=self.lora_r if adapted else 0,
                dropout=adapted and self.lora_dropout,
                adapter_bytes=4,
                keeps_inputs=keeps_inputs,
            )
        plain = not self.preset.uses_deepspeed
        of_qlora = self.method == "qlora" and "fp32_adapters" in self.features
        wide = plain and (of_qlora or (self.method == "lora" and "bf16_adapters" not in self.features))
        one_operation = adapted and "fused_adapters" in self.features and self.preset.zero_stage != 3
        return Numerics(
            method=self.method,
            weight_bytes=4 if plain and not adapted else 2,
            autocast=plain,
            lora_r=self.lora_r if adapted else 0,
            dropout=adapted and self.lora_dropout,
            adapter_bytes=4 if wide else 2,
            casts=wide and not of_qlora and not one_operation and "lean_adapters" not in self.features,
            keeps_inputs=keeps_inputs,
            fused="fused" in self.features and self.traced is None and has_kernels(self.shape),
            one_operation=one_operation,
        )


def has_kernels(shape: ModelShape) -> bool:
    """Whether the feature `fused` has kernels for this kind of model (`hf_dsvllm.kernels`)."""
    return shape.model_type in FUSED_TYPES and shape.activation in FUSED_ACTIVATIONS
