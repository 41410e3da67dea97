"""Acting on a module when the script imports it, and naming the script's line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hf_dsvllm.run.importing import when_imported
from hf_dsvllm.run.lines import script_line, without_our_frames


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An importable package `watched` with a module `inner`, and a clean import system afterwards."""
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "inner.py").write_text("value = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "watched.inner"
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == "watched"]:
        del sys.modules[name]


def change(module: ModuleType) -> None:
    module.value = module.value + 1  # type: ignore[attr-defined]


def test_the_action_follows_the_import_and_happens_once(package: str) -> None:
    when_imported({package: change})
    assert package not in sys.modules
    module = importlib.import_module(package)
    assert module.value == 2
    importlib.import_module(package)
    assert module.value == 2


def test_a_module_that_is_only_looked_for_keeps_its_action(package: str) -> None:
    when_imported({package: change})
    assert importlib.util.find_spec(package) is not None
    assert package not in sys.modules
    module = importlib.import_module(package)
    assert module.value == 2
    assert importlib.reload(module).value == 2


def test_a_watched_module_that_looks_for_another_gets_both_actions_once(package: str) -> None:
    folder = Path(str(importlib.import_module("watched").__file__)).parent
    (folder / "outer.py").write_text(
        f"import importlib.util\nimportlib.util.find_spec('{package}')\nimport {package} as inner\nvalue = 5\n",
        encoding="utf-8",
    )
    when_imported({"watched.outer": change, package: change})
    module = importlib.import_module("watched.outer")
    assert (module.value, module.inner.value) == (6, 2)


def test_a_parent_package_that_imports_a_watched_module_gets_both_actions_once(package: str, tmp_path: Path) -> None:
    (tmp_path / "watched" / "__init__.py").write_text("from . import inner\n", encoding="utf-8")
    (tmp_path / "watched" / "other.py").write_text("value = 5\n", encoding="utf-8")
    when_imported({"watched.other": change, package: change})
    assert importlib.util.find_spec("watched.other") is not None
    assert importlib.import_module("watched.other").value == 6
    assert sys.modules[package].value == 2


def test_a_module_that_is_there_already_is_acted_on_at_once(package: str) -> None:
    module = importlib.import_module(package)
    when_imported({package: change})
    assert module.value == 2


def test_other_modules_and_missing_ones_are_as_before(package: str) -> None:
    when_imported({"watched.absent": change})
    assert importlib.import_module(package).value == 1
    with pytest.raises(ModuleNotFoundError, match=r"watched\.absent"):
        importlib.import_module("watched.absent")


def test_the_line_named_is_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    line = script_line()
    assert line.startswith("test_run_importing.py:")
    assert "script_line()" in Path(__file__).read_text(encoding="utf-8").splitlines()[int(line.partition(":")[2]) - 1]


def test_an_error_of_our_own_keeps_our_frames() -> None:
    try:
        when_imported(None)  # type: ignore[arg-type]
    except AttributeError as error:
        kept = without_our_frames(error).__traceback__
    assert kept is not None
    assert kept.tb_next is not None
