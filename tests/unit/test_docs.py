"""README and docs say what the code does: every command, example, link and flag is held against it.

The blocks are found, not listed: a new example is tested by being written.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml

from hf_dsvllm import tasks
from hf_dsvllm.fields import added_fields
from hf_dsvllm.metrics import BUILT_IN
from hf_dsvllm.presets import get_preset
from hf_dsvllm.presets.select import preset_names

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("sft", "dpo", "continued_pretraining")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# What starts a line of a bash block and is not ours to check further.
FOREIGN = {".", "apt-get", "bash", "cd", "curl", "export", "git", "pip", "printf", "uv"}
# Flags of other programs the text may name.
FOREIGN_FLAGS = {
    *("--config_file", "--config", "--help", "--max-num-seqs", "--gpu-memory-utilization", "--no-deps"),
    *("--override", "--torch-backend", "--attention-backend", "--max-lora-rank"),
    *("--enforce-eager", "--no-enforce-eager"),
}


class Block(NamedTuple):
    """A fenced block: the document and line it starts on, its language, its text."""

    place: str
    language: str
    text: str


def documents() -> list[Path]:
    """Everything a reader is led to."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")),
            *sorted((ROOT / "benchmarks").glob("*.md"))]  # fmt: skip


def blocks(*languages: str) -> list[Block]:
    found = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(f"{path.relative_to(ROOT)}:{line}", match[1], match[2]))
    return [block for block in found if block.language in languages]


def parametrized(*languages: str) -> pytest.MarkDecorator:
    found = blocks(*languages)
    return pytest.mark.parametrize("block", found, ids=[block.place for block in found])


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# -- commands


def commands(text: str) -> list[list[str]]:
    """The commands of a bash block, as words, without comments and leading VARIABLE=value."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    for line in words:
        while line and re.fullmatch(r"[A-Z_]+=.*", line[0]):
            line.pop(0)
    return [line for line in words if line]


def load_recipe(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@functools.cache
def recipe_parser(name: str) -> argparse.ArgumentParser:
    """The parser a recipe builds, caught when it is about to parse."""
    module: Any = load_recipe(name)
    caught: list[argparse.ArgumentParser] = []

    class Caught(Exception):
        pass

    class Catching(module.TrlParser):  # type: ignore[misc, name-defined]
        def parse_args_and_config(self, *_args: Any, **_settings: Any) -> Any:
            caught.append(self)
            raise Caught

    module.TrlParser = Catching
    with pytest.raises(Caught):
        module.main()
    parser = caught[0]
    parser.allow_abbrev = False
    return parser


@functools.cache
def launchers() -> dict[str, argparse.ArgumentParser]:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    return {"accelerate": launch_command_parser(), "torchrun": get_args_parser()}


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(list(words))
    except SystemExit:
        pytest.fail(f"{parser.prog} does not take: {shlex.join(words)}")


def check_recipe(script: str, words: list[str]) -> None:
    path = ROOT / script
    assert path.is_file(), f"{script} does not exist"
    if path.parent.name != "recipes" or path.stem not in RECIPES:
        return
    if "--config" in words:  # read by TRL before the parser sees the rest
        position = words.index("--config")
        del words[position : position + 2]
    given = parse(recipe_parser(path.stem), words)
    if given.ds_preset:
        get_preset(given.ds_preset)
    for metric in given.gen_eval_metrics or ():
        assert metric in BUILT_IN or ":" in metric, metric


def check_ours(words: Sequence[str]) -> None:
    """Walk through the real command line's groups and parse, without running anything."""
    from typer.main import get_command

    from hf_dsvllm.cli import app

    command: Any = get_command(app)
    rest, parent, name = list(words), None, "hf-dsvllm"
    while True:
        try:
            context = command.make_context(name, rest, parent=parent)
        except Exception as error:
            pytest.fail(f"hf-dsvllm does not take {shlex.join(words)}: {type(error).__name__}: {error}")
        left = [*getattr(context, "_protected_args", ()), *context.args]
        if not hasattr(command, "resolve_command") or not left:
            return
        name, command, rest = command.resolve_command(context, left)
        parent = context


def check_make(words: Sequence[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for word in words:
        variable, sign, value = word.partition("=")
        if not sign:
            assert word in targets, f"make {word}: there is no such target"
            continue
        assert variable in {"PRESET", "MODEL", "ARGS"}, word
        if variable == "PRESET":
            get_preset(value)
        elif variable == "ARGS" and words[0] == "demo":
            demo = load_recipe("demo")
            before, sys.argv = sys.argv, ["demo.py", *shlex.split(value)]
            try:
                demo.parse()
            finally:
                sys.argv = before


def check_command(words: list[str]) -> None:
    program, rest = words[0], words[1:]
    if program == "hf-dsvllm":
        check_ours(rest)
    elif program == "make":
        check_make(rest)
    elif program in ("python", "python3") and not rest[0].startswith("-"):
        check_recipe(rest[0], rest[1:])
    elif program == "torchrun" or (program == "accelerate" and rest[0] == "launch"):
        given = parse(launchers()[program], rest[1:] if program == "accelerate" else rest)
        if given.module:
            assert importlib.util.find_spec(given.training_script), given.training_script
            return
        check_recipe(given.training_script, list(given.training_script_args))
    else:
        assert program in FOREIGN, f"{program}: not a command this test knows how to check"


@parametrized("bash", "sh", "shell", "console")
def test_every_command_is_accepted_by_the_program_it_calls(block: Block) -> None:
    assert block.language == "bash", "write ```bash"
    assert subprocess.run(["bash", "-n"], input=block.text, text=True, check=False).returncode == 0
    for words in commands(block.text):
        check_command(words)


# -- examples


def trains(tree: ast.AST) -> bool:
    """Whether running this would load a model or need a run's files."""
    calls = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return bool(calls & {"train", "prepare", "export_model"})


def check_names(text: str) -> None:
    """No undefined or unused name, by ruff's own reading."""
    line = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--stdin-filename", "example.py", "-"]
    done = subprocess.run(line, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def imported(tree: ast.AST) -> dict[str, Any]:
    """What the import statements of an example bind."""
    values: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            values |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            values |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
    return values


def check_keywords(tree: ast.AST) -> None:
    """The keywords of calls to imported things exist in their signatures."""
    known = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            signature = inspect.signature(known[node.func.id])
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            signature.bind_partial(*[None] * len(node.args), **keywords)


@parametrized("python")
def test_every_python_example_runs_or_at_least_names_what_exists(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = ast.parse(block.text)
    check_names(block.text)
    check_keywords(tree)
    if trains(tree):
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "1 + 1 =", "reference": " 2"}\n', encoding="utf-8")
    exec(compile(tree, block.place, "exec"), {"__name__": "example"})


@parametrized("json", "jsonl")
def test_every_json_example_is_json(block: Block) -> None:
    for text in block.text.splitlines() if block.language == "jsonl" else [block.text]:
        json.loads(text)


@parametrized("yaml")
def test_every_yaml_example_holds_arguments_of_the_recipes(block: Block) -> None:
    destinations = {action.dest for name in RECIPES for action in recipe_parser(name)._actions}
    assert set(yaml.safe_load(block.text)) <= destinations


def test_the_evaluation_lines_of_the_docs_make_a_task(tmp_path: Path) -> None:
    [block] = [block for block in blocks("jsonl") if block.place.startswith("docs/evaluation.md")]
    path = tmp_path / "My-Orders.jsonl"
    path.write_text(block.text, encoding="utf-8")
    task = tasks.load_task(path)
    assert task.name == "my_orders"
    assert len(task.samples) == len(block.text.splitlines())


# -- what the text names


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose(path))]
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in LINK.findall(prose(path)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{path.name} links to {target}"


def known_flags() -> set[str]:
    from typer.main import get_command

    from hf_dsvllm.cli import app

    flags = set(FOREIGN_FLAGS)
    for script in (path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        flags |= set(re.findall(r'add_argument\("(--\w+)"', script.read_text(encoding="utf-8")))
    parsers = [*(recipe_parser(name) for name in RECIPES), *launchers().values()]
    for parser in parsers:
        flags |= {option for action in parser._actions for option in action.option_strings}
    pending: list[Any] = [get_command(app)]
    while pending:
        command = pending.pop()
        pending += getattr(command, "commands", {}).values()
        flags |= {option for parameter in command.params for option in parameter.opts}
    return {flag.replace("-", "_") for flag in flags}


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_the_text_names_exists(path: Path) -> None:
    known = known_flags()
    for code in CODE.findall(prose(path)):
        for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code):
            assert flag.replace("-", "_") in known, f"{path.name}: `{code}`"


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_argument_of_ours_that_the_text_names_exists(path: Path) -> None:
    for code in CODE.findall(prose(path)):
        if re.fullmatch(r"(hf_dsvllm|recipes|tests|docs|benchmarks|\.ci)/[\w./-]*", code):
            assert (ROOT / code).exists(), f"{path.name}: `{code}`"
        if re.fullmatch(r"gen_eval_\w+|vllm_\w+", code):
            assert code in added_fields(), f"{path.name}: `{code}`"


def test_the_readme_places_every_preset() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Presets")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in CODE.findall(row)}
    assert set(preset_names()) <= named
    for name in named - set(preset_names()):
        assert get_preset(name).name == name  # a composition


def test_the_metrics_table_is_the_built_in_metrics() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").partition("## Metrics")[2]
    assert re.findall(r"^\| `(\w+)` \|", text.partition("\n## ")[0], re.MULTILINE) == list(BUILT_IN)


def test_the_tables_of_modules_are_in_the_order_of_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = [contract for contract in project["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"]
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(contracts) > 1
    for contract in contracts:
        [container] = contract["containers"]
        inside = container.removeprefix("hf_dsvllm").lstrip(".")
        prefix = f"{inside}/" if inside else ""
        rows = re.findall(rf"^\| `{prefix}(\w+)/?` \|", text, re.MULTILINE)
        assert rows == [re.sub(r"\W", "", layer) for layer in reversed(contract["layers"])], container
