"""Thousands of requests leave the memory of a server's processes as it was."""

from __future__ import annotations

from benchmarks.load import Plan
from benchmarks.memory import watch
from benchmarks.server import running
from modalities.checkpoint import Checkpoint
from streaming.settings import DEFAULT_MODEL

REQUESTS = 3000
BYTES_EACH = 512  # what one request may leave behind: less than any record of one


def test_memory_stays_flat(chat_checkpoint: Checkpoint) -> None:
    with running("benchmarks.fake_server") as server:
        plan = Plan(server.url, DEFAULT_MODEL, concurrency=32, requests=REQUESTS, input_tokens=16, output_tokens=4)
        readings = watch(server, plan, warm_up=1000)
    for name in ("engine", "gateway"):
        mib = [reading[name] for reading in readings]
        assert mib[-1] - mib[0] < REQUESTS * BYTES_EACH / (1 << 20), f"{name}: {mib}"
