"""A tiny model, a server that takes weights (`weight_taker`) and the way from one to the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_dsvllm.engine import EngineClient, WeightSync
from hf_dsvllm.live import stream as live_weights
from tests.weight_taker import FakeServer, FakeVllm, gpu_spec, served

BUCKET_BYTES = 1 << 16  # the tiny model comes in four


def tiny_model(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


@contextlib.contextmanager
def syncing(fake: FakeVllm, **spec: Any) -> Iterator[WeightSync]:
    with served(fake) as uds:
        client = EngineClient(uds, default_timeout_s=30.0)
        yield WeightSync(FakeServer(fake, uds, gpu_spec(fake.backend, **spec)), client)  # type: ignore[arg-type]
        client.close()


def send(model: Any, sync: WeightSync, **changes: Any) -> Any:
    settings: dict[str, Any] = {"step": 7, "dtype": torch.bfloat16, "bucket_bytes": BUCKET_BYTES, "timeout_s": 30.0}
    return live_weights.send(model, sync, **(settings | changes))


def checkpoint(model: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
