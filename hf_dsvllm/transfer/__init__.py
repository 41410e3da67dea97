"""The sender's end of vLLM's weight transfer: tensors to its workers by CUDA IPC or NCCL, without importing vLLM."""

from hf_dsvllm.transfer.base import Bucket, Transfer
from hf_dsvllm.transfer.ipc import IpcTransfer
from hf_dsvllm.transfer.nccl import NcclTransfer

__all__ = ["Bucket", "IpcTransfer", "NcclTransfer", "Transfer"]
