"""A worker extension that the CPU engine loads (`--worker-extension-cls dsvllm_worker.DsvllmWorker`); no imports.

vLLM on CPU keeps packed copies of weights beside the parameters.  `reload_weights` repacks the layers whose weights are
in the checkpoint.  A tied output head is not among them: its parameter is the embedding's and becomes new, its packed
copy stays, and the server answers with new layers under the old head (seen with vLLM 0.32: log-probabilities off by 4).
On GPUs nothing is packed for unquantised layers, and the shared storage is enough.

Remove it when tests/integration/test_engine_vllm.py passes without (vLLM's tracker of such cases: issue #48312).  The
folder holds only what runs inside vLLM, since it is put on vLLM's PYTHONPATH.
"""

from __future__ import annotations


class DsvllmWorker:
    """Mixed into vLLM's worker, which has `model_runner`; its methods can be called through /collective_rpc."""

    def dsvllm_repack_shared_weights(self) -> int:
        """Pack again what is packed from a parameter that was kept; returns the number of layers."""
        repacked = 0
        for layer in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            # vLLM drops the parameter of an ordinary linear layer once packed; embedding and head keep theirs.
            if hasattr(layer, "cpu_linear") and layer.weight.numel() > 0:
                layer.quant_method.process_weights_after_loading(layer)
                repacked += 1
        return repacked
