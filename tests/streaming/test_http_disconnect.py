"""A client that goes away frees what it asked for: through HTTP, the socket, and a worker with an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from benchmarks.fake_engine import FakeEngine
from streaming.client import EngineClient
from streaming.http.app import build_app
from streaming.http.served import ServedModel
from tests.streaming.hosting import ipc, threaded_worker, until
from tests.streaming.http_fakes import FakeChat, running

SECONDS = 30  # for what should take milliseconds
ENDLESS = 1500  # tokens, at 100 a second
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
TEXT = ("/v1/completions", {"prompt": "Hi"})


@pytest.fixture(scope="module")
def engine_and_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeEngine, str]]:
    """A gateway and, in the worker's loop, an engine that runs two requests at once."""
    address = ipc(tmp_path_factory.mktemp("ipc"))
    with threaded_worker(address, tokens_per_second=100, max_running=2) as engine:
        app = build_app({"fake": ServedModel("fake", 1700000000, EngineClient(address), FakeChat())})
        with running(app) as url:
            yield engine, url


@pytest.fixture
async def http(engine_and_url: tuple[FakeEngine, str]) -> AsyncIterator[httpx.AsyncClient]:
    engine, url = engine_and_url
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        async with asyncio.timeout(SECONDS):
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.02)
        yield client
    await until(lambda: not engine.has_work, SECONDS)


@pytest.fixture
def engine(engine_and_url: tuple[FakeEngine, str]) -> FakeEngine:
    return engine_and_url[0]


@asynccontextmanager
async def asking(http: httpx.AsyncClient, path: str, body: dict[str, Any], **fields: Any) -> AsyncIterator[None]:
    """An open request; at the end its client goes away."""
    json = {"model": "fake", "max_tokens": ENDLESS, **body, **fields}
    task = asyncio.create_task(http.post(path, json=json))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize(("path", "body"), [CHAT, TEXT], ids=["chat", "completion"])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_leaves_frees_what_runs(
    http: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], n: int, stream: bool
) -> None:
    aborted = len(engine.aborted)
    async with asking(http, path, body, n=n, stream=stream):
        await until(lambda: len(engine._running) == n, SECONDS)
    await until(lambda: not engine.has_work, SECONDS)
    assert len(engine.aborted) == aborted + n


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
async def test_a_client_that_leaves_the_queue_gives_its_place_up(
    http: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    async with asking(http, *TEXT, n=2):
        await until(lambda: len(engine._running) == 2, SECONDS)
        running_before = set(engine._running)
        async with asking(http, *TEXT, stream=stream):
            await until(lambda: len(engine._waiting) == 1, SECONDS)
        await until(lambda: not engine._waiting, SECONDS)
        assert set(engine._running) == running_before  # the others never noticed


async def test_who_stays_gets_the_whole_answer_while_others_leave(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    staying = asyncio.create_task(http.post("/v1/completions", json={"model": "fake", **TEXT[1], "max_tokens": 50}))
    for _ in range(4):
        async with asking(http, *TEXT, stream=True):
            await until(lambda: len(engine._running) == 2, SECONDS)
    answer = (await staying).json()
    assert answer["choices"][0]["text"] == "Hi" * 25


async def test_a_client_that_leaves_amid_its_body_is_no_request(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()
    writer.close()
    requests = engine.stats().requests
    assert (await http.get("/health")).status_code == 200
    assert engine.stats().requests == requests
