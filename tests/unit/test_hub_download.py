"""Of a repository on the hub only the weights that are read are downloaded, whatever else lies beside them."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
import pytest

from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.source import find_source, local_base

COMMIT = "c" * 40
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TWICE = ("consolidated.safetensors", "original/model.safetensors", "original/dtypes.json")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}})
Hold = Callable[..., list[str | None]]


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hold:
    """A repository with these files; returns the revisions that are asked for, as they come."""
    monkeypatch.chdir(tmp_path)

    def holding(*files: str, commit: str = COMMIT) -> list[str | None]:
        asked: list[str | None] = []

        def download(name: str, *, revision: str | None, allow_patterns: Sequence[str]) -> str:
            if name != "me/model":
                raise OSError("404 Client Error")
            asked.append(revision)
            for file in files:
                if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                    path = tmp_path / "hub" / commit / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(INDEX if file.endswith("index.json") else "{}")
            return str(tmp_path / "hub" / commit)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return holding


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}


def test_of_shards_those_that_the_index_names_are_downloaded(hold: Hold) -> None:
    asked = hold("config.json", "tokenizer.model", "model.safetensors.index.json", "model.safetensors", *SHARDS, *TWICE)
    folder = local_base("me/model", "v1")
    assert below(folder) == set(SHARDS)
    assert (folder / "tokenizer.model").is_file()
    assert asked == ["v1", COMMIT], "weights of the index's own commit"


def test_without_an_index_one_file_is_downloaded(hold: Hold) -> None:
    asked = hold("config.json", "model.safetensors", *TWICE, commit="a-folder")
    assert below(local_base("me/model")) == {"model.safetensors"}
    assert asked == [None, None]


def test_an_adapter_is_downloaded_and_so_are_a_pushed_runs_checkpoints(hold: Hold) -> None:
    adapter, checkpoint = "adapter_model.safetensors", "checkpoint-7/adapter_model.safetensors"
    hold("adapter_config.json", adapter, "checkpoint-7/adapter_config.json", checkpoint, *TWICE)
    source = find_source(Path("me/model"), "final")
    assert (source.kind, below(source.model_dir)) == ("adapter", {adapter, checkpoint})
    assert below(local_base("me/model")) >= {adapter}


def test_what_is_not_on_the_hub_is_said(hold: Hold) -> None:
    hold()
    with pytest.raises(ExportError, match=r"'me/other' is neither a folder nor reachable on the hub \(OSError\)"):
        local_base("me/other")
