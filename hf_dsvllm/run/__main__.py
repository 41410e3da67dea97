"""One rank: `python -m hf_dsvllm.run [--lora_r N …] SCRIPT …`, under torchrun, accelerate launch or no launcher."""

from __future__ import annotations

import sys

from hf_dsvllm.run.rank import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
