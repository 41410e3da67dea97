"""The vLLM process: started, watched, fed with weights and asked, never imported."""

from hf_dsvllm.engine.capabilities import Capabilities, probe, why_no_transfer
from hf_dsvllm.engine.client import Completion, EngineClient, EngineRefusal
from hf_dsvllm.engine.registry import EngineRecord, list_engines, reap
from hf_dsvllm.engine.remote import RemoteServer
from hf_dsvllm.engine.server import EngineServer
from hf_dsvllm.engine.spec import EngineSpec, command, environment, find_vllm, lora_rank_bound
from hf_dsvllm.engine.sync import SyncResult, WeightSync

__all__ = [
    "Capabilities",
    "Completion",
    "EngineClient",
    "EngineRecord",
    "EngineRefusal",
    "EngineServer",
    "EngineSpec",
    "RemoteServer",
    "SyncResult",
    "WeightSync",
    "command",
    "environment",
    "find_vllm",
    "list_engines",
    "lora_rank_bound",
    "probe",
    "reap",
    "why_no_transfer",
]
