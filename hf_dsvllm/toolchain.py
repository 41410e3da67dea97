"""What DeepSpeed needs to build its ops on this machine: a compiler, and libaio for NVMe.  Neither is imported."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["cuda_compiler", "cxx_compiler", "links_libaio"]

# The function whose presence DeepSpeed's own AsyncIOBuilder.is_compatible tests (op_builder/async_io.py, 0.19.8).
_PROGRAM = "#include <libaio.h>\nint main(void) { return io_submit(0, 0, 0); }\n"
COMPILE_TIMEOUT_S = 60


def cxx_compiler() -> str | None:
    """The C++ compiler torch builds extensions with ($CXX, else c++ or g++), None without one."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    return next((found for name in (*named, "c++", "g++") if (found := shutil.which(name))), None)


def cuda_compiler() -> str | None:
    """nvcc, on the PATH or under CUDA_HOME; None without one."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


def links_libaio() -> bool:
    """Whether a program using libaio compiles and links; CFLAGS, CPATH, LDFLAGS and LIBRARY_PATH count, as in a build.

    False without a compiler.
    """
    compiler = cxx_compiler()
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory(prefix="dsvllm-libaio-") as folder:
        source = Path(folder) / "uses_libaio.cpp"
        source.write_text(_PROGRAM, encoding="utf-8")
        command = [compiler, *shlex.split(os.environ.get("CFLAGS", "")), str(source)]
        command += ["-o", str(Path(folder) / "uses_libaio"), *shlex.split(os.environ.get("LDFLAGS", "")), "-laio"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0
