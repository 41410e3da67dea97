"""What is asked of a model: an evaluation file in TRL's JSONL formats, read, checked and turned into token ids.

All bad lines are reported at once, with their numbers, before a model is loaded.  torch is never imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dsvllm.errors import ConfigError, EvalFileError, Problem
from hf_dsvllm.metrics import Metric, resolve
from hf_dsvllm.task_settings import TaskSettings, read_settings

__all__ = ["EvalSample", "EvalTask", "load_task", "load_tasks", "render_prompt"]

Message = Mapping[str, Any]
Prompt = tuple[Message, ...] | str
MAX_REPORTED_LINES = 10
ACCEPTED = (
    "accepted, one JSON object a line:\n"
    '    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": REFERENCE}]}\n'
    '    {"prompt": TEXT or messages, "completion": TEXT or messages}\n'
    '    {"prompt": TEXT or messages, "reference": TEXT}'
)


class LineError(ValueError):
    """Why one line cannot be used; collected by `load_task`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalSample:
    """One question: `prompt` as text or chat messages, the `reference` answer, and the `line` it stands on (from 1).

    `template_arguments` are the line's `tools` and `chat_template_kwargs`, which TRL hands to the chat template too.
    """

    id: str
    prompt: Prompt
    reference: str
    line: int
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalTask:
    """The samples of one file; `name` is safe in a metric key, `metrics` are what `metrics.resolve` takes.

    `settings` come from the file beside it; what they leave open the arguments decide.
    """

    name: str
    samples: tuple[EvalSample, ...]
    metrics: tuple[str, ...]
    settings: TaskSettings = dataclasses.field(default_factory=TaskSettings)


def load_tasks(args: Any) -> tuple[EvalTask, ...]:
    """The tasks of `args.gen_eval_file`; ConfigError where two files share a name."""
    chosen = tuple(args.gen_eval_metrics or ("exact_match",))
    files = args.gen_eval_file or ()
    tasks = tuple(load_task(Path(path), metrics=chosen, limit=args.gen_eval_limit) for path in files)
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        what = f"{len(names)} evaluation files share the task name {twice[0]!r} (it is the file's name)"
        raise ConfigError([Problem(what, "give each file a name of its own")])
    return tasks


def load_task(path: Path | str, *, metrics: Sequence[str] = ("exact_match",), limit: int | None = None) -> EvalTask:
    """Read an evaluation file and its NAME.task.json; every line is checked, then the first `limit` samples are kept.

    Raises EvalFileError for a missing or empty file, wrong settings, an unknown metric, or bad lines (the first ten of
    them at once).
    """
    path = Path(path).expanduser()
    if limit is not None and limit < 1:
        raise EvalFileError(f"limit={limit} would leave no sample of {path}; use 1 or more, or leave it out for all")
    settings = read_settings(path)
    metrics = metrics if settings.metrics is None else settings.metrics
    resolved = resolve_all(metrics)
    samples: list[EvalSample] = []
    reasons: list[str] = []
    lines_of_ids: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            sample = with_system(parse_line(line, number), settings.system_prompt)
            check_references(sample, resolved)
            first = lines_of_ids.setdefault(sample.id, number)
            if first != number:
                raise LineError(f"id {sample.id!r} already stands on line {first}")
            samples.append(sample)
        except LineError as error:
            reasons.append(f"  line {number}: {error}")
    if reasons:
        raise EvalFileError(bad_lines_message(path, reasons))
    if not samples:
        raise EvalFileError(f"{path} holds no samples (only blank lines, or nothing); {ACCEPTED}")
    return EvalTask(
        name=safe_name(path.stem), samples=tuple(samples[:limit]), metrics=tuple(metrics), settings=settings
    )


def resolve_all(metrics: Sequence[str]) -> list[Metric]:
    """All metrics of a task, at least one, none under the name of another."""
    if not metrics:
        raise EvalFileError("a task needs at least one metric, such as exact_match")
    resolved = [resolve(spec) for spec in metrics]
    names = [metric.name for metric in resolved]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise EvalFileError(f"metrics {', '.join(metrics)}: more than one is called {', '.join(repeated)}; rename one")
    return resolved


def bad_lines_message(path: Path, reasons: Sequence[str]) -> str:
    """Count, the first reasons, the accepted forms."""
    count = "1 line" if len(reasons) == 1 else f"{len(reasons)} lines"
    more = len(reasons) - MAX_REPORTED_LINES
    tail = [f"  … and {more} more"] if more > 0 else []
    return "\n".join([f"{path}: {count} cannot be used", *reasons[:MAX_REPORTED_LINES], *tail, ACCEPTED])


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file; nearest names if it is missing."""
    if path.is_dir():
        raise EvalFileError(f"{path} is a folder; name a JSONL file in it")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise EvalFileError(missing_file_message(path)) from None
    except OSError as error:
        raise EvalFileError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise EvalFileError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    return text.split("\n")  # not splitlines: U+2028 is allowed inside a JSON string


def missing_file_message(path: Path) -> str:
    """Says where was looked and what is there instead."""
    folder = path.parent
    if not folder.is_dir():
        return f"evaluation file {path} does not exist, nor does its folder (looked from {Path.cwd()})"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = difflib.get_close_matches(path.name, names, n=3) or [name for name in names if name.endswith(".jsonl")][:5]
    hint = f" Nearest there: {', '.join(near)}." if near else " There is no .jsonl file in that folder."
    return f"evaluation file {path} does not exist.{hint}"


def parse_line(line: str, number: int) -> EvalSample:
    """One line as a sample.  Raises LineError."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON: {error.msg} at column {error.colno}{array_hint(line, number)}") from None
    except (ValueError, RecursionError) as error:
        raise LineError(f"not JSON that can be read: {error}") from None
    if not isinstance(row, dict):
        raise LineError(f"a JSON {type(row).__name__}, not an object{array_hint(line, number)}")
    identifier = row.get("id", number)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or identifier == "":
        raise LineError(f"id must be a non-empty string or an integer, not {identifier!r}")
    prompt, reference = parse_question(row)
    return EvalSample(
        id=str(identifier),
        prompt=prompt,
        reference=reference,
        line=number,
        template_arguments=parse_template_arguments(row),
    )


def with_system(sample: EvalSample, system_prompt: str | None) -> EvalSample:
    """The sample with the task's system prompt in front; a sample that has a system message of its own keeps it."""
    if system_prompt is None:
        return sample
    if isinstance(sample.prompt, str):
        raise LineError("the task has a system_prompt, which needs chat messages, and this prompt is text")
    if sample.prompt[0]["role"] in ("system", "developer"):
        return sample
    return dataclasses.replace(sample, prompt=({"role": "system", "content": system_prompt}, *sample.prompt))


def array_hint(line: str, number: int) -> str:
    looks_like_array = number == 1 and line.lstrip().startswith("[")
    return " (a JSON array? write one object a line instead)" if looks_like_array else ""


def parse_question(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """Prompt and reference from whichever form the line has."""
    forms = [key for key in ("messages", "prompt") if key in row]
    if len(forms) == 2:
        raise LineError("has both `messages` and `prompt`; keep one")
    if not forms:
        found = ", ".join(sorted(map(str, row))) or "nothing"
        text = " (a `text` line has no reference answer)" if "text" in row else ""
        raise LineError(f"has neither `messages` nor `prompt`{text}; its keys: {found}")
    if "messages" in row:
        return split_messages(parse_messages(row["messages"], "messages"), "messages")
    answers = [key for key in ("completion", "reference") if key in row]
    if len(answers) != 1:
        raise LineError(
            f"`prompt` needs either `completion` or `reference`, found {' and '.join(answers) or 'neither'}"
        )
    prompt = parse_prompt(row["prompt"])
    answer = row[answers[0]]
    if isinstance(answer, str):
        return prompt, answer
    if answers[0] == "reference":
        raise LineError(f"`reference` must be a string, not {type(answer).__name__}")
    if isinstance(prompt, str):
        raise LineError("`prompt` is text but `completion` is not; TRL wants both as text or both as messages")
    completion = parse_messages(answer, "completion")
    before, reference = split_messages((*prompt, *completion), "completion")
    return before, reference


def parse_prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise LineError("`prompt` is empty")
        return value
    return parse_messages(value, "prompt")


def parse_messages(value: Any, key: str) -> tuple[Message, ...]:
    """A non-empty list of {"role": str, "content": str}; further keys of a message are kept for the chat template."""
    if not isinstance(value, list) or not value:
        raise LineError(f"`{key}` must be a non-empty list of messages or, in prompt and completion, text")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LineError(f"`{key}[{index}]` must be an object with a `role` string")
        if not isinstance(message.get("content"), str):
            found = type(message.get("content")).__name__
            raise LineError(f"`{key}[{index}]` ({message['role']}) needs a `content` string, not {found}")
    return tuple(value)


def split_messages(messages: tuple[Message, ...], key: str) -> tuple[tuple[Message, ...], str]:
    """Everything before the last message as the prompt, and that assistant turn as the reference."""
    *before, last = messages
    if last["role"] != "assistant":
        raise LineError(
            f"the last of `{key}` has role {last['role']!r}; it must be the assistant's answer (the reference)"
        )
    if not before:
        raise LineError(f"`{key}` holds only the answer; a user message must come before it")
    return tuple(before), last["content"]


def parse_template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """`tools` (a list, or TRL's JSON string of one) and `chat_template_kwargs`."""
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise LineError(f"`chat_template_kwargs` must be an object, not {type(arguments).__name__}")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise LineError(f"`tools` is not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise LineError(f"`tools` must be a list, not {type(tools).__name__}")
    return {**arguments, "tools": tools} if tools else dict(arguments)


def check_references(sample: EvalSample, metrics: Sequence[Metric]) -> None:
    """Each metric's own view of the reference, such as a regular expression that must compile."""
    for metric in metrics:
        reason = metric.check_reference(sample.reference) if metric.check_reference else None
        if reason:
            raise LineError(reason)


def safe_name(stem: str) -> str:
    """Letters, digits and underscores, lower case; `task` if nothing is left."""
    return re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_") or "task"


def render_prompt(sample: EvalSample, tokenizer: Any) -> list[int]:
    """Token ids of the prompt, as training renders it: the chat template with its generation prompt, or plain text.

    A text prompt is tokenised as it stands, special tokens included if the tokenizer adds them, as TRL does for
    prompt/completion data.  Raises EvalFileError if messages meet a tokenizer without a chat template, or a template
    that refuses them.
    """
    if isinstance(sample.prompt, str):
        return list(tokenizer(sample.prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise EvalFileError(
            f"line {sample.line} (id {sample.id}) asks with chat messages, but this tokenizer has no chat template. "
            "Give one with --chat_template_path (or train from an instruct model), or write prompts as text: "
            '{"prompt": TEXT, "reference": TEXT}.'
        )
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in sample.prompt],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            **sample.template_arguments,
        )
    except Exception as error:
        raise EvalFileError(
            f"line {sample.line} (id {sample.id}): the chat template refused the messages with "
            f"{type(error).__name__}: {error}"
        ) from error
    return list(ids)
