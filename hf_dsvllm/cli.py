"""The `hf-dsvllm` command: presets, plan, run, export, serve, chat, report, doctor.

It parses and prints; the work is elsewhere.
Results go to stdout and can be redirected to a file, everything said about them to stderr.  No framework is imported
before a command needs it.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_dsvllm import __version__, cli_models, cli_report
from hf_dsvllm.console import friendly_errors, say
from hf_dsvllm.optimizers import ADAM
from hf_dsvllm.presets import Preset, available_presets, get_preset

__all__ = ["app", "main"]

# --num-processes is read as --num_processes, for every option of every command.
_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("-", "_"),
}

app = typer.Typer(
    name="hf-dsvllm",
    help="DeepSpeed and QLoRA presets, vLLM evaluation and verified export for the Hugging Face Trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_SETTINGS,
)
presets_app = typer.Typer(help="List the presets of --ds_preset, or show one exactly.", rich_markup_mode=None)
app.add_typer(presets_app, name="presets")


def main() -> None:
    """The console command: our errors as their message and exit code 2, without a traceback."""
    with friendly_errors():
        app(prog_name="hf-dsvllm")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hf-dsvllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


@presets_app.callback(invoke_without_command=True)
def list_presets(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the presets of --ds_preset that the installed DeepSpeed can run."""
    if context.invoked_subcommand is not None:
        return
    rows = [preset_row(preset) for preset in available_presets()]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table(title="--ds_preset NAME   (P trainable parameters, N GPUs, bytes)", show_lines=True)
    for heading in ("name", "shards", "where it lives", "constraints"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    for row in rows:
        name = f"{row['name']}\nexperimental" if row["experimental"] else row["name"]
        table.add_row(name, row["shards"], row["lives"], "; ".join(row["constraints"]))
    Console().print(table, markup=False)
    say("add adapters to a full preset with +, as in zero3+lora; `hf-dsvllm presets show NAME` prints one exactly")


def preset_row(preset: Preset) -> dict[str, Any]:
    """What the list and `--json` say about one preset."""
    return {
        "name": preset.name,
        "summary": preset.summary,
        "shards": preset.shards,
        "lives": preset.lives,
        "constraints": list(preset.constraints),
        "experimental": preset.experimental,
        "adapter": preset.adapter,
        "min_processes": preset.min_processes,
    }


@presets_app.command("show")
def show_preset(
    name: Annotated[str, typer.Argument(help="A preset, or one joined with lora or qlora: zero3+lora.")],
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num_processes", min=1, help="Processes the run will have. Default: the fewest the preset takes."
        ),
    ] = None,
    nvme_path: Annotated[
        Path | None, typer.Option("--nvme_path", help="Folder on a local NVMe disk, for presets that offload to it.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a machine without GPU.")] = False,
) -> None:
    """Print the exact DeepSpeed JSON on stdout, and the argument defaults with their reasons on stderr.

    The JSON is `null` for presets that do without DeepSpeed.
    """
    from hf_dsvllm.ds_config import RunShape, build
    from hf_dsvllm.errors import PresetError

    preset = get_preset(name)
    if preset.needs_nvme and nvme_path is None:
        raise PresetError(f"preset {preset.name} writes to an NVMe disk; name a folder on it: --nvme_path FOLDER")
    processes = num_processes or preset.min_processes
    if processes < preset.min_processes:
        raise PresetError(
            f"preset {preset.name} needs {preset.min_processes} processes or more, not {processes}; "
            f"--num_processes {preset.min_processes}"
        )
    shape = RunShape(
        world_size=processes,
        gpus_per_node=processes,
        device="cpu" if cpu else "cuda",
        nvme_path=nvme_path.absolute() if nvme_path else None,
    )
    config = build(preset, shape)
    print(json.dumps(config, indent=2))
    _explain(preset, config, processes, "cpu" if cpu else "cuda")


def _explain(preset: Preset, config: dict[str, Any] | None, processes: int, device: str) -> None:
    from hf_dsvllm.adapters import trl_flags
    from hf_dsvllm.ds_config import explain
    from hf_dsvllm.features import FEATURES

    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(text: str) -> None:
        console.print(text, markup=False)

    line(f"\n{preset.name}: {preset.summary}")
    for constraint in preset.constraints:
        line(f"  needs or knows: {constraint}")
    if not preset.uses_deepspeed:
        line("  no DeepSpeed: leave --deepspeed out")
    for key, value, why in explain(preset, config):
        line(f"  {key} = {json.dumps(value)}: {why}")
    precision = "--bf16 false" if device == "cpu" else "--bf16 true"
    line(f"\nArgument defaults (kept as you set them otherwise)\n  {precision}: "
         + ("CPUs train in float32" if device == "cpu" else "unless --fp16 is set"))  # fmt: skip
    for setting in preset.arguments:
        line(f"  --{setting.key} {setting.value}: {setting.why}")
    line("\nSpeed features (--ds_speed NAME adds one, no_NAME leaves one out)")
    for feature in FEATURES:
        line(f"  {feature.name} ({'on' if feature.default else 'off'}): {feature.why}")
    if preset.sequence_parallel:
        line(
            "  parallelism_config=ParallelismConfig(sp_size="
            f'{processes}, sp_backend="deepspeed", dp_replicate_size=1): in Python; a slice of each sequence per rank'
        )
    if preset.adapter:
        line(f"\nThe same adapter with TRL's own flags\n  {shlex.join(trl_flags(preset, device))}")


@app.command(
    # Unknown options reach `read_command`, which says whose they are and where they stand.
    context_settings={**_SETTINGS, "allow_interspersed_args": False, "ignore_unknown_options": True}
)
def run(
    script: Annotated[
        list[str],
        typer.Argument(
            metavar="SCRIPT",
            help="A script (or `trl sft` and the like), then its own arguments and ours in any order.",
        ),
    ],
    num_processes: Annotated[
        str, typer.Option("--num_processes", help="Processes on this machine; auto: one for each GPU, else one.")
    ] = "auto",
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Print what would be started, and the same without this package.")
    ] = False,
    accelerate_config: Annotated[
        Path | None, typer.Option("--accelerate_config", help="Start with `accelerate launch` and this file.")
    ] = None,
    lora_r: Annotated[int | None, typer.Option("--lora_r", min=1, help="Rank of adapters. TRL's default: 16.")] = None,
    lora_alpha: Annotated[int | None, typer.Option("--lora_alpha", min=1, help="TRL's default: 32.")] = None,
    lora_dropout: Annotated[float | None, typer.Option("--lora_dropout", help="TRL's default: 0.05.")] = None,
    lora_target_modules: Annotated[
        str | None, typer.Option("--lora_target_modules", help="Layers, with commas. Default: all linear ones.")
    ] = None,
    nnodes: Annotated[str | None, typer.Option("--nnodes", help="torchrun's, as the next ones: machines.")] = None,
    node_rank: Annotated[str | None, typer.Option("--node_rank", help="Number of this machine.")] = None,
    rdzv_backend: Annotated[str | None, typer.Option("--rdzv_backend", help="How machines meet.")] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option("--rdzv_endpoint", help="Where they meet, HOST:PORT.")] = None,
    rdzv_id: Annotated[str | None, typer.Option("--rdzv_id", help="Name of the meeting.")] = None,
    rdzv_conf: Annotated[str | None, typer.Option("--rdzv_conf", help="Its settings.")] = None,
    max_restarts: Annotated[str | None, typer.Option("--max_restarts", help="Restarts of failed processes.")] = None,
    local_addr: Annotated[str | None, typer.Option("--local_addr", help="Address of this machine.")] = None,
    master_addr: Annotated[str | None, typer.Option("--master_addr", help="Address of the first machine.")] = None,
    master_port: Annotated[str | None, typer.Option("--master_port", help="Port of the first machine.")] = None,
) -> None:
    """Run an unmodified transformers or TRL script with a preset, adapters and evaluation by vLLM.

    Options of this command stand before SCRIPT; --ds_preset and its companions (docs/arguments.md) anywhere after it.
    """
    from hf_dsvllm.run.command import AdapterOptions, read_command
    from hf_dsvllm.run.parent import LaunchOptions, run_command

    given = {
        "--nnodes": nnodes,
        "--node_rank": node_rank,
        "--rdzv_backend": rdzv_backend,
        "--rdzv_id": rdzv_id,
        "--rdzv_endpoint": rdzv_endpoint,
        "--rdzv_conf": rdzv_conf,
        "--max_restarts": max_restarts,
        "--local_addr": local_addr,
        "--master_addr": master_addr,
        "--master_port": master_port,
    }
    options = LaunchOptions(
        num_processes=num_processes,
        accelerate_config=accelerate_config,
        torchrun=tuple(word for flag, value in given.items() if value is not None for word in (flag, value)),
        module=module,
    )
    targets = tuple(lora_target_modules.split(",")) if lora_target_modules else None
    adapter = AdapterOptions(
        lora_r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, lora_target_modules=targets
    )
    raise typer.Exit(run_command(options, read_command(script, module=module, adapter=adapter), dry_run=dry_run))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model folder, a config.json, or a hub id.")],
    gpus: Annotated[
        str | None, typer.Option("--gpus", help="Cards, like 4xH100-80GB. Default: those of this machine.")
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq_len", help="Tokens of a sequence.")] = 2048,
    global_batch: Annotated[int, typer.Option("--global_batch", help="Sequences in one update, of all GPUs.")] = 32,
    method: Annotated[str, typer.Option("--method", help="full, lora, qlora or any.")] = "any",
    loss: Annotated[str, typer.Option("--loss", help="trl (SFTTrainer) or plain (Trainer).")] = "trl",
    lora_r: Annotated[int, typer.Option("--lora_r", help="Rank of adapters.")] = 16,
    optim: Annotated[str, typer.Option("--optim", help="The Trainer's optimizer, for its memory.")] = ADAM,
    host_ram: Annotated[str | None, typer.Option("--host_ram", help="Memory of the machine, like 512GB.")] = None,
    nvme: Annotated[str | None, typer.Option("--nvme", help="Free room on a local NVMe disk, like 2TB.")] = None,
    eval_sequences: Annotated[
        int, typer.Option("--eval_sequences", help="Answers vLLM writes at once during training; 0 without evaluation.")
    ] = 0,
    eval_length: Annotated[int, typer.Option("--eval_length", help="Tokens of a prompt with its answer.")] = 1024,
    trace: Annotated[
        bool, typer.Option("--trace", help="Count on the model itself, as is done for those without formulas; slower.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Draw the memory of each phase.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the plan as a page to this file.")] = None,
) -> None:
    """Say what fits, what is fastest and why, before anything is loaded; exit code 1 if nothing fits."""
    from hf_dsvllm.planner.request import Request, job_of, lacks_formulas
    from hf_dsvllm.planner.view import show

    request = Request(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        global_batch=global_batch,
        method=method,
        loss=loss,
        lora_r=lora_r,
        optim=optim,
        host_ram=host_ram,
        nvme=nvme,
        eval_sequences=eval_sequences,
        eval_length=eval_length,
    )
    unknown = None if trace else lacks_formulas(model)
    if trace or unknown is not None:
        from hf_dsvllm.trace import trace_layers, traced_shape

        why = f"there are no formulas for model_type {unknown}: " if unknown is not None else ""
        say(f"{why}counting on the model itself, with fake tensors, instead of by formulas; it takes a minute")
        job = job_of(request, traced_shape(model), trace_layers(model, lora_r=lora_r))
    else:
        job = job_of(request)
    raise typer.Exit(0 if show(request, job, explain=explain, as_json=as_json, html_file=html) else 1)


app.command()(cli_models.export)
app.command(cls=cli_models.WithArgumentsForVllm)(cli_models.serve)
app.command()(cli_models.chat)
app.command()(cli_report.report)


@app.command()
def doctor(
    reap: Annotated[
        bool, typer.Option("--reap", help="End engines that earlier runs left behind, and remove their files.")
    ] = False,
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm_python", help="Look for vLLM in this interpreter.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's speed for `hf-dsvllm plan`, in half a minute.")
    ] = False,
) -> None:
    """Say what is installed, what this machine has, and which engines and files were left behind."""
    if calibrate:
        from hf_dsvllm.calibrate import calibrate_machine

        file, record = calibrate_machine()
        print(json.dumps(record, indent=2))
        say(f"kept in {file}; `hf-dsvllm plan` and --ds_preset auto compute with it from now on")
        return
    from hf_dsvllm import doctor as examination
    from hf_dsvllm.engine import list_engines
    from hf_dsvllm.run_folder import leftovers

    table = Table(show_header=False, box=None)
    for finding in examination.examine(vllm_python):
        table.add_row({"ok": "ok", "note": "-", "missing": "!"}[finding.status], finding.subject, finding.value)
    Console(highlight=False).print(table, markup=False)
    engines = list_engines()
    print("\n".join(examination.describe_engine(record) for record in engines) or "no engine is on record")
    if not reap:
        found = leftovers()
        print("\n".join(map(examination.describe_leftover, found)) or "no run left files behind")
        if found or any(record.state in ("orphaned", "gone") for record in engines):
            say("`hf-dsvllm doctor --reap` ends what has no owner any more, and removes its files")
        return
    (ended, running), (removed, stuck) = examination.reap_orphans(), examination.remove_leftovers()
    failed = [*running, *stuck]
    print("\n".join([*ended, *removed, *failed]) or "nothing to end or remove")
    if failed:
        raise typer.Exit(1)
