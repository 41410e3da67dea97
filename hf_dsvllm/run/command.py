"""What `hf-dsvllm run` was asked for: the script, its own arguments, and ours, wherever they stand.

Ours are those of `PresetFields`.  They are recognised anywhere after the script (`--ds_preset zero3`,
`--ds-preset=zero3`), in the script's `--config FILE.yaml` and in its `<script>.args` file; everything else stays the
script's, in its order.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from hf_dsvllm.adapters import ALL_LINEAR
from hf_dsvllm.errors import ConfigError, Problem
from hf_dsvllm.fields import PresetFields, added_fields

__all__ = [
    "COMMAND_LINE",
    "EXIT_FILE",
    "AdapterOptions",
    "Command",
    "Given",
    "nearest_of_ours",
    "read_command",
    "read_rank",
]

COMMAND_LINE = "the command line"
# The variable that names where a failing rank leaves its exit code: torchrun turns every code into 1.
EXIT_FILE = "HF_DSVLLM_EXIT_FILE"
_BOOLS = {**dict.fromkeys(("yes", "true", "t", "y", "1"), True), **dict.fromkeys(("no", "false", "f", "n", "0"), False)}
# How a word becomes a value of each kind there is, and what is wanted where it does not.
_READ: dict[Any, Callable[[str], Any]] = {bool: lambda text: _BOOLS[text.lower()], int: int, float: float, str: str}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number"}


def _kind(hint: Any) -> Any:
    """The type that a field holds besides None."""
    if not isinstance(hint, types.UnionType):
        return hint
    (kind,) = set(get_args(hint)) - {types.NoneType}
    return kind


_KINDS: dict[str, Any] = {name: _kind(hint) for name, hint in get_type_hints(PresetFields).items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """TRL's adapter flags, for scripts that have none; they stand before the script.  None: TRL's default."""

    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    lora_target_modules: tuple[str, ...] | None = None

    def chosen(self) -> dict[str, Any]:
        """The options that were given, as fields of TRL's `ModelConfig`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.lora_target_modules == (ALL_LINEAR,):
            values["lora_target_modules"] = ALL_LINEAR
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}

    def words(self) -> list[str]:
        """The options as they are typed."""
        texts = {name: ",".join(v) if isinstance(v, list) else str(v) for name, v in self.chosen().items()}
        return [word for name, text in texts.items() for word in (f"--{name}", text)]


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """One of our arguments: its value and where it stands."""

    value: Any
    place: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A script to run.  `path` is None for a module; `words` is everything from the script on, as typed."""

    target: str
    path: Path | None
    script_args: tuple[str, ...]
    given: Mapping[str, Given]
    adapter: AdapterOptions
    words: tuple[str, ...]

    def value(self, name: str) -> Any:
        """The value of one of our arguments, its default where it was not given."""
        default = next(field.default for field in dataclasses.fields(PresetFields) if field.name == name)
        return self.given[name].value if name in self.given else default

    @property
    def asks_for_help(self) -> bool:
        return bool({"-h", "--help"} & set(self.script_args))


def read_command(words: Sequence[str], *, module: bool = False, adapter: AdapterOptions | None = None) -> Command:
    """Split `words` (the script or module and all that follows); raises ConfigError with every problem.

    `trl sft …` stands for the script of that name in the installed TRL.
    """
    words = list(words)
    problems: list[Problem] = []
    target, rest, path = words[0], words[1:], None
    if target == "trl" and not module and rest:
        path, trouble = _trl_script(rest.pop(0))
        problems += trouble
        target = str(path)
    elif not module:
        path = Path(target)
        problems += _script_problems(path)
    script_args, ours, trouble = split(rest)
    problems += trouble
    places = [{name: Given(value, COMMAND_LINE) for name, value in ours.items()}]
    for place, values, trouble in (_from_yaml(script_args), _from_args_file(path)):
        problems += trouble
        places.append({name: Given(value, place) for name, value in values.items()})
    given, trouble = _merge(places)
    problems += trouble
    if problems:
        raise ConfigError(problems)
    return Command(
        target=target,
        path=path,
        script_args=tuple(script_args),
        given=given,
        adapter=adapter or AdapterOptions(),
        words=tuple(words),
    )


def read_rank(argv: Sequence[str]) -> Command:
    """The command line of `python -m hf_dsvllm.run`: adapter options, `-m`, then the script and all that follows."""
    parser = argparse.ArgumentParser(prog="python -m hf_dsvllm.run", allow_abbrev=False)
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("--lora_r", type=int)
    parser.add_argument("--lora_alpha", type=int)
    parser.add_argument("--lora_dropout", type=float)
    parser.add_argument("--lora_target_modules", type=lambda text: tuple(text.split(",")))
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="SCRIPT …")
    options = parser.parse_args(list(argv))
    if not options.words:
        parser.error("which script?")
    names = [field.name for field in dataclasses.fields(AdapterOptions)]
    adapter = AdapterOptions(**{name: getattr(options, name) for name in names})
    return read_command(options.words, module=options.module, adapter=adapter)


def split(words: Sequence[str]) -> tuple[list[str], dict[str, Any], list[Problem]]:
    """`words` → (the script's own, ours by name, what is wrong with ours)."""
    rest: list[str] = []
    ours: dict[str, Any] = {}
    problems: list[Problem] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += [word, *words]
            break
        flag, sign, text = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name.startswith("no_") and _KINDS.get(name[3:]) is bool:
            ours[name[3:]] = False
        elif name not in _KINDS:
            rest.append(word)
        else:
            values = [text] if sign else _take(_KINDS[name], words)
            value, problem = _convert(name, values)
            ours[name] = value
            problems += problem
    return rest, ours, problems


def nearest_of_ours(flag: str, *, cutoff: float = 0.9) -> str | None:
    """Our argument that `flag` may have been meant to be; None when none is near."""
    name = flag.partition("=")[0].lstrip("-").replace("-", "_")
    if name in _KINDS:
        return None
    near = difflib.get_close_matches(name, added_fields(), n=1, cutoff=cutoff)
    return f"--{near[0]}" if near else None


def _take(kind: Any, words: list[str]) -> list[str]:
    """The words after a flag that are its values, taken off `words`: argparse's rule, a flag holds no space."""

    def is_value() -> bool:
        return bool(words) and (not words[0].startswith("--") or " " in words[0])

    if kind is bool:
        return [words.pop(0)] if is_value() and words[0].lower() in _BOOLS else ["true"]
    taken = []
    while is_value() and (not taken or kind == list[str]):
        taken.append(words.pop(0))
    return taken


def _convert(name: str, texts: Sequence[str]) -> tuple[Any, list[Problem]]:
    kind = _KINDS[name]
    if not texts:
        return None, [Problem(f"--{name} has no value", f"--{name} VALUE, or leave it out")]
    if kind == list[str]:
        return list(texts), []
    try:
        return _READ[kind](texts[0]), []
    except (KeyError, ValueError):
        wanted = _WANTED[kind]
        return None, [Problem(f"--{name} {texts[0]} is not {wanted}", f"--{name} with {wanted}")]


def _convert_yaml(name: str, value: Any) -> tuple[Any, list[Problem]]:
    """A value of a YAML file, read as if it were typed; a text alone is a list of one."""
    kind = _KINDS[name]
    if value is None:
        return (None, []) if getattr(PresetFields, name) is None else _convert(name, [])
    if kind not in (str, list[str]):
        return _convert(name, [str(value)])
    texts = value if kind == list[str] and isinstance(value, list) else [value]
    other = next((text for text in texts if not isinstance(text, str)), None)
    if other is not None:
        return None, [Problem(f"--{name} {other} is not text to YAML", f'in quotes: "{other}"')]
    return (value if kind is str else texts), []


def _from_yaml(script_args: Sequence[str]) -> tuple[str, dict[str, Any], list[Problem]]:
    """Our arguments in the YAML file that TRL's parser will read."""
    if "--config" not in script_args[:-1]:
        return "", {}, []
    file = Path(script_args[list(script_args).index("--config") + 1])
    if file.suffix not in (".yaml", ".yml"):
        return "", {}, []
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        return "", {}, [Problem(f"--config {file} cannot be read: {error}", "correct the file or its name")]
    ours: dict[str, Any] = {}
    problems = []
    for name, value in content.items() if isinstance(content, dict) else ():
        if name in _KINDS:
            ours[name], trouble = _convert_yaml(name, value)
            problems += [dataclasses.replace(problem, fix=f"{problem.fix}, in {file}") for problem in trouble]
    return str(file), ours, problems


def _from_args_file(path: Path | None) -> tuple[str, dict[str, Any], list[Problem]]:
    """Our arguments in `<script>.args`, which HfArgumentParser puts in front of the command line."""
    file = path.with_suffix(".args") if path is not None else None
    if file is None or not file.is_file():
        return "", {}, []
    _, ours, problems = split(file.read_text(encoding="utf-8").split())
    return str(file), ours, problems


def _merge(places: Sequence[Mapping[str, Given]]) -> tuple[dict[str, Given], list[Problem]]:
    """One value for each name; two places that differ are a problem, as the ranks are started for one of them."""
    merged: dict[str, Given] = {}
    problems = []
    for given in places:
        for name, found in given.items():
            first = merged.setdefault(name, found)
            if first.value != found.value:
                problems.append(
                    Problem(
                        f"{name}: {first.place} says {first.value!r}, {found.place} says {found.value!r}",
                        "leave one of them out",
                    )
                )
    return merged, problems


def _script_problems(path: Path) -> list[Problem]:
    if path.is_file():
        return []
    folder = path.parent if path.parent.is_dir() else Path()
    files = [str(file) if path.parent == folder else file.name for file in folder.glob("*.py")]
    near = difflib.get_close_matches(str(path), files, n=3, cutoff=0.4)
    what = f"script {path} is a folder" if path.is_dir() else f"script {path} does not exist"
    fix = f"did you mean {', '.join(near)}?" if near else f"no script of a similar name is in {folder.absolute()}"
    return [Problem(what, fix)]


def _trl_script(name: str) -> tuple[Path, list[Problem]]:
    """TRL's own script; found without importing TRL, which takes seconds."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return Path("trl"), [Problem("trl is not installed", f"{sys.executable} -m pip install trl")]
    folder = Path(next(iter(spec.submodule_search_locations))) / "scripts"
    path = folder / f"{name}.py"
    if path.is_file() and "def make_parser" in path.read_text(encoding="utf-8"):
        return path, []
    names = sorted(f.stem for f in folder.glob("*.py") if "training_args" in f.read_text(encoding="utf-8"))
    return path, [Problem(f"trl {name} is no training script of the installed TRL", f"one of {', '.join(names)}")]
