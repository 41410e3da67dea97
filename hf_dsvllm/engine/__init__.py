"""The vLLM process: started, watched, fed with weights and asked, never imported."""

from hf_dsvllm.engine.client import Completion, EngineClient
from hf_dsvllm.engine.registry import EngineRecord, list_engines, reap
from hf_dsvllm.engine.server import EngineServer, EngineSpec, command, environment, find_vllm, lora_rank_bound
from hf_dsvllm.engine.sync import SyncResult, WeightSync

__all__ = [
    "Completion",
    "EngineClient",
    "EngineRecord",
    "EngineServer",
    "EngineSpec",
    "SyncResult",
    "WeightSync",
    "command",
    "environment",
    "find_vllm",
    "list_engines",
    "lora_rank_bound",
    "reap",
]
