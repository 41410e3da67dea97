"""What is to be run: a script, a module, or `trl sft`; where its file is, and what stands in it.  Nothing is imported.

Modules are looked for the way `python -m` would, but for running the packages they are in.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.machinery
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from hf_dsvllm.errors import Problem

__all__ = ["Target", "find_target"]

STARTERS = re.compile(r"python[\d.]*|torchrun|accelerate|deepspeed")
OTHER_KINDS = {
    ".ipynb": ("a notebook", "jupyter nbconvert --to script {path}, then run {stem}.py"),
    **dict.fromkeys((".sh", ".bash"), ("a shell script", "the Python script that it starts, with its arguments")),
    **dict.fromkeys((".yaml", ".yml", ".json"), ("no script", "SCRIPT {path}, or SCRIPT --config {path}")),
}
# What a script that reads its command line has in its text.
WRITES_ARGUMENTS = re.compile(r"(?:TrainingArguments|Config)\(")
READS_ARGUMENTS = re.compile(r"argv|[Pp]arse|\b(?:click|typer|fire|hydra|absl|tyro|cli)\b")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`name` is as typed; `path` is None for a module, `file` for a module that is no Python source."""

    name: str
    path: Path | None
    file: Path | None

    @property
    def source(self) -> str:
        return self.file.read_text(encoding="utf-8", errors="replace") if self.file is not None else ""

    @property
    def takes_no_arguments(self) -> bool:
        """Whether the script writes its training arguments out and shows no sign of reading a command line."""
        return bool(WRITES_ARGUMENTS.search(self.source)) and not READS_ARGUMENTS.search(self.source)

    def mentions(self, name: str) -> bool:
        """Whether `name`, with either line, is a word of the script or of a file in its folder or package."""
        word = re.compile(rf"(?<![\w.]){name.replace('_', '[-_]')}(?![\w-])")
        return self.file is None or any(word.search(text) for text in self._texts())

    def _texts(self) -> Iterator[str]:
        yield self.source
        assert self.file is not None
        up = self.name.count(".") if self.path is None else 0
        folder = self.file.resolve().parents[max(up - 1, 0)]
        for pattern in ("*.py", "*/*.py"):
            for file in folder.glob(pattern):
                yield file.read_text(encoding="utf-8", errors="replace")


def find_target(words: list[str], *, module: bool) -> tuple[Target, list[str], list[Problem]]:
    """`words` → (what is run, the words after it, what is wrong with it)."""
    name, rest = words[0], words[1:]
    if module:
        file, problems = _module(name)
        return Target(name=name, path=None, file=file), rest, problems
    if name == "trl" and not Path(name).exists():
        path, problems = _trl_script("" if not rest or rest[0].startswith("-") else rest[0])
        return Target(name=str(path), path=path, file=path), rest[1:], problems
    path = Path(name)
    return Target(name=name, path=path, file=path), rest, _script_problems(path, rest)


def _script_problems(path: Path, rest: list[str]) -> list[Problem]:
    if STARTERS.fullmatch(path.name) and path.suffix != ".py":
        return [Problem(f"{path} is no script: this command starts the processes", f"leave {path} out")]
    if path.is_dir():
        return [Problem(f"script {path} is a folder", _in_folder(path))]
    if not path.is_file():
        return [Problem(f"script {path} does not exist", _near(path))]
    return _text_problems(path)


def _in_folder(path: Path) -> str:
    if (path / "__main__.py").is_file():
        return f"{path / '__main__.py'}, or the name of the package: -m {path.name}"
    scripts = sorted(map(str, path.glob("*.py")))
    return f"one of the scripts in it: {', '.join(scripts[:5])}" if scripts else "the path of a script"


def _near(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    files = [str(file) if path.parent == folder else file.name for file in folder.glob("*.py")]
    near = difflib.get_close_matches(str(path), files, n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else f"no script of a similar name is in {folder.absolute()}"


def _text_problems(path: Path) -> list[Problem]:
    """A file that is not Python."""
    if path.suffix in OTHER_KINDS:
        kind, fix = OTHER_KINDS[path.suffix]
        return [Problem(f"{path} is {kind}", fix.format(path=path, stem=path.stem))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        return [Problem(f"{path} is not Python: line {error.lineno}: {error.msg}", "correct it, or name another file")]
    except (OSError, ValueError) as error:
        return [Problem(f"{path} cannot be read as Python: {error}", "name another file")]
    return []


def _module(name: str) -> tuple[Path | None, list[Problem]]:
    """The file that `python -m name` would run."""
    if name.endswith(".py") or os.sep in name:
        return None, [Problem(f"-m {name} is a file, -m takes the name of a module", f"leave -m out: {name}")]
    spec = _spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        what = f"-m {name} is a package that has no __main__"
        name += ".__main__"
        spec = _spec(name)
    else:
        what = f"-m {name}: there is no such module here"
    if spec is None:
        where = "" if sys.flags.safe_path else f" {Path().absolute()} or"
        return None, [Problem(what, f"the name of a module in{where} {sys.executable}'s packages")]
    return (Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None), []


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """`importlib.util.find_spec` from the working directory, without running the packages around the module."""
    first, *inner = name.split(".")
    here = [] if sys.flags.safe_path else [os.getcwd()]
    spec = importlib.machinery.PathFinder.find_spec(first, here) if here else None
    spec = spec or _top_level(first)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        places = list(spec.submodule_search_locations)
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", places)
    return spec


def _top_level(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name) if name else None
    except (ImportError, ValueError):
        return None


def _trl_script(name: str) -> tuple[Path, list[Problem]]:
    """TRL's own script; found without importing TRL, which takes seconds."""
    spec = _top_level("trl")
    if spec is None or not spec.submodule_search_locations:
        return Path("trl"), [Problem("trl is not installed", f"{sys.executable} -m pip install trl")]
    folder = Path(next(iter(spec.submodule_search_locations))) / "scripts"
    names = sorted(file.stem for file in folder.glob("*.py") if _trains(file))
    problem = Problem(f"trl {name} is no training script of the installed TRL", f"trl {', '.join(names)}")
    if not name:
        problem = Problem("trl stands alone: which of its scripts?", f"trl {', '.join(names)}")
    return folder / f"{name}.py", [] if name in names else [problem]


def _trains(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return "def make_parser" in text and "training_args" in text
