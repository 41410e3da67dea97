"""The package as a whole: what it exports, what it imports at start, and what must never be written into it."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import hf_dsvllm

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("accelerate", "bitsandbytes", "datasets", "deepspeed", "peft", "torch", "transformers", "trl", "vllm")
# Modules that work before any model is loaded; importing them must cost nothing.
LIGHT = (
    "hf_dsvllm",
    "hf_dsvllm.cli",
    "hf_dsvllm.ds_config",
    "hf_dsvllm.engine",
    "hf_dsvllm.errors",
    "hf_dsvllm.files",
    "hf_dsvllm.hardware",
    "hf_dsvllm.memory",
    "hf_dsvllm.metrics",
    "hf_dsvllm.model_shape",
    "hf_dsvllm.presets",
    "hf_dsvllm.serve.command",
    "hf_dsvllm.tasks",
)
MAX_LINES = 400
TEXT_SUFFIXES = {".py", ".md", ".toml", ".sh", ".yaml", ".yml", ".json", ".jsonl", ".jinja", ""}
# An absolute path below someone's home or work folder: it exists on the writer's machine alone.
MACHINE_PATH = re.compile(r"(?<![\w.}/])/(?:home|root|Users|work|workspace)/\w")


def python_files() -> list[Path]:
    return sorted(
        path for folder in ("hf_dsvllm", "recipes", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )


def project_files() -> list[Path]:
    folders = ("hf_dsvllm", "recipes", "tests", "docs", "benchmarks", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    return sorted(path for path in files if path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts)


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in `sys.modules` of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")[-2].split())


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert metadata.version("hf-dsvllm") == hf_dsvllm.__version__


def test_every_public_name_resolves_and_is_what_its_module_defines() -> None:
    for name in set(hf_dsvllm.__all__) - {"__version__"}:
        module = importlib.import_module(f"hf_dsvllm.{hf_dsvllm._EXPORTS[name]}")
        assert getattr(hf_dsvllm, name) is getattr(module, name)


def test_type_checkers_and_the_lazy_import_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "hf_dsvllm" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: statement.module.removeprefix("hf_dsvllm.")
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module
        for alias in statement.names
    }
    assert declared == hf_dsvllm._EXPORTS
    assert sorted(hf_dsvllm.__all__) == sorted([*declared, "__version__"])


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'with_preset'"):
        _ = hf_dsvllm.with_preset  # type: ignore[attr-defined]


def test_dir_lists_the_public_names() -> None:
    assert set(hf_dsvllm.__all__) <= set(dir(hf_dsvllm))


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "hf_dsvllm" / "py.typed").exists()


@pytest.mark.parametrize("module", LIGHT)
def test_a_module_used_before_a_model_is_loaded_imports_no_framework(module: str) -> None:
    assert loaded_after(f"import {module}").isdisjoint(HEAVY)


def test_the_commands_help_imports_no_framework() -> None:
    ask = "import sys; sys.argv = ['hf-dsvllm', '--help']\nfrom hf_dsvllm.cli import main"
    run_help = f"{ask}\ntry: main()\nexcept SystemExit: pass"
    assert loaded_after(run_help).isdisjoint(HEAVY)


def test_no_python_file_is_too_long_to_read_in_one_sitting() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_names_a_path_of_anyones_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in project_files()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_every_module_of_the_architecture_table_exists_and_is_in_a_layer() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {contract["type"]: contract for contract in reversed(project["tool"]["importlinter"]["contracts"])}
    layers = set(re.findall(r"\w+", " ".join(contracts["layers"]["layers"])))
    rows = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    modules = {name for row in rows for name in re.findall(r"`(\w+)/?`", row.split("|")[0])}
    assert modules, "docs/architecture.md has no table of modules"
    for name in modules:
        assert (ROOT / "hf_dsvllm" / name).is_dir() or (ROOT / "hf_dsvllm" / f"{name}.py").exists(), name
    assert modules <= layers


def test_the_architecture_lists_every_module_of_the_packages_that_it_opens() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed: dict[str, list[str]] = {}
    for package, module in re.findall(r"^\| `(\w+)/(\w+)` \|", text, re.MULTILINE):
        listed.setdefault(package, []).append(module)
    assert len(listed) >= 5
    for package, modules in listed.items():
        there = {path.stem for path in (ROOT / "hf_dsvllm" / package).glob("*.py")} - {"__init__"}
        assert sorted(modules) == sorted(there), package


def test_nothing_imports_vllm_but_what_runs_inside_its_process() -> None:
    inside = ROOT / "hf_dsvllm" / "engine" / "inside_vllm"
    for path in set((ROOT / "hf_dsvllm").rglob("*.py")) - set(inside.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not any(name.partition(".")[0] == "vllm" for name in names), path
