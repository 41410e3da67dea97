"""`python -m hf_dsvllm`: the same as the `hf-dsvllm` command."""

from __future__ import annotations

from hf_dsvllm.cli import main

if __name__ == "__main__":
    main()
