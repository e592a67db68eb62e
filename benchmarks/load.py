"""Load for any server that speaks OpenAI's API: many streams at once, and how long each kept its reader waiting.

    triptych bench --url http://127.0.0.1:8000 --concurrency 64 --requests 512 --input-tokens 256 --output-tokens 128

Without a dataset, prompts are random token ids sent to /v1/completions, so that lengths are exact and nothing is found
in a cache by chance; the answers go on past their end token. A dataset is a file of JSON lines: {"prompt": TEXT} goes
to /v1/completions, {"messages": [...]} to /v1/chat/completions.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.event_stream import Endpoint, StreamError, post

_RANDOM_IDS = (1000, 20000)  # ordinary tokens in any vocabulary of today
_PERCENTILES = (50, 90, 99)
_REQUEST_SECONDS = 600.0


class LoadError(ValueError):
    """Load that cannot be made as asked; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`request_rate` is requests per second, at random times (a Poisson process); None: as fast as `concurrency`
    allows. `dataset` is used from its start, over and over. Raises LoadError."""

    url: str
    model: str
    api_key: str | None = None
    concurrency: int = 16
    requests: int = 64
    input_tokens: int = 128
    output_tokens: int = 64
    request_rate: float | None = None
    dataset: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("concurrency", "requests", "input_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise LoadError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.request_rate is not None and self.request_rate <= 0:
            raise LoadError(f"request_rate is {self.request_rate}; it must be above 0")
        if not self.url.startswith(("http://", "https://")):
            raise LoadError(f"url is {self.url!r}; it must begin with http:// or https://")

    def base(self) -> str:
        """The URL without a trailing /v1, which some tools want and some do not."""
        return self.url.rstrip("/").removesuffix("/v1")

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Sample:
    """One request as its client saw it. Times are seconds of `time.perf_counter`."""

    start: float
    pieces: list[float] = field(default_factory=list)  # when text arrived
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


# What is read of an event; everything else in it is skipped.
class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.text or (self.delta and (self.delta.content or self.delta.reasoning_content)))


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


def first_model(url: str, api_key: str | None) -> str:
    """The first that the server lists. Raises LoadError if it lists none."""
    plan = Plan(url, "", api_key)
    try:
        answer = httpx.get(f"{plan.base()}/v1/models", headers=plan.headers(), timeout=30)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, LookupError, ValueError) as error:
        raise LoadError(f"{plan.base()} names no model ({error}); give one with --model") from None


def bench(plan: Plan, out: Path | None) -> int:
    """Make the load, print how it went and perhaps write it; the exit status is 1 if a request failed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(plan.model, total=plan.requests)
        samples, seconds = uvloop.run(run(plan, lambda _: bar.advance(task)))
    figures = report(plan, samples, seconds)
    _print(figures)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if figures["errors"] else 0


async def run(plan: Plan, on_done: Callable[[Sample], None] = lambda _: None) -> tuple[list[Sample], float]:
    """All requests, in the order of their starts, and the seconds that they took together."""
    bodies = list(_bodies(plan))
    free = asyncio.Semaphore(plan.concurrency)
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for (path, body), due in zip(bodies, _due(plan)):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            await free.acquire()
            endpoint = Endpoint(plan.base() + path, plan.headers())
            task = group.create_task(_measure(endpoint, body))
            task.add_done_callback(lambda _: free.release())
            task.add_done_callback(lambda done: on_done(done.result()))
            tasks.append(task)
    return [task.result() for task in tasks], time.perf_counter() - start


def report(plan: Plan, samples: list[Sample], seconds: float) -> dict[str, Any]:
    """What was asked and how it went; times in milliseconds. A piece of a stream can hold several tokens."""
    good = [sample for sample in samples if sample.error is None]
    output = sum(sample.output_tokens for sample in good)
    gaps = [b - a for sample in good for a, b in zip(sample.pieces, sample.pieces[1:])]
    return {
        "model": plan.model,
        "concurrency": plan.concurrency,
        "request_rate": plan.request_rate,
        "requests": len(samples),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None)),
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "cached_tokens": sum(sample.cached_tokens for sample in good),
        "output_tokens": output,
        "requests_per_second": round(len(good) / seconds, 3),
        "output_tokens_per_second": round(output / seconds, 1),
        "first_token_ms": _spread([sample.pieces[0] - sample.start for sample in good if sample.pieces]),
        "between_pieces_ms": _spread(gaps),
        "end_to_end_ms": _spread([sample.end - sample.start for sample in good]),
    }


async def _measure(endpoint: Endpoint, body: bytes) -> Sample:
    sample = Sample(time.perf_counter())

    def take(data: bytes) -> None:
        if data == b"[DONE]":
            return
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError as error:
            sample.error = f"an event is not what OpenAI's API has: {error}"
            return
        if event.error is not None:
            sample.error = f"the stream ended with an error: {json.dumps(event.error)[:300]}"
        if any(choice.says_something for choice in event.choices):
            sample.pieces.append(time.perf_counter())
        if event.usage is not None:
            sample.prompt_tokens = event.usage.prompt_tokens
            sample.output_tokens = event.usage.completion_tokens or 0
            details = event.usage.prompt_tokens_details
            sample.cached_tokens = (details.cached_tokens if details else None) or 0

    try:
        async with asyncio.timeout(_REQUEST_SECONDS):
            await post(endpoint, body, take)
    except TimeoutError:
        sample.error = f"not finished within {_REQUEST_SECONDS:.0f} s"
    except (StreamError, OSError) as error:
        sample.error = str(error)
    sample.end = time.perf_counter()
    return sample


def _due(plan: Plan) -> Iterator[float]:
    """When each request may start, in seconds from the beginning."""
    at = 0.0
    rng = random.Random(plan.seed)
    while True:
        yield at
        at += rng.expovariate(plan.request_rate) if plan.request_rate else 0.0


def _bodies(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """A path and a body for each request."""
    common = {
        "model": plan.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": plan.output_tokens,
        "temperature": 0,
    }
    entries = _read(plan.dataset) if plan.dataset else None
    rng = np.random.default_rng(plan.seed)
    for index in range(plan.requests):
        if entries is None:
            ids = rng.integers(*_RANDOM_IDS, plan.input_tokens).tolist()
            yield "/v1/completions", json.dumps({**common, "prompt": ids, "ignore_eos": True}).encode()
        else:
            entry = entries[index % len(entries)]
            path = "/v1/chat/completions" if "messages" in entry else "/v1/completions"
            yield path, json.dumps({**common, **entry}).encode()


def _read(dataset: Path) -> list[dict[str, Any]]:
    try:
        lines = [line for line in dataset.read_text().splitlines() if line.strip()]
        entries = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {dataset}: {error}") from None
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
            raise LoadError(f'line {number} of {dataset} must be {{"prompt": ...}} or {{"messages": [...]}}')
    if not entries:
        raise LoadError(f"{dataset} has no lines")
    return entries


def _spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    percentiles = zip(_PERCENTILES, np.percentile(seconds, _PERCENTILES))
    figures = {"mean": float(np.mean(seconds)), **{f"p{at}": float(value) for at, value in percentiles}}
    return {name: round(1000 * value, 2) for name, value in figures.items()}


def _print(figures: dict[str, Any]) -> None:
    totals = Table("total", "", title=f"{figures['requests']} requests to {figures['model']}")
    spreads = Table("milliseconds", "mean", *(f"p{at}" for at in _PERCENTILES))
    for name, value in figures.items():
        if name.endswith("_ms"):
            spreads.add_row(name.removesuffix("_ms").replace("_", " "), *(f"{figure:.1f}" for figure in value.values()))
        elif name not in {"model", "requests", "errors", "request_rate"}:
            totals.add_row(name.replace("_", " "), f"{value:,}")
    console = Console()
    console.print(totals)
    console.print(spreads)
    for message, count in figures["errors"].items():
        console.print(f"{count} failed: {message}", markup=False, style="red")
