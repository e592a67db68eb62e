"""Many speakers at once on the socket /v1/tts/live, some of whom leave in mid-sentence or send nonsense.

    python -m benchmarks.live_load --streams 64 --seconds 120 --out benchmarks/results/live-load.json

Starts a server with a speech model, and looks afterwards whether anything was lost or left behind. Exit status 1 if so.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import httpx
import msgspec
import numpy as np
import soundfile
import typer
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from benchmarks.server import Server, running

_MODEL = Path(__file__).parents[1] / "tests" / "data" / "s2-tiny"
_WORDS = re.findall(r"\S+", "the quick brown fox jumps over a lazy dog. and then? it sleeps, so they say; who knows!")
_NONSENSE = (
    b"",
    b"\xc1",
    b"\x93\x01\x02",
    msgspec.msgpack.encode({"event": 5}),
    msgspec.msgpack.encode({"no": "event"}),
)
_PATIENCE = 120.0  # seconds without a word from the server: then a stream is lost
_SHARE_LEAVING = 0.2  # of utterances
_SHARE_NONSENSE = 0.1  # of messages
_FRAME_BYTES = 2 * 2048  # of pcm
_SETTLE_SECONDS = 30.0


@dataclass
class Totals:
    """What became of the utterances, and what was wrong with any."""

    started: int = 0
    finished: int = 0
    left: int = 0  # by their clients
    nonsense: int = 0  # bad frames in the finished ones
    errors: int = 0  # that the server told these of
    new_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    audio_seconds: float = 0.0
    first_audio: list[float] = field(default_factory=list)  # seconds from a start
    formats: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.started - self.finished - self.left


async def load(url: str, streams: int, seconds: float, voices: list[str], seed: int = 0) -> Totals:
    """`streams` clients, each with one socket after the other, until the time is up and all that was begun is over."""
    totals = Totals()
    until = time.monotonic() + seconds
    clients = (_Client(url, totals, voices, random.Random(f"{seed}/{i}")) for i in range(streams))
    await asyncio.gather(*(client.run(until) for client in clients))
    return totals


class _Client:
    def __init__(self, url: str, totals: Totals, voices: list[str], chance: random.Random) -> None:
        self._url = url.replace("http", "ws", 1) + "/v1/tts/live"
        self._totals = totals
        self._voices = voices
        self._chance = chance

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            async with connect(self._url, max_size=None, compression=None) as socket:
                for _ in range(self._chance.randint(1, 4)):
                    if time.monotonic() > until or not await self._say(socket):
                        break

    async def _say(self, socket: ClientConnection) -> bool:
        """One utterance. Whether the socket is still there."""
        self._totals.started += 1
        leaves = self._chance.randint(0, 8) if self._chance.random() < _SHARE_LEAVING else None
        kind = self._chance.choice(("pcm", "pcm", "wav", "mp3", "opus"))
        sending = asyncio.create_task(self._send(socket, kind))
        try:
            return await self._listen(socket, kind, leaves, sending)
        except (ConnectionClosed, TimeoutError) as error:
            self._totals.problems.append(f"lost: {error!r}")
            return False
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, socket: ClientConnection, kind: str) -> int:
        """The number of bad frames among what was sent."""
        chance = self._chance
        request = {
            "text": "",
            "format": kind,
            "max_new_tokens": chance.randint(4, 16),
            "latency": chance.choice(("low", "balanced", "normal")),
            "reference_id": chance.choice([None, *self._voices]),
            "seed": chance.randrange(1 << 40),
        }
        nonsense = 0
        await socket.send(msgspec.msgpack.encode({"event": "start", "request": request}))
        for _ in range(chance.randint(1, 30)):
            if chance.random() < _SHARE_NONSENSE:
                nonsense += 1
                await socket.send(chance.choice(_NONSENSE))
            words = " ".join(chance.choices(_WORDS, k=chance.randint(1, 3))) + " "
            await socket.send(msgspec.msgpack.encode({"event": "text", "text": words}))
            if chance.random() < 0.1:
                await socket.send(msgspec.msgpack.encode({"event": chance.choice(("flush", "unheard of"))}))
            await asyncio.sleep(chance.random() * 0.02)
        await socket.send(msgspec.msgpack.encode({"event": "stop"}))
        return nonsense

    async def _listen(
        self, socket: ClientConnection, kind: str, leaves: int | None, sending: asyncio.Task[int]
    ) -> bool:
        start, size, errors, heard = time.monotonic(), 0, 0, 0
        while True:
            if leaves is not None and heard >= leaves:
                self._totals.left += 1
                if self._chance.random() < 0.5:
                    socket.transport.abort()  # as if the machine were gone
                return False
            async with asyncio.timeout(_PATIENCE):
                event = msgspec.msgpack.decode(await socket.recv())
            heard += 1
            match event["event"]:
                case "audio":
                    if not size:
                        self._totals.first_audio.append(time.monotonic() - start)
                    size += len(event["audio"])
                case "error":
                    errors += 1
                case "finish":
                    self._count(event, kind, size, errors, await sending)
                    return True

    def _count(self, finish: dict[str, Any], kind: str, size: int, errors: int, nonsense: int) -> None:
        totals = self._totals
        totals.finished += 1
        totals.nonsense += nonsense
        totals.errors += errors
        totals.formats[kind] += 1
        if finish["reason"] != "stop":
            totals.problems.append("an utterance failed")
            return
        totals.new_tokens += finish["new_tokens"]
        totals.prompt_tokens += finish["prompt_tokens"]
        totals.cached_tokens += finish["cached_tokens"]
        totals.audio_seconds += finish["time"]
        if errors != nonsense:
            totals.problems.append(f"{nonsense} bad frames and {errors} errors")
        if kind == "pcm" and size != finish["new_tokens"] * _FRAME_BYTES:
            totals.problems.append(f"{size} bytes for {finish['new_tokens']} frames")


def add_voices(url: str, count: int) -> list[str]:
    """Voices of two seconds each, of nobody; their names."""
    names = [f"voice {number}" for number in range(count)]
    for number, name in enumerate(names):
        with tempfile.SpooledTemporaryFile() as file:
            times = np.arange(2 * 44100) / 44100
            tone = 0.3 * np.sin(2 * np.pi * (110 + 30 * number) * times) * (1 + 0.5 * np.sin(2 * np.pi * 3 * times))
            soundfile.write(file, tone.astype(np.float32), 44100, format="WAV")
            file.seek(0)
            sent = {"id": name, "text": "Something that was said."}
            httpx.post(f"{url}/v1/references/add", data=sent, files={"audio": file}, timeout=60).raise_for_status()
    return names


def figures(url: str) -> dict[str, float]:
    """What /metrics says, added up over labels."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    found: dict[str, float] = defaultdict(float)
    for name, value in re.findall(r"^triptych:(\w+)\{[^}]*\} ([0-9.e+]+)$", text, re.MULTILINE):
        found[name] += float(value)
    return found


def settled(url: str) -> dict[str, float]:
    """The figures once nothing runs. Raises TimeoutError if something goes on running."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        now = figures(url)
        if not now["num_running_reqs"] and not now["num_queue_reqs"]:
            return now
        if time.monotonic() > deadline:
            raise TimeoutError(f"requests still run after {_SETTLE_SECONDS:g} s: {now}")
        time.sleep(0.2)


def disagreements(totals: Totals, before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Where what the server counted does not fit what its clients saw; `before` and `after` are of `settled`."""
    grown = {name: after[name] - before.get(name, 0) for name in after}
    ended = grown["num_aborted_requests_total"] + grown["speech_stream_completed_total"]
    return [
        what
        for what, right in (
            ("no request is running, so none holds KV", after["num_used_tokens"] == 0),
            ("each request was finished or cancelled", ended <= grown["num_requests_total"] <= ended + totals.left),
            ("clients heard no more than was spoken", totals.new_tokens <= grown["generation_tokens_total"]),
            ("and no more seconds", totals.audio_seconds <= grown["audio_duration_seconds_total"] + 1),
            ("the cache served what clients were told", totals.cached_tokens <= grown["cached_tokens_total"]),
        )
        if not right
    ]


def _resources(server: Server) -> dict[str, dict[str, int]]:
    kinds = {"engine": "streaming.worker", "gateway": "streaming.gateway"}
    found = {}
    for name, module in kinds.items():
        processes = server.children(module)
        found[name] = {
            "files": sum(process.num_fds() for process in processes),
            "threads": sum(process.num_threads() for process in processes),
            "resident_mib": sum(process.memory_info().rss for process in processes) >> 20,
        }
    return found


def _measure(model: str, streams: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", f"speech={model}", "--dtype", "float32", "--port", "0", "--voices", folder]
        with running("streaming.cli", "serve", *options) as server:
            voices = add_voices(server.url, 4)
            asyncio.run(load(server.url, streams, 3, voices, seed=1))  # after this, threads and buffers are there
            before, at_first = settled(server.url), _resources(server)
            start = time.monotonic()
            totals = asyncio.run(load(server.url, streams, seconds, voices))
            took = time.monotonic() - start
            after = settled(server.url)
            time.sleep(2)  # for sockets to be closed
            at_last = _resources(server)
            problems = totals.problems + disagreements(totals, before, after)
            for kind, then in at_first.items():
                if at_last[kind]["files"] > then["files"]:
                    problems.append(f"the {kind} has more files open than before")
            if list(Path(folder).glob(".new-*")):
                problems.append("the voice library has files that were never finished")
            log = server.log.read_text()
            if "Traceback" in log:
                problems.append(f"the server's log has a traceback: {log[-2000:]}")
    grown = {name: round(after[name] - before.get(name, 0), 3) for name in sorted(after)}
    return {
        "seconds": round(took, 1),
        "utterances": {
            "started": totals.started,
            "finished": totals.finished,
            "left_by_their_clients": totals.left,
            "lost": totals.lost,
        },
        "bad_frames": {"sent": totals.nonsense, "told_of": totals.errors},
        "formats": dict(totals.formats),
        "audio_seconds": round(totals.audio_seconds, 1),
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "first_audio_seconds": {
            "median": round(median(totals.first_audio), 3),
            "p95": round(quantiles(totals.first_audio, n=20)[-1], 3),
        },
        "resources": {"before": at_first, "after": at_last},
        "metrics": {name: value for name, value in grown.items() if name.endswith("_total") and value},
        "problems": problems,
    }


def main(
    streams: Annotated[int, typer.Option(min=1, help="Clients, each with one socket at a time.")] = 64,
    seconds: Annotated[float, typer.Option(min=1)] = 120,
    model: Annotated[str, typer.Option(help="A speech model: a path or a hub id.")] = str(_MODEL),
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
        "model": Path(model).name,
        "streams": streams,
        **_measure(model, streams, seconds),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    raise typer.Exit(1 if record["problems"] or record["utterances"]["lost"] else 0)


if __name__ == "__main__":
    typer.run(main)
