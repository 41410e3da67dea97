"""What `hf-dsvllm run` was asked for: the script, its own arguments, and ours, wherever they stand.

Ours are those of `PresetFields`.  They are recognised anywhere after the script (`--ds_preset zero3`,
`--ds-preset=zero3`), in the script's YAML or JSON and in its `<script>.args` file; everything else stays the script's,
in its order.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from hf_dsvllm.adapters import ALL_LINEAR
from hf_dsvllm.errors import ConfigError, Problem
from hf_dsvllm.fields import PresetFields, added_fields
from hf_dsvllm.run.script_files import ConfigFile, args_file, config_file
from hf_dsvllm.run.target import Target, find_target

__all__ = [
    "COMMAND_LINE",
    "EXIT_FILE",
    "AdapterOptions",
    "Command",
    "Given",
    "is_launch_option",
    "nearest_of_ours",
    "read_command",
    "read_rank",
    "says_yes",
]

COMMAND_LINE = "the command line"
# The variable that names where a failing rank leaves its exit code: torchrun turns every code into 1.
EXIT_FILE = "HF_DSVLLM_EXIT_FILE"
# The shortest name that counts as an abbreviation, which argparse would complete.
SHORTEST = 5
_BOOLS = {**dict.fromkeys(("yes", "true", "t", "y", "1"), True), **dict.fromkeys(("no", "false", "f", "n", "0"), False)}
# Options of `hf-dsvllm run`, which stand before the script; those of adapters are flags of TRL's as well.
LAUNCH_OPTIONS = frozenset(
    ("num_processes", "accelerate_config", "dry_run", "module", "nnodes", "node_rank", "master_addr", "master_port",
     "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "max_restarts", "local_addr")
)  # fmt: skip
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
    """A script to run; `words` is everything from the script on, as typed.

    `own` are the script's arguments by name, each as its last and strongest place has it: the configuration file, the
    .args file, the command line.  A flag without a value is "true".
    """

    target: Target
    script_args: tuple[str, ...]
    given: Mapping[str, Given]
    adapter: AdapterOptions
    words: tuple[str, ...]
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: ConfigFile | None = None

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
    if words[0].startswith("-"):
        raise ConfigError([_before_the_script(words[0])])
    target, rest, problems = find_target(list(words), module=module)
    script_args, ours, trouble = split(rest)
    problems += trouble
    args_name, args_words = args_file(target.file)
    args_own, args_ours, trouble = split(args_words)
    problems += trouble
    config, trouble = config_file(script_args)
    problems += trouble
    config_own, config_ours, trouble = _from_config(config)
    problems += trouble
    found = {COMMAND_LINE: ours, args_name: args_ours, config.typed if config else "": config_ours}
    given, trouble = _merge([{name: Given(v, place) for name, v in values.items()} for place, values in found.items()])
    problems += trouble
    if not problems:
        problems += _misspelt(target, script_args)
    if problems:
        raise ConfigError(problems)
    return Command(
        target=target,
        script_args=tuple(script_args),
        given=given,
        adapter=adapter or AdapterOptions(),
        words=tuple(words),
        own={**config_own, **_flags(args_own), **_flags(script_args)},
        config=config,
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
    options, before = parser.parse_known_args(list(argv))
    if before:
        raise ConfigError([_before_the_script(before[0])])
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
            value, problem = _convert(name, values, next(iter(words), ""))
            problems += problem or _twice(name, ours, value)
            ours[name] = value
    return rest, ours, problems


def _twice(name: str, ours: Mapping[str, Any], value: Any) -> list[Problem]:
    """A flag that stands there again with another value: argparse would drop the first without a word."""
    if ours.get(name, value) == value:
        return []
    both = [" ".join(v) if isinstance(v, list) else str(v) for v in (ours[name], value)]
    fix = f"--{name} {' '.join(both)}" if _KINDS[name] == list[str] else "leave one of them out"
    return [Problem(f"--{name} is given twice: {both[0]}, then {both[1]}", fix)]


def _name(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def nearest_of_ours(flag: str) -> str | None:
    """Our argument that `flag` may have been meant to be, or abbreviates; None when none is near."""
    name = _name(flag)
    if name in _KINDS:
        return None
    whole = [field for field in added_fields() if len(name) >= SHORTEST and field.startswith(name)]
    near = whole or difflib.get_close_matches(name.removeprefix("no_"), added_fields(), n=1, cutoff=0.9)
    return f"--{near[0]}" if near else None


def is_launch_option(flag: str) -> bool:
    """Whether `hf-dsvllm run` has an option of this name, which counts before the script only."""
    return _name(flag) in LAUNCH_OPTIONS


def says_yes(value: str | None) -> bool:
    """Whether an argument of the script is switched on: given, and not as "false" or the like."""
    return value is not None and _BOOLS.get(value.lower(), True)


def _before_the_script(flag: str) -> Problem:
    near = difflib.get_close_matches(_name(flag), LAUNCH_OPTIONS, n=1, cutoff=0.8)
    if near:
        return Problem(f"{flag} is no option of this command", f"did you mean --{near[0]}?")
    return Problem(f"{flag} stands before the script", f"SCRIPT {flag} …: after the script")


def _misspelt(target: Target, script_args: Sequence[str]) -> list[Problem]:
    """Flags that are nobody's: near one of ours, or an option of the command in a script that reads no arguments.

    A script need not complain of what it does not know, and then would train without.  What is mentioned in the
    script, or in a file beside it, is its own.
    """
    flags = [word for word in script_args[: _end(script_args)] if word.startswith("--")]
    near = {flag: ours for flag in flags if (ours := nearest_of_ours(flag)) is not None}
    moved = [flag for flag in flags if is_launch_option(flag)] if target.takes_no_arguments else []
    return [
        Problem(
            f"{flag} is not one of ours, nor is it in the script",
            f"did you mean {near[flag]}?" if flag in near else f"hf-dsvllm run {flag} … SCRIPT: before the script",
        )
        for flag in (*near, *moved)
        if not target.mentions(_name(flag))
    ]


def _end(words: Sequence[str]) -> int:
    """Where flags end."""
    return list(words).index("--") if "--" in words else len(words)


def _flags(words: Sequence[str]) -> dict[str, str]:
    """The script's flags and the first value of each."""
    found = {}
    for flag, after in itertools.pairwise([*words[: _end(words)], "--"]):
        if flag.startswith("--"):
            _, sign, text = flag.partition("=")
            found[_name(flag)] = text if sign else "true" if after.startswith("--") else after
    return found


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


def _convert(name: str, texts: Sequence[str], after: str = "") -> tuple[Any, list[Problem]]:
    """The value of one of ours; `after` is the word that follows where there are no texts."""
    kind = _KINDS[name]
    if not texts:
        this = f"--{name}={after} if {after} is the value, " if kind is str and after.startswith("--") else ""
        return None, [Problem(f"--{name} has no value", f"{this}--{name} VALUE, or leave it out")]
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


def _from_config(config: ConfigFile | None) -> tuple[dict[str, str], dict[str, Any], list[Problem]]:
    """The script's own values of its YAML or JSON as texts, ours, and what is wrong with ours."""
    own: dict[str, str] = {}
    ours: dict[str, Any] = {}
    problems = []
    for name, value in config.values.items() if config is not None else ():
        if name in _KINDS:
            ours[name], trouble = _convert_yaml(name, value)
            problems += [dataclasses.replace(p, fix=f"{p.fix}, in {config.typed}") for p in trouble]
        elif value is not None:
            own[name] = str(value)
    return own, ours, problems


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
