"""The gateway alone, in front of a fake engine: how many streams it carries, and what a token costs it.

    python -m benchmarks.gateway --out benchmarks/results/gateway.json

Engine, gateway and load generator are a process each. Twice: with streams paced as people read, whose tokens arrive one
by one; and with an engine faster than any gateway, whose tokens then travel several in a piece. A token's price in CPU
seconds of the gateway holds on a busy machine too; its inverse is what a gateway process carries on a core of its own.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import uvloop

from benchmarks.load import Plan, report, run
from benchmarks.server import Server, running
from streaming.settings import DEFAULT_MODEL

_RATES = {"paced": 20, "flat_out": 1000}  # tokens per second of each stream


def measure(server: Server, plan: Plan) -> dict[str, Any]:
    """The load's report, with the CPU seconds that the gateways spent on it."""
    gateways = server.children("streaming.gateway")
    before = sum(map(_cpu_seconds, gateways))
    samples, seconds = uvloop.run(run(plan))
    spent = sum(map(_cpu_seconds, gateways)) - before
    figures = report(plan, samples, seconds)
    return {
        **figures,
        "pieces": sum(len(sample.pieces) for sample in samples),
        "gateway_cpu_seconds": round(spent, 2),
        "gateway_cpu_microseconds_per_token": round(1e6 * spent / max(figures["output_tokens"], 1), 1),
        "tokens_per_gateway_cpu_second": round(figures["output_tokens"] / spent),
    }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main(
    streams: Annotated[int, typer.Option(min=1, help="Open at once.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of each stream.")] = 256,
    gateways: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
        "gateways": gateways,
    }
    for name, rate in _RATES.items():
        with running("benchmarks.fake_server", "--rate", str(rate), "--gateways", str(gateways)) as server:
            plan = Plan(server.url, DEFAULT_MODEL, None, streams, streams, input_tokens=32, output_tokens=output_tokens)
            record[name] = measure(server, plan)
    print(json.dumps(record, indent=1))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    raise typer.Exit(1 if any(record[name]["errors"] for name in _RATES) else 0)


if __name__ == "__main__":
    typer.run(main)
