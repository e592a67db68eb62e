"""The client, against a worker in a thread or, where it has to die, in a process."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from ar_core.request import FinishReason, Output, QueueFull, RequestError
from benchmarks.fake_engine import CRASH, EXIT
from streaming.client import EngineClient, EngineUnavailable
from tests.streaming.hosting import ask, collect, connected, end, ipc, process_worker, threaded_worker, tokens, until

ENDLESS = 8000


async def test_a_request_streams_to_its_end(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path)):
        async with connected(ipc(tmp_path)) as client:
            info = await client.wait_ready()
            assert (info.name, info.kind, info.max_context) == ("fake", "chat", 8192)
            outputs = await collect(client, ask("mine", [5, 6, 7], 8, logprobs=1))
            assert tokens(outputs) == [5, 6, 7, 5, 6, 7, 5, 6]
            assert [entry.token for out in outputs for entry in out.logprobs or ()] == tokens(outputs)
            assert [out.finish for out in outputs if out.finish] == [FinishReason.LENGTH] == [outputs[-1].finish]
            assert {out.request_id for out in outputs} == {"mine"}
            assert outputs[-1].prompt_tokens == 3
            assert client.inflight == 0


async def test_many_at_once_each_get_their_own(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path), max_running=200):
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            requests = [ask(str(i), [i + 1, i + 2, i + 3], 20) for i in range(200)]
            answers = await asyncio.gather(*(collect(client, request) for request in requests))
            for i, outputs in enumerate(answers):
                assert tokens(outputs) == [i + 1 + k % 3 for k in range(20)]
            stats = await client.stats()
            assert (stats.requests, stats.finished, stats.generated_tokens) == (200, 200, 4000)


async def test_what_arrives_while_the_caller_is_busy_comes_as_one(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path)):
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            async with aclosing(client.submit(ask("a", [1, 2], 50))) as outputs:
                first = await anext(outputs)
                await until(lambda: client.inflight == 0)
                rest = [output async for output in outputs]
            assert len(rest) == 1 and rest[0].finish is FinishReason.LENGTH
            assert tokens([first, *rest]) == [1, 2] * 25


async def test_closing_the_generator_aborts(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path), tokens_per_second=200) as engine:
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            async with aclosing(client.submit(ask("a", [1], ENDLESS))) as outputs:
                await anext(outputs)
            assert client.inflight == 0
            await until(lambda: len(engine.aborted) == 1 and not engine.has_work)


async def test_cancelling_the_task_aborts(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path), tokens_per_second=200, max_running=1) as engine:
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            tasks = [asyncio.create_task(collect(client, ask(str(i), [1], ENDLESS))) for i in range(2)]
            await until(lambda: engine.stats().running == 1 and engine.stats().waiting == 1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: len(engine.aborted) == 2 and not engine.has_work)


async def test_refusals_are_raised_before_the_first_output(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path), tokens_per_second=100, max_running=1, max_queue=1) as engine:
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            with pytest.raises(RequestError, match="9000 tokens") as caught:
                await collect(client, ask("a", [1] * 9000, 1))
            assert caught.value.param == "prompt"
            with pytest.raises(RequestError, match="4294967296"):
                await collect(client, ask("a", [2**32], 1))
            with pytest.raises(RequestError, match="64 bits"):
                await collect(client, ask("a", [1], 1, seed=2**70))
            tasks = []
            for expected in ((1, 0), (1, 1)):
                tasks.append(asyncio.create_task(collect(client, ask("b", [1], ENDLESS))))
                await until(lambda want=expected: (engine.stats().running, engine.stats().waiting) == want)
            with pytest.raises(QueueFull, match="no more than 1"):
                await collect(client, ask("c", [1], 1))
            assert client.inflight == 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_slow_reader_does_not_hold_up_others(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path)):
        async with connected(ipc(tmp_path)) as client, connected(ipc(tmp_path)) as other:
            await asyncio.gather(client.wait_ready(), other.wait_ready())
            async with aclosing(client.submit(ask("slow", [1, 2], ENDLESS))) as slow:
                await anext(slow)
                assert len(tokens(await collect(client, ask("a", [3], 100)))) == 100
                assert len(tokens(await collect(other, ask("a", [3], 100)))) == 100


async def test_nothing_is_accepted_before_the_engine_is_there(tmp_path: Path) -> None:
    async with connected(ipc(tmp_path)) as client:
        assert not client.ready and not client.failed
        with pytest.raises(EngineUnavailable, match="is starting"):
            await collect(client, ask("a", [1], 1))
        with pytest.raises(EngineUnavailable, match="is starting"):
            await client.stats()
        with threaded_worker(ipc(tmp_path)):
            await asyncio.wait_for(client.wait_ready(), 10)


async def test_a_killed_engine_fails_what_is_in_flight_and_can_come_back(tmp_path: Path) -> None:
    engine = await process_worker(ipc(tmp_path), tokens_per_second=100)
    try:
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            tasks = [asyncio.create_task(collect(client, ask(str(i), [i + 1], ENDLESS))) for i in range(20)]
            while (await client.stats()).running < 20:
                await asyncio.sleep(0.01)
            killed = time.monotonic()
            engine.send_signal(signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - killed < 1
            assert all(isinstance(result, EngineUnavailable) for result in results)
            assert client.failed and not client.ready and client.inflight == 0
            with pytest.raises(EngineUnavailable, match="stopped"):
                await collect(client, ask("a", [1], 1))
            await engine.wait()
            engine = await process_worker(ipc(tmp_path))
            await asyncio.wait_for(client.wait_ready(), 20)
            assert not client.failed
            assert tokens(await collect(client, ask("b", [4, 5], 4))) == [4, 5, 4, 5]
    finally:
        await end(engine)


async def test_a_failing_step_ends_every_request_and_the_process(tmp_path: Path) -> None:
    engine = await process_worker(ipc(tmp_path), tokens_per_second=50)
    try:
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            victim = asyncio.create_task(collect(client, ask("victim", [1], ENDLESS)))
            while (await client.stats()).running < 1:
                await asyncio.sleep(0.01)
            for outputs in await asyncio.gather(victim, collect(client, ask("culprit", [CRASH], 5))):
                last: Output = outputs[-1]
                assert last.finish is FinishReason.ERROR
                assert last.error is not None and "RuntimeError: out of memory" in last.error
            assert await asyncio.wait_for(engine.wait(), 10) == 1
            await until(lambda: client.failed)
    finally:
        await end(engine)


async def test_an_engine_that_ends_without_a_word(tmp_path: Path) -> None:
    engine = await process_worker(ipc(tmp_path))
    try:
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            with pytest.raises(EngineUnavailable, match="stopped"):
                await asyncio.wait_for(collect(client, ask("a", [EXIT], 5)), 10)
    finally:
        await end(engine)


async def test_closing_fails_what_is_in_flight(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path), tokens_per_second=200) as engine:
        client = EngineClient(ipc(tmp_path))
        await client.start()
        await client.wait_ready()
        task = asyncio.create_task(collect(client, ask("a", [1], ENDLESS)))
        await until(lambda: engine.stats().running == 1)
        await client.close()
        with pytest.raises(EngineUnavailable, match="closed"):
            await task
        await until(lambda: len(engine.aborted) == 1)
