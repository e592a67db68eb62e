"""The command line: `triptych serve`, `triptych chat`, `triptych say`, `triptych voices`, `triptych bench`."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from streaming import voice_cli
from streaming.settings import API_KEY_VARIABLE, DEFAULT_MODEL, SettingsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One server for language, voice and images.",
)

app.add_typer(voice_cli.voices_app, name="voices")
app.command()(voice_cli.say)

Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")]


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME=PATH, a path, a hub id or an embedded model; repeatable. [default: {DEFAULT_MODEL}]"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with these settings; options win.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0: any free one. [default: 8000]")] = None,
    device: Device = None,
    dtype: Dtype = None,
    load_format: Annotated[str | None, typer.Option(help="auto, or dummy for random weights.")] = None,
    attention: Annotated[str | None, typer.Option(help="auto, torch or triton.")] = None,
    memory_fraction: Annotated[
        float | None, typer.Option(help="Share of the GPU for weights and KV together. [default: 0.85]")
    ] = None,
    max_running: Annotated[int | None, typer.Option(help="Sequences in one step. [default: 64]")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests that may wait. [default: 1024]")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="New positions in one step.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Positions of one sequence.")] = None,
    kv_slots: Annotated[int | None, typer.Option(help="Positions that the KV pool holds.")] = None,
    gateways: Annotated[int | None, typer.Option(help="Processes that speak HTTP. [default: 1]")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Clients must send it. Better set as TRIPTYCH_API_KEY: others cannot read that.")
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body. [default: 33554432]")] = None,
    voices: Annotated[str | None, typer.Option(help="Folder of the voice library.")] = None,
    reference_folder: Annotated[
        str | None, typer.Option(help="Folder whose files requests may name as recordings. [default: none]")
    ] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="For open answers at a stop. [default: 30]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [default: info]")] = None,
) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C; a second one stops at once."""
    options = {name: value for name, value in locals().items() if name not in {"model", "config"}}
    options["models"] = model
    raise typer.Exit(_serve(options, config))


def _serve(options: dict[str, Any], config: Path | None) -> int:
    from modalities.checkpoint import CheckpointError, locate
    from modalities.embedded import FetchError
    from streaming import process
    from streaming.settings import load_settings
    from streaming.supervisor import Located, StartError, Supervisor, bind

    try:
        settings = load_settings(options, config)
        process.configure_logging(settings.log_level, "server")
        sock = bind(settings)
        models = [Located(model, str(locate(model.source).path)) for model in settings.models]
        return asyncio.run(Supervisor(settings, models, sock).run())
    except (SettingsError, CheckpointError, FetchError, StartError) as error:
        return _fail(error)


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="A path, a hub id or an embedded model.")] = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of one answer.")] = 1024,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Chat in the terminal, without a server. Ctrl-C ends an answer; Ctrl-D, or Ctrl-C at the prompt, ends the chat."""
    from streaming.terminal import chat_in_terminal

    logging.basicConfig(level=logging.WARNING)
    options = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    try:
        chat_in_terminal(model, system, sampling, options)
    except (ValueError, RuntimeError, OSError) as error:
        raise typer.Exit(_fail(error)) from error


@app.command()
def bench(
    url: Annotated[str, typer.Option(help="Of any server with OpenAI's API.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="[default: the first that the server lists]")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=API_KEY_VARIABLE, help="If the server wants one.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Streams that are open at once.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Streams in all.")] = 64,
    input_tokens: Annotated[int, typer.Option(min=1, help="Length of a random prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer, at most.")] = 64,
    request_rate: Annotated[float | None, typer.Option(help="Starts per second. [default: no limit]")] = None,
    dataset: Annotated[Path | None, typer.Option(help='JSON lines: {"prompt": ...} or {"messages": ...}.')] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure a server under load: first token, time between tokens, tokens per second. Exit status 1 on any error."""
    from benchmarks.load import LoadError, Plan, first_model
    from benchmarks.load import bench as run

    try:
        model = model or first_model(url, api_key)
        lengths = (input_tokens, output_tokens)
        raise typer.Exit(run(Plan(url, model, api_key, concurrency, requests, *lengths, request_rate, dataset), out))
    except LoadError as error:
        raise typer.Exit(_fail(error)) from None


def _fail(error: Exception) -> int:
    print(f"triptych: {error}", file=sys.stderr)
    return 1


def main() -> None:
    app()


if __name__ == "__main__":
    main()
