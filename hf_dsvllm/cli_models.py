"""The commands about finished models: export, serve, chat.  They parse and print; the work is elsewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from hf_dsvllm.console import say
from hf_dsvllm.errors import ExportError
from hf_dsvllm.export.source import Format, Target, Which

__all__ = ["WithArgumentsForVllm", "chat", "export", "parse_size", "serve", "serve_arguments"]

VLLM_ARGS = "hf_dsvllm.vllm_args"
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(
    source: Annotated[Path, typer.Argument(help="A run, checkpoint, snapshot or adapter, or OWNER/NAME on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be an export of the same.")],
    which: Annotated[Which, typer.Option(help="Which weights of a run.")] = "latest",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    base: Annotated[
        str | None,
        typer.Option(help="Base model, instead of the recorded one; original: the weights QLoRA had quantised."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max_shard_size", help="Largest safetensors file.")] = "2GB",
    form: Annotated[
        Format, typer.Option("--format", help="merged: one whole model; adapter: the adapter alone, for vLLM.")
    ] = "merged",
    prove_in_vllm: Annotated[
        bool, typer.Option("--prove_in_vllm", help="Also start vLLM on the result and compare there.")
    ] = False,
    vllm_python: Annotated[
        Path | None,
        typer.Option("--vllm_python", help="Interpreter of another environment that has vLLM. Default: this one."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push_to_hub", help="OWNER/NAME to upload to; a new repository is private.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another export at --out.")] = False,
) -> None:
    """Merge, check and write a trained model as one folder that transformers and vLLM load."""
    size = parse_size(max_shard_size)
    from hf_dsvllm.export.make import export_model

    report = export_model(
        source,
        out,
        which=which,
        dtype=dtype,
        base=base,
        max_shard_size_bytes=size,
        format=form,
        overwrite=overwrite,
        vllm_python=vllm_python,
        prove_in_vllm=prove_in_vllm,
    )
    gib = report.weights_bytes / 2**30
    say(f"{'already there' if report.reused else 'written'}: {report.parameters:,} parameters, {gib:.2f} GiB")
    for remark in report.remarks:
        say(remark)
    print(report.out)
    if push_to_hub is not None:
        from hf_dsvllm.export.hub import push_to_hub as push

        print(push(Path(report.out), push_to_hub))
    say(f"serve it: hf-dsvllm serve {shlex.quote(report.out)}")


def parse_size(text: str) -> int:
    """`5GB` → 5,000,000,000 bytes, as `save_pretrained` reads it; ExportError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    size = int(float(found[1]) * SIZES[found[2]]) if found else 0
    if size < 1:
        raise ExportError(f"--max_shard_size {text} is not a size; write it like 5GB or 500MB.")
    return size


class WithArgumentsForVllm(typer.core.TyperCommand):
    """A command whose words after `--` are not its own; they are kept in the context."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if "--" in args:
            cut = args.index("--")
            ctx.meta[VLLM_ARGS] = args[cut + 1 :]
            args = args[:cut]
        return super().parse_args(ctx, args)


def serve(
    context: typer.Context,
    paths: Annotated[list[str], typer.Argument(help="Exports and adapters, each PATH or NAME=PATH.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; a public one needs VLLM_API_KEY.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="Model name in the API. Default: the folder's.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max_model_len", min=1, help="Longest prompt and answer, in tokens.")
    ] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print vLLM's command line and start nothing.")] = False,
    emit: Annotated[
        Target | None, typer.Option("--emit", help="Print a deployment file for a cluster and start nothing.")
    ] = None,
    vllm_python: Annotated[
        Path | None,
        typer.Option("--vllm_python", help="Interpreter of another environment that has vLLM. Default: this one."),
    ] = None,
) -> None:
    """Serve models over vLLM's OpenAI API until Ctrl-C, and print a curl command that asks each.

    What stands after -- goes to vLLM as it is.
    """
    from hf_dsvllm.serve import command as serving

    extra = context.meta.get(VLLM_ARGS, [])
    if emit is not None:
        from hf_dsvllm.serve.deploy import deployment

        planned = serving.plan_serving(paths, host=host, port=port, name=name, device=serving.detect_device())
        again = serve_arguments(paths, host, port, name, max_model_len, vllm_python, extra)
        text = deployment(
            emit, planned, host=host, port=port, max_model_len=max_model_len, extra=extra, serve_arguments=again
        )
        print(text, end="")
        return
    code = serving.serve(
        paths,
        python=vllm_python,
        host=host,
        port=port,
        name=name,
        max_model_len=max_model_len,
        extra=extra,
        print_only=print_only,
    )
    raise typer.Exit(code)


def serve_arguments(
    paths: list[str],
    host: str,
    port: int,
    name: str | None,
    max_model_len: int | None,
    vllm_python: Path | None,
    extra: list[str],
) -> list[str]:
    """The words after `hf-dsvllm serve` that mean the same from another folder."""
    options = {"--name": name, "--max_model_len": max_model_len, "--vllm_python": vllm_python}
    given = [word for flag, value in options.items() if value is not None for word in (flag, str(value))]
    placed = [f"{called}{sign}{Path(path).absolute()}" for called, sign, path in map(_split_name, paths)]
    return [*placed, "--host", host, "--port", str(port), *given, *(["--", *extra] if extra else [])]


def _split_name(given: str) -> tuple[str, str, str]:
    """`NAME=PATH` -> its parts; a path alone has none of the first two."""
    name, sign, path = given.partition("=")
    return (name, sign, path) if sign and not Path(given).exists() else ("", "", given)


def chat(
    url: Annotated[str, typer.Argument(help="Address of a server, such as http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option(help="Name of the model, if there are several.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option("--max_tokens", min=1, help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
) -> None:
    """Talk with a served model in the terminal; the key is taken from VLLM_API_KEY."""
    from hf_dsvllm.serve.chat import chat as talk

    talk(url, model=model, system=system, max_tokens=max_tokens, temperature=temperature)
