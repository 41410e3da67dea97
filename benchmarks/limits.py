"""What this machine can do at best, measured in seconds: matrix products, copies on the device, the host link.

python benchmarks/limits.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options = parser.parse_args()
    print(json.dumps(on_gpu() if options.device == "cuda" else on_cpu()))


def on_gpu() -> dict[str, float | str]:
    """bf16 product of 8192 x 8192 matrices; a 4 GiB copy (bytes read and written); 2 GiB to and from pinned memory."""
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    right = torch.randn_like(left)
    source = torch.empty(4 * GIB, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    host = torch.empty(2 * GIB, dtype=torch.uint8).pin_memory()
    on_device = target[: 2 * GIB]
    return {
        "device": torch.cuda.get_device_name(),
        "matmul_tflops": round(2 * 8192**3 / seconds_of(lambda: left @ right, 30) / 1e12, 1),
        "device_copy_tb_per_s": round(2 * 4 * GIB / seconds_of(lambda: target.copy_(source), 10) / 1e12, 2),
        "host_to_device_gb_per_s": round(
            2 * GIB / seconds_of(lambda: on_device.copy_(host, non_blocking=True), 5) / 1e9, 1
        ),
        "device_to_host_gb_per_s": round(
            2 * GIB / seconds_of(lambda: host.copy_(on_device, non_blocking=True), 5) / 1e9, 1
        ),
    }


def on_cpu() -> dict[str, float | str]:
    """fp32 product of 2048 x 2048 matrices."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return {"device": "cpu", "matmul_tflops": round(2 * 2048**3 / seconds_of(lambda: left @ right, 5) / 1e12, 3)}


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Mean seconds of one call after warming up."""

    def finish() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(5):
        work()
    finish()
    started = time.monotonic()
    for _ in range(repeats):
        work()
    finish()
    return (time.monotonic() - started) / repeats


if __name__ == "__main__":
    main()
