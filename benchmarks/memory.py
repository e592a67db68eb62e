"""Whether thousands of requests leave a server's memory as it was.

    python -m benchmarks.memory --requests 10000 --out benchmarks/results/memory.json

It starts `triptych serve` with the embedded chat model and a small KV pool, so that the warm-up fills both the pool and
the prefix tree, and looks at the resident memory of its processes after every tenth of the requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.load import Plan, run
from benchmarks.server import Server, running
from streaming.settings import DEFAULT_MODEL

_PARTS = 10
_MIB = 1 << 20


def processes(server: Server) -> dict[str, psutil.Process]:
    (engine,) = server.children("streaming.worker")
    (gateway,) = server.children("streaming.gateway")
    return {"engine": engine, "gateway": gateway}


def watch(
    server: Server, plan: Plan, *, warm_up: int, note: Callable[[int, dict[str, float]], None] = lambda *_: None
) -> list[dict[str, float]]:
    """Resident MiB by process: after `warm_up` requests, then after each tenth of `plan.requests` more.

    Raises RuntimeError if a request fails.
    """
    watched = processes(server)
    readings = []
    counts = [warm_up, *[plan.requests // _PARTS] * _PARTS]
    for part, count in enumerate(counts):
        samples, _ = asyncio.run(run(replace(plan, requests=count, seed=part)))
        failed = [sample.error for sample in samples if sample.error is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} of {count} requests failed: {failed[0]}")
        readings.append({name: process.memory_info().rss / _MIB for name, process in watched.items()})
        note(sum(counts[: part + 1]), readings[-1])
    return readings


def main(
    requests: Annotated[int, typer.Option(min=_PARTS)] = 10_000,
    warm_up: Annotated[int, typer.Option(min=1)] = 1_000,
    concurrency: Annotated[int, typer.Option(min=1)] = 32,
    input_tokens: Annotated[int, typer.Option(min=1)] = 24,
    output_tokens: Annotated[int, typer.Option(min=1)] = 4,
    kv_slots: Annotated[int, typer.Option(min=2)] = 8192,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    def note(done: int, reading: dict[str, float]) -> None:
        print(f"{done:6d} requests: " + ", ".join(f"{name} {mib:.1f} MiB" for name, mib in reading.items()), flush=True)

    with running("streaming.cli", "serve", "--port", "0", "--kv-slots", str(kv_slots)) as server:
        plan = Plan(server.url, DEFAULT_MODEL, None, concurrency, requests, input_tokens, output_tokens)
        readings = watch(server, plan, warm_up=warm_up, note=note)
    if out is not None:
        record = {
            "date": date.today().isoformat(),
            "model": DEFAULT_MODEL,
            "requests": requests,
            "warm_up": warm_up,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "concurrency": concurrency,
            "kv_slots": kv_slots,
            "growth_mib": {name: round(readings[-1][name] - readings[0][name], 1) for name in readings[0]},
            "resident_mib": {name: [round(reading[name], 1) for reading in readings] for name in readings[0]},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
