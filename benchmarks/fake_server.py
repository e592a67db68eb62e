"""The real server in front of a fake engine: what lies between a client and an engine, and nothing else.

    python -m benchmarks.fake_server [--gateways N] [--rate TOKENS_PER_SECOND] [--max-running N] [--model SOURCE]

The gateways speak HTTP and use the model's own tokenizer; its engine emits the prompt over and over.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any

import typer

from benchmarks.fake_engine import FakeEngine, make
from modalities.checkpoint import locate
from streaming import process
from streaming.messages import ModelInfo
from streaming.settings import DEFAULT_MODEL, load_settings
from streaming.supervisor import Located, Supervisor, bind

_RATE_VARIABLE = "TRIPTYCH_FAKE_RATE"  # the engine's process inherits it


def build(name: str, checkpoint: str, config: dict[str, Any]) -> tuple[FakeEngine, ModelInfo]:
    """What the engine's process calls instead of `streaming.factory.build`."""
    rate = float(os.environ[_RATE_VARIABLE])
    return make(name, tokens_per_second=rate or None, max_running=config["max_running"], max_queue=config["max_queue"])


def main(
    model: Annotated[str, typer.Option(help="Whose tokenizer the gateways use.")] = DEFAULT_MODEL,
    port: Annotated[int, typer.Option(help="0: any free one.")] = 0,
    gateways: Annotated[int, typer.Option(min=1)] = 1,
    rate: Annotated[float, typer.Option(min=0, help="Tokens per second of each stream; 0: as fast as it goes.")] = 0,
    max_running: Annotated[int, typer.Option(min=1, help="Streams that the engine serves at once.")] = 1024,
    max_queue: Annotated[int, typer.Option(min=1)] = 1024,
) -> None:
    process.configure_logging("warning", "server")
    options = {"port": port, "gateways": gateways, "max_running": max_running, "max_queue": max_queue}
    settings = load_settings({**options, "models": [model], "log_level": "warning"})
    os.environ[_RATE_VARIABLE] = str(rate)
    located = [Located(served, str(locate(served.source).path)) for served in settings.models]
    server = Supervisor(settings, located, bind(settings), factory="benchmarks.fake_server:build")
    raise typer.Exit(asyncio.run(server.run()))


if __name__ == "__main__":
    typer.run(main)
