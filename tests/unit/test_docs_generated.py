"""The generated parts of the documentation are what the code says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from hf_dsvllm.fields import added_fields
from hf_dsvllm.presets import preset_names

DOCS = Path(__file__).resolve().parents[2] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["arguments.md", "presets.md"])
def test_a_generated_page_is_up_to_date(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == generator().pages()[DOCS / name], "run `python docs/generate.py`"


def test_every_preset_and_every_argument_is_documented() -> None:
    presets, arguments = ((DOCS / name).read_text(encoding="utf-8") for name in ("presets.md", "arguments.md"))
    assert [name for name in preset_names() if f"| `{name}`" not in presets] == []
    assert [name for name in added_fields() if f"| `--{name}`" not in arguments] == []


def test_a_page_without_its_marks_is_not_written_over() -> None:
    with pytest.raises(ValueError, match="has lost its marks"):
        generator().presets_page("# Presets\n")
