"""What DeepSpeed's ops are built with is tried rather than guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_dsvllm import toolchain


def test_the_compiler_the_user_names_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "my-c++"
    named.write_text("#!/bin/sh\n", encoding="utf-8")
    named.chmod(0o755)
    monkeypatch.setenv("CXX", f"{named} -O2")
    assert toolchain.cxx_compiler() == str(named)


def test_without_a_compiler_there_is_no_libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert toolchain.cxx_compiler() is None
    assert toolchain.links_libaio() is False


def test_libaio_elsewhere_is_found_through_the_flags_a_build_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-I/elsewhere*-L/elsewhere*-laio*) exit 0;; esac; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert toolchain.links_libaio() is False
    monkeypatch.setenv("CFLAGS", "-I/elsewhere")
    monkeypatch.setenv("LDFLAGS", "-L/elsewhere")
    assert toolchain.links_libaio() is True


def test_nvcc_is_looked_for_under_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n", encoding="utf-8")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.cuda_compiler() == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    assert toolchain.cuda_compiler() is None
