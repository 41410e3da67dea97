"""The rates of the machine at hand, measured in a few seconds: what the planner's seconds are computed from.

Every function returns plain numbers in SI units (FLOP/s, bytes/s, seconds).  torch is imported when one is called.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_dsvllm.files import write_json
from hf_dsvllm.hardware import detect
from hf_dsvllm.planner.cards import calibration_file

__all__ = ["calibrate_machine", "measure", "measure_collectives"]

MIB = 1 << 20
# Tokens x inputs x outputs of real training products: small, middle and large models.
PRODUCTS = ((4096, 1024, 3072), (4096, 2048, 6144), (8192, 2560, 9728), (8192, 4096, 12288), (8192, 5120, 17408))
ATTENTION = ((8, 1024), (2, 4096), (1, 16384))  # batch x length; 32 heads of 128
COLLECTIVE_MIB = (1, 16, 128, 512)
ADAM_PARAMETERS = 50_000_000
HOST_COPY_MIB = 2048  # beyond the caches of large servers
DRIVE_MIB = 1024


def calibrate_machine(file: Path | None = None, *, nvme_path: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Measure this machine and keep the record where the planner looks for it; the file and the record.

    `nvme_path`: a folder on the drive that offloading will use, to measure it too.
    """
    count = len(detect().gpus)
    record = measure("cuda" if count else "cpu")
    record["collectives"] = {str(world): collectives_of(world) for world in (2, 4, 8) if world <= count}
    if nvme_path is not None:
        record["nvme_bytes_per_s"] = drive_rate(nvme_path)
    path = file or calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path, record


def collectives_of(world: int) -> dict[str, Any]:
    """`measure_collectives` in `world` processes, one a GPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import json; from hf_dsvllm.calibrate import measure_collectives as m; print(json.dumps(m()))"
    ranks = []
    for rank in range(world):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in ranks]
    return dict(json.loads(outputs[0].strip().splitlines()[-1]))


def measure(device: str = "cuda", *, adam: bool = True) -> dict[str, Any]:
    """Rates of one process: products, attention, copies, the host link, kernel launches, Adam on the CPU."""
    import torch

    rates: dict[str, Any] = {"device": device, "threads": torch.get_num_threads()}
    rates["device_name"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rates["matmul_flops"] = matmul_rates(device)
    rates["copy_bytes_per_s"] = copy_rate(device)
    if device == "cuda":
        rates["device_bytes"] = torch.cuda.get_device_properties(0).total_memory
        rates["host_copy_bytes_per_s"] = copy_rate("cpu", HOST_COPY_MIB)
        rates |= attention_rates() | link_rates() | launch_rates()
        torch.cuda.empty_cache()
    rates["adam_parameters_per_s"] = cpu_adam_rate() if device == "cuda" and adam else None
    return rates


def matmul_rates(device: str) -> dict[str, float]:
    """FLOP/s of forward-like products, by `tokens x inputs x outputs`; bf16 on GPUs, fp32 on CPUs."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rates = {}
    for tokens, inputs, outputs in PRODUCTS if device == "cuda" else ((512, 576, 1536), (1024, 1024, 3072)):
        left = torch.randn(tokens, inputs, device=device, dtype=dtype)
        right = torch.randn(outputs, inputs, device=device, dtype=dtype)

        def product(left: Any = left, right: Any = right) -> Any:
            return left @ right.T

        repeats = 30 if device == "cuda" else 3
        rates[f"{tokens}x{inputs}x{outputs}"] = 2 * tokens * inputs * outputs / seconds_of(product, device, repeats)
    return rates


def copy_rate(device: str, mib: int | None = None) -> float:
    """Bytes read and written a second when a tensor is copied on the device, by all threads of this process."""
    import torch

    size = (mib or (1024 if device == "cuda" else 128)) * MIB
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, 5)


def attention_rates() -> dict[str, dict[str, float]]:
    """FLOP/s of causal attention as the Trainer's default (`sdpa`) runs it; half of the square is counted.

    forward = 2 * batch * heads * length^2 * head_dim;  backward = 2.5 times that  (FlashAttention-2, section 4).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    forward, backward = {}, {}
    for batch, length in ATTENTION:
        query, key, value = (
            torch.randn(batch, 32, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        flops = 2 * batch * 32 * length**2 * 128

        def run(query: Any = query, key: Any = key, value: Any = value) -> Any:
            return scaled_dot_product_attention(query, key, value, is_causal=True)

        seconds = seconds_of(run, "cuda", 10)
        gradient = torch.randn_like(query)

        def both(run: Any = run, gradient: Any = gradient) -> None:
            run().backward(gradient)

        forward[f"{batch}x{length}"] = flops / seconds
        backward[f"{batch}x{length}"] = 2.5 * flops / (seconds_of(both, "cuda", 10) - seconds)
    return {"attention_forward_flops": forward, "attention_backward_flops": backward}


def link_rates() -> dict[str, float]:
    """Bytes a second between pinned host memory and the device, each way."""
    import torch

    size = 512 * MIB
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    return {
        "host_to_device_bytes_per_s": size / seconds_of(lambda: device.copy_(host, non_blocking=True), "cuda", 5),
        "device_to_host_bytes_per_s": size / seconds_of(lambda: host.copy_(device, non_blocking=True), "cuda", 5),
    }


def launch_rates() -> dict[str, float]:
    """Seconds of one small operation from Python: without gradient, and with its backward pass."""
    import torch

    small = torch.ones(1024, device="cuda")
    tracked = torch.ones(1024, device="cuda", requires_grad=True)

    def forward() -> None:
        value = small
        for _ in range(200):
            value = value + small

    def backward() -> None:
        value = tracked
        for _ in range(200):
            value = value * small
        value.sum().backward()

    return {
        "launch_s": seconds_of(forward, "cuda", 5) / 200,
        "launch_with_backward_s": seconds_of(backward, "cuda", 5) / 200,
    }


def cpu_adam_rate() -> float | None:
    """Parameters a second that DeepSpeedCPUAdam updates with this process's threads; None where it cannot be built."""
    import torch

    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        parameter = torch.nn.Parameter(torch.zeros(ADAM_PARAMETERS))
        optimizer = DeepSpeedCPUAdam([parameter])
    except Exception:  # no compiler, or a build that fails: offloading does not work here either
        return None
    parameter.grad = torch.full_like(parameter, 1e-3)
    return ADAM_PARAMETERS / seconds_of(optimizer.step, "cpu", 3)


def drive_rate(folder: Path, mib: int = DRIVE_MIB) -> float:
    """Bytes a second through a file past the page cache, written and read back, in blocks as DeepSpeed's aio has them.

    Raises OSError where the drive's file system allows no direct access.
    """
    block = mmap.mmap(-1, MIB)  # direct access wants memory on a page's boundary
    block.write(os.urandom(MIB))
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    try:
        began = time.perf_counter()
        for flags, move in ((os.O_WRONLY, os.writev), (os.O_RDONLY, os.readv)):
            direct = os.open(name, flags | os.O_DIRECT)
            try:
                for _ in range(mib):
                    move(direct, [block])
                if flags == os.O_WRONLY:
                    os.fsync(direct)
            finally:
                os.close(direct)
        return 2 * mib * MIB / (time.perf_counter() - began)
    finally:
        os.unlink(name)


def measure_collectives(device: str = "cuda") -> dict[str, Any]:
    """Bytes a second of all-gather, reduce-scatter and all-reduce, by size of the whole tensor; one rank of a group.

    Rates count the bytes that cross each link: (n-1)/n of the whole for the first two, twice that for all-reduce.
    """
    import torch
    from torch import distributed

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    world = distributed.get_world_size()
    rates: dict[str, dict[str, float]] = {"all_gather": {}, "reduce_scatter": {}, "all_reduce": {}}
    for mib in COLLECTIVE_MIB if device == "cuda" else (1, 16):
        whole = torch.zeros(mib * MIB // 2, device=device, dtype=torch.bfloat16)
        part = torch.zeros(whole.numel() // world, device=device, dtype=torch.bfloat16)
        crossing = mib * MIB * (world - 1) / world
        calls: dict[str, Callable[[], object]] = {
            "all_gather": lambda w=whole, p=part: distributed.all_gather_into_tensor(w, p),
            "all_reduce": lambda w=whole: distributed.all_reduce(w),
        }
        if device == "cuda":
            calls["reduce_scatter"] = lambda w=whole, p=part: distributed.reduce_scatter_tensor(p, w)
        for name, call in calls.items():
            counted = crossing * (2 if name == "all_reduce" else 1)
            rates[name][str(mib)] = counted / seconds_of(call, device, 10)
    distributed.destroy_process_group()
    return {"world": world, "device": device, **rates}


def seconds_of(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of one call after three that warm up; of blocks of calls on a GPU, which runs behind."""
    import torch

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    timed(3 if device == "cuda" else 1)
    return statistics.median(timed(repeats if device == "cuda" else 1) for _ in range(3))
