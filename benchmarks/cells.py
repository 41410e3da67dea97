"""The cells of the benchmark: their command lines, and what is read from their folders afterwards."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

from report import Row

from hf_dsvllm.model_shape import ModelShape
from hf_dsvllm.presets import get_preset

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "sft.py"
RUNNING = re.compile(r"hf-dsvllm: running: (.*)")
OURS = re.compile(r"hf-dsvllm: error: (.*?)\n\n", re.DOTALL)
EVALUATION_FAILED = re.compile(r"generation evaluation failed.*(?:\n(?!hf-dsvllm:).*){0,6}")
# The line of a traceback that names the error.
ERROR = re.compile(r"^(?:\[?rank\d\]?:? ?)?([\w.]*(?:Error|Exception|Interrupt)\b.*)", re.MULTILINE)
MAX_REASON = 300


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model under test and its data.  `random` weights learn nothing: a small learning rate, exact match."""

    name: str
    model: Path
    train: Path
    prompts: Path
    random: bool
    shape: ModelShape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all cells share; lengths in tokens.  `offload_steps` for presets that offload, whose steps are slow."""

    device: Literal["cuda", "cpu"]
    steps: int
    offload_steps: int
    micro_batch_size: int
    length: int
    prompts: int
    new_tokens: int
    vllm_args: str
    cpus: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One process tree to start and measure."""

    kind: Literal["dsvllm", "plain", "generate"]
    run: str
    processes: int
    evaluate: bool = False
    export: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.run or 'hf'}-x{self.processes}".replace("+", "_")

    @property
    def offloads(self) -> bool:
        return self.kind == "dsvllm" and get_preset(self.run).offload_optimizer != "none"

    @property
    def adapter(self) -> str | None:
        if self.kind == "dsvllm":
            return get_preset(self.run).adapter
        return "lora" if self.run == "lora" else None

    def steps(self, settings: Settings) -> int:
        return settings.offload_steps if self.offloads else settings.steps


def command(cell: Cell, subject: Subject, settings: Settings, run_dir: Path, port: int) -> list[str]:
    """The command line of `cell`."""
    if cell.kind == "generate":
        line = [sys.executable, str(HERE / "hf_generate.py"), "--model", str(subject.model)]
        line += ["--prompts", str(subject.prompts), "--limit", str(settings.prompts)]
        line += ["--new_tokens", str(settings.new_tokens), "--device", settings.device]
        return [*line, "--out", str(run_dir / "measured.json")]
    threads = str(max(1, settings.cpus // cell.processes))
    if cell.kind == "plain":
        launcher = ["torch.distributed.run", "--nproc_per_node", str(cell.processes), "--master_port", str(port)]
        script = [str(HERE / "plain_trl.py"), *plain_flags(cell, settings)]
    else:
        several = ["--multi_gpu"] if cell.processes > 1 else []
        launcher = ["accelerate.commands.launch", *several, "--num_processes", str(cell.processes)]
        # accelerate gives each process one thread otherwise, and the offloaded optimizer runs on them.
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", str(port), "--num_cpu_threads_per_process", threads]
        script = [str(RECIPE), *our_flags(cell, subject, settings)]
    return [sys.executable, "-m", *launcher, *script, *training_flags(cell, subject, settings, run_dir)]


def training_flags(cell: Cell, subject: Subject, settings: Settings, run_dir: Path) -> list[str]:
    """The flags that this package and plain TRL get alike."""
    learnt = "1e-3" if cell.adapter else "1e-4"
    flags = {
        "model_name_or_path": subject.model,
        "train_file": subject.train,
        "output_dir": run_dir,
        "max_steps": cell.steps(settings),
        "per_device_train_batch_size": settings.micro_batch_size,
        "max_length": settings.length,
        "learning_rate": "1e-5" if subject.random else learnt,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "disable_tqdm": "true",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def plain_flags(cell: Cell, settings: Settings) -> list[str]:
    flags = ["--bf16", "true"] if settings.device == "cuda" else ["--bf16", "false", "--use_cpu", "true"]
    flags += ["--dtype", "bfloat16" if settings.device == "cuda" else "float32"]
    if cell.run == "lora":
        return [*flags, "--use_peft", "--lora_target_modules", "all-linear"]
    return [*flags, "--zero2", "fp32" if cell.run == "zero2_fp32" else "bf16"]


def our_flags(cell: Cell, subject: Subject, settings: Settings) -> list[str]:
    flags = ["--ds_preset", cell.run]
    if cell.evaluate:
        flags += ["--gen_eval_file", str(subject.prompts), "--gen_eval_limit", str(settings.prompts)]
        flags += ["--gen_eval_metrics", "exact_match" if subject.random else "json_equal"]
        flags += ["--gen_eval_max_new_tokens", str(settings.new_tokens)]
        if not subject.random:
            flags += ["--gen_eval_steps", str(cell.steps(settings) // 2)]
        if settings.vllm_args:
            flags += [f"--vllm_args={settings.vllm_args}"]
    return flags if cell.export else [*flags, "--export_to", "none"]


def read_row(
    cell: Cell,
    subject: Subject,
    settings: Settings,
    run_dir: Path,
    log: str,
    *,
    shown: str,
    failure: str | None,
    seconds: float,
    matmul_tflops: float | None,
) -> Row:
    """The row of a finished cell: whatever it managed to write, and why it ended if it failed."""
    row: dict[str, Any] = {"status": failure or "ok"}
    if failure is not None and log:
        row["status"] += f": {last_error(log)}"
    measured = read_json(run_dir / "measured.json")
    if cell.kind == "generate":
        row |= {
            "generate_tokens_per_second": measured.get("tokens_per_second"),
            "generate_seconds": measured.get("generate_seconds"),
        }
    else:
        row |= {"micro_batch_size": settings.micro_batch_size, "length": settings.length}
        row |= training_columns(cell, subject, settings, measured, matmul_tflops)
    if cell.kind == "dsvllm":
        row |= our_columns(cell, run_dir, log)
    elif cell.kind == "plain":
        row["wiring"] = measured.get("engine")
    if failure is None and not measured:
        row["status"] = f"no measured.json: {last_error(log)}"
    if failure is None and cell.evaluate and len(row["evaluations"]) < 2:
        row["status"] = f"evaluation did not finish: {last_error(log)}"
    head = {"model": subject.name, "kind": cell.kind, "run": cell.run, "processes": cell.processes}
    return Row(**head, cell_seconds=round(seconds, 1), command=shown, **row)


def training_columns(
    cell: Cell, subject: Subject, settings: Settings, measured: dict[str, Any], matmul_tflops: float | None
) -> dict[str, Any]:
    step = measured.get("median_step_seconds")
    steps = measured.get("steps")
    speed = measured["tokens"] / steps / step if step and steps else None
    share = None
    if speed and matmul_tflops:
        share = speed / cell.processes * flops_per_token(subject.shape, settings.length, cell.adapter)
        share = round(share / (matmul_tflops * 1e12), 4)
    return {
        "steps": steps,
        "tokens_per_second": speed and round(speed, 1),
        "median_step_seconds": step,
        "matmul_share": share,
        "gpu_peak_allocated_gib": measured.get("gpu_peak_allocated_gib"),
        "gpu_peak_reserved_gib": measured.get("gpu_peak_reserved_gib"),
        "host_peak_gib": measured.get("host_peak_gib"),
    }


def flops_per_token(shape: ModelShape, length: int, adapter: str | None) -> float:
    """flops = (6 or 4) * P + 6 * layers * heads * head_dim * length

    6 = 2 forward + 4 backward; a frozen weight has no gradient of its own, so 4.  P without an untied input embedding
    (a lookup).  The second term is causal attention, half of the full 12 (PaLM paper, appendix B).  Recomputation for
    gradient checkpointing is not counted.
    """
    parameters = shape.parameters - (0 if shape.tied else shape.embedding_parameters)
    attention = 6 * shape.layers * shape.heads * shape.head_dim * length
    return (4 if adapter else 6) * parameters + attention


def our_columns(cell: Cell, run_dir: Path, log: str) -> dict[str, Any]:
    """What this package records beyond plain TRL."""
    record = read_json(run_dir / "run.json")
    export = read_json(run_dir / "export" / "export_report.json")
    scores = run_dir / "evals" / "scores.jsonl"
    lines = scores.read_text(encoding="utf-8").splitlines() if scores.exists() else []
    said = RUNNING.search(log)
    preset = get_preset(cell.run)
    asked = {"world_size": cell.processes, "zero_stage": preset.zero_stage, "adapter": preset.adapter}
    return {
        "evaluations": tuple(json.loads(line) for line in lines),
        "export_seconds": export.get("seconds"),
        "export_note": export.get("verification_skipped"),
        "wiring": said.group(1) if said else None,
        "wiring_as_asked": all(record.get(key) == value for key, value in asked.items()) if record else None,
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} if the cell did not get that far."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def last_error(log: str) -> str:
    """Our own message, else the line that names the error, else the last line said."""
    ours = OURS.findall(log) or EVALUATION_FAILED.findall(log)
    # The launcher's own errors at the end only repeat that something failed.
    named = [line for line in ERROR.findall(log) if not re.match(r"\S*(CalledProcess|ChildFailed)Error", line)]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reason = (ours or named or lines or ["no output"])[-1]
    return " ".join(reason.split())[:MAX_REASON]
