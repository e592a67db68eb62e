"""Engines for the tests to talk to: in a thread, where they can be looked into, or in a process, where they can die."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ar_core.request import Output, Request, SamplingParams, Tokens
from benchmarks import fake_engine
from streaming import process
from streaming.client import EngineClient
from streaming.worker import Worker, WorkerSpec


@contextlib.contextmanager
def threaded_worker(address: str, *, send_queue: int = 1000, **options: Any) -> Iterator[fake_engine.FakeEngine]:
    engine, info = fake_engine.make(**options)
    worker = Worker(engine, info, address, send_queue)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield engine
    finally:
        for request_id in list(engine._running):
            engine.abort(request_id)
        worker._routes.clear()
        worker.drain()
        thread.join(10)
        assert not thread.is_alive()


async def process_worker(address: str, **arguments: Any) -> asyncio.subprocess.Process:
    return await process.start(
        "streaming.worker", WorkerSpec("fake", address, "benchmarks.fake_engine:make", arguments)
    )


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[EngineClient]:
    client = EngineClient(address)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def end(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    await child.wait()


def ask(name: str, prompt: list[int], max_tokens: int, **sampling: Any) -> Request:
    return Request(name, [Tokens(prompt)], SamplingParams(max_tokens=max_tokens, **sampling))


async def collect(client: EngineClient, request: Request) -> list[Output]:
    async with aclosing(client.submit(request)) as outputs:
        return [output async for output in outputs]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def ipc(folder: Path) -> str:
    return f"ipc://{folder}/engine"
