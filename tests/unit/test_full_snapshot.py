"""A full model's snapshot is written tensor by tensor, and is the folder that transformers would have written."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.live import full_model
from hf_dsvllm.live import snapshot as snapshot_module
from hf_dsvllm.live.snapshot import publish
from hf_dsvllm.tensors import shard_file
from hf_dsvllm.tensors.shard_writer import ShardWriter
from tests.full_models import HEADS, SIZES, STREAMED, contents, experts, llama, same_bits
from tests.tiny import write_tiny_model, write_tiny_tokenizer


def by_transformers(patch: pytest.MonkeyPatch, model: Any, run_dir: Path, **how: Any) -> Path:
    """The same snapshot as save_pretrained writes it from tensors that are all on the CPU."""
    with patch.context() as whole:
        whole.setattr(full_model, "changes_names_alone", lambda *_: False)
        whole.setattr(full_model, "ShardWriter", None)
        return publish(model, run_dir, **how).path


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of each bucket that was streamed to files."""
    buckets: list[list[str]] = []
    write = ShardWriter.write

    def noted(self: ShardWriter, tensors: Mapping[str, torch.Tensor]) -> None:
        buckets.append(list(tensors))
        write(self, tensors)

    monkeypatch.setattr(ShardWriter, "write", noted)
    return buckets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_snapshot_is_the_folder_that_transformers_writes(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[list[str]]
) -> None:
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    model = STREAMED[name](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_tokenizer(tmp_path / "tokenizer"))
    how: dict[str, Any] = {"step": 3, "dtype": dtype, "tokenizer": tokenizer}
    wanted = by_transformers(monkeypatch, model, tmp_path / "whole", **how)
    assert not written
    monkeypatch.setattr(snapshot_module, "_WRITE_BYTES", 1 << 14)
    if dtype == torch.bfloat16:
        monkeypatch.setattr(shard_file, "SMALL_BYTES", 0)  # by several threads
    found = publish(model, tmp_path / "streamed", **how).path
    assert len(written) > 3
    tensors, files = contents(found)
    wanted_tensors, wanted_files = contents(wanted)
    assert same_bits(tensors, wanted_tensors)
    assert files == wanted_files
    assert {"config.json", "tokenizer.json"} <= files.keys()
    assert ("generation_config.json" in files) == (name != "a decoder alone")
    assert ("modeling_own.py" in files) == (name == "remote code")
    assert ("embed_out.weight" in tensors) == (name == "renamed")
    assert ("lm_head.weight" in tensors) == (name in ("llama untied", "qwen3 untied", "diverged", "ignored keys",
                                                      "remote code"))  # fmt: skip
    assert {str(path) for path in found.iterdir()} == {str(found / path.name) for path in wanted.iterdir()}


def test_fused_experts_are_split_by_transformers_from_the_whole_model(tmp_path: Path, written: list[list[str]]) -> None:
    torch.manual_seed(0)
    model = experts()
    model.save_pretrained(tmp_path / "saved")
    found = publish(model, tmp_path / "run", step=1, dtype=torch.float32).path
    assert not written
    tensors = contents(found)[0]
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in tensors
    assert same_bits(tensors, contents(tmp_path / "saved")[0])


def test_a_model_that_saves_in_its_own_way_is_asked_to(tmp_path: Path, written: list[list[str]]) -> None:
    from transformers import LlamaForCausalLM

    class Own(LlamaForCausalLM):
        def save_pretrained(self, folder: Path, *, state_dict: dict[str, torch.Tensor], **how: Any) -> None:
            state_dict["mine"] = torch.ones(1)
            super().save_pretrained(folder, state_dict=state_dict, **how)

    model = Own.from_pretrained(write_tiny_model(tmp_path / "base"))
    assert "mine" in contents(publish(model, tmp_path / "run", step=1, dtype=torch.float32).path)[0]
    assert not written


def test_a_large_model_goes_to_several_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(tmp_path, layers=4)
    monkeypatch.setattr(full_model, "_SHARD_BYTES", 1 << 16)
    found = publish(model, tmp_path / "run", step=1, dtype=torch.float32).path
    files = sorted(file.name for file in found.glob("*.safetensors"))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((found / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert sorted(set(index["weight_map"].values())) == files
    loaded = AutoModelForCausalLM.from_pretrained(found).state_dict()
    assert same_bits(loaded, model.state_dict())
    monkeypatch.setattr(full_model, "_MANY_FILES", 3)
    again = publish(model, tmp_path / "few", step=1, dtype=torch.float32).path
    assert len(list(again.glob("*.safetensors"))) in (3, 4)


def full_after(writes: int) -> Callable[[int, memoryview, int], int]:
    """os.pwrite on a disk that is full after some of them."""
    pwrite, done = os.pwrite, [0]

    def until_full(descriptor: int, data: memoryview, offset: int) -> int:
        done[0] += 1
        if done[0] > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    return until_full


@pytest.mark.parametrize("writes", [0, 1, 7, 20])
def test_a_full_disk_is_told_and_the_snapshot_before_stays(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tmp_path)
    before = publish(model, tmp_path / "run", step=3, dtype=torch.float32).path
    wanted = contents(before)
    with torch.no_grad():
        model.model.norm.weight.fill_(7.0)
    monkeypatch.setattr(shard_file.os, "pwrite", full_after(writes))
    with pytest.raises(ExportError, match=r"model\.safetensors cannot be written: No space left on device; free some"):
        publish(model, tmp_path / "run", step=3, dtype=torch.float32)
    assert [path.name for path in before.parent.iterdir() if path.is_dir()] == ["step-3"]
    assert same_bits(contents(before)[0], wanted[0])


def test_no_tensor_of_a_bucket_is_kept_when_the_next_one_is_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []
    plain = snapshot_module.plain_source

    def watched(name: str, parameter: torch.nn.Parameter) -> Any:
        class Part:
            size_bytes, group, parameters = parameter.numel() * 4, None, (parameter,)

            def make(self) -> torch.Tensor:
                tensor = plain(name, parameter).make()
                alive.append(sum(ref() is not None for ref in seen))
                seen.append(weakref.ref(tensor))
                return tensor

        part = Part()
        part.name = name  # type: ignore[attr-defined]
        return part

    monkeypatch.setattr(snapshot_module, "_WRITE_BYTES", 1)
    monkeypatch.setattr(snapshot_module, "plain_source", watched)
    for change in (True, False):
        monkeypatch.setattr(full_model, "changes_names_alone", lambda *_, change=change: change)
        publish(llama(tmp_path), tmp_path / "run", step=1, dtype=torch.bfloat16)
        assert len(alive) > 10
        assert set(alive) == {0}
    monkeypatch.setattr(full_model, "changes_names_alone", lambda *_: True)
    for small in (1 << 30, 0):
        monkeypatch.setattr(shard_file, "SMALL_BYTES", small)
        monkeypatch.setattr(shard_file.os, "pwrite", full_after(7))
        with pytest.raises(ExportError) as told:
            publish(llama(tmp_path), tmp_path / "run", step=1, dtype=torch.bfloat16)
        assert told.value.__traceback__ is not None, "which knows every function that had the bucket"
        assert [ref for ref in seen if ref() is not None] == []


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def test_host_memory_holds_pieces_of_a_model_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SIZES | {"vocab_size": 64_000, "hidden_size": 512}  # 2 x 131 MB in fp32, written as 131
    model = LlamaForCausalLM(LlamaConfig(**sizes, **HEADS, tie_word_embeddings=False))
    monkeypatch.setattr(shard_file.os, "cpu_count", lambda: 2)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pytest.skip("this kernel does not start the peak anew")
    before = peak_bytes()
    found = publish(model, tmp_path / "run", step=1, dtype=torch.bfloat16).path
    assert sum(file.stat().st_size for file in found.glob("*.safetensors")) > 130e6
    assert peak_bytes() - before < 80e6
