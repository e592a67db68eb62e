"""A speech model's engine: pace, time to first sound, and how much of the voices' KV the cache holds.

    python -m benchmarks.speech tests/data/s2-tiny --dtype float32 --out benchmarks/results/speech-cpu.json

Drives the engine in this process, without a server. References are random codes, as long as a recording of
`--reference-seconds`; every speech is `--frames` long, whatever the model would like. A chunk is late if it leaves
after a listener has heard all before it.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ar_core.config import EngineConfig
from ar_core.request import Request
from audio.voices import Reference
from modalities.checkpoint import locate
from modalities.registry import build_speech_engine
from modalities.speech.engine import SpeechEngine
from modalities.speech.model import SpeechModel, SpeechOptions

_TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds."
_TRANSCRIPT = "This is what the voice sounds like when it reads a sentence aloud."


@dataclass
class Listener:
    """What one stream's listener meets: times in seconds from the request on."""

    asked: float
    first: float | None = None
    runs_dry: float = 0.0
    frames: int = 0
    chunks: int = 0
    late: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ended: float = 0.0

    def chunk(self, now: float, seconds: float) -> None:
        if self.first is None:
            self.first = now - self.asked
        elif now > self.runs_dry:
            self.late += 1
        self.chunks += 1
        self.runs_dry = max(self.runs_dry, now) + seconds


@dataclass
class Bench:
    model: SpeechModel
    engine: SpeechEngine
    options: SpeechOptions
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    asked: int = 0

    def voice(self, seconds: float) -> list[Reference]:
        frames = max(1, round(seconds * self.model.codec.frame_rate))
        sizes = np.array(self.model.codec.codebook_sizes)[:, None]
        codes = (self.rng.random((len(sizes), frames)) * sizes).astype(np.int64)
        return [Reference(codes, _TRANSCRIPT)]

    def request(self, voice: Sequence[Reference], salt: str = "") -> Request:
        self.asked += 1
        options = replace(self.options, seed=self.asked, cache_salt=salt)
        request = self.model.request(f"{self.asked}", _TEXT, voice, options)
        return replace(request, sampling=replace(request.sampling, ignore_eos=True))

    def run(self, requests: Sequence[Request], in_flight: int | None = None) -> tuple[list[Listener], float]:
        """Serve the requests, at most `in_flight` at once; the listeners, and the seconds that all took."""
        listeners: dict[str, Listener] = {}
        todo = list(requests)
        start = time.perf_counter()
        while todo or self.engine.has_work:
            while todo and sum(not listener.ended for listener in listeners.values()) < (in_flight or len(requests)):
                request = todo.pop(0)
                listeners[request.id] = Listener(time.perf_counter())
                self.engine.add(request)
            for output in self.engine.step():
                now = time.perf_counter()
                listener = listeners[output.request_id]
                listener.frames += len(output.rows)
                listener.prompt_tokens, listener.cached_tokens = output.prompt_tokens, output.cached_tokens
                if output.payload:
                    listener.chunk(now, len(output.payload) / 4 / self.model.sample_rate)
                if output.finish is not None:
                    listener.ended = now
        return list(listeners.values()), time.perf_counter() - start


def one_stream(bench: Bench, seconds: float, repeats: int) -> dict[str, float]:
    """Nobody else there: with a voice seen for the first time, and with one that is cached."""
    cold, warm, paces = [], [], []
    for _ in range(repeats):
        voice = bench.voice(seconds)
        for times in (cold, warm):
            (listener,), took = bench.run([bench.request(voice)])
            times.append(listener.first or 0.0)
            paces.append(took * bench.model.codec.frame_rate / listener.frames)
    return {
        "first sound, new voice (ms)": 1000 * statistics.median(cold),
        "first sound, cached voice (ms)": 1000 * statistics.median(warm),
        "real-time factor": statistics.median(paces),
    }


def many_streams(bench: Bench, streams: int, seconds: float) -> dict[str, float]:
    """So many speeches at once, in four voices that are cached."""
    voices = [bench.voice(seconds) for _ in range(4)]
    bench.run([bench.request(voice) for voice in voices])
    listeners, took = bench.run([bench.request(voices[i % 4]) for i in range(streams)])
    frames = sum(listener.frames for listener in listeners)
    firsts = sorted(listener.first or 0.0 for listener in listeners)
    chunks = sum(listener.chunks for listener in listeners)
    return {
        "streams": streams,
        "acoustic tokens/s": frames * bench.model.codec.num_codebooks / took,
        "seconds of sound per second": frames / bench.model.codec.frame_rate / took,
        "real-time factor of a stream": took * bench.model.codec.frame_rate * streams / frames,
        "first sound, median (ms)": 1000 * statistics.median(firsts),
        "first sound, slowest (ms)": 1000 * firsts[-1],
        "late chunks (%)": 100 * sum(listener.late for listener in listeners) / chunks,
    }


def trace(bench: Bench, seconds: float, requests: int, in_flight: int, *, cached: bool) -> dict[str, float]:
    """20 voices, the n-th asked for 1/n as often as the first (Zipf)."""
    voices = [bench.voice(seconds) for _ in range(20)]
    shares = 1 / np.arange(1, 21)
    picks = np.random.default_rng(1).choice(20, requests, p=shares / shares.sum())
    asked = [bench.request(voices[pick], "" if cached else f"salt {bench.asked}") for pick in picks]
    listeners, took = bench.run(asked, in_flight)
    prompt = sum(listener.prompt_tokens for listener in listeners)
    return {
        "reference (s)": seconds,
        "cache": float(cached),
        "hit rate (%)": 100 * sum(listener.cached_tokens for listener in listeners) / prompt,
        "first sound, median (ms)": 1000 * statistics.median(listener.first or 0.0 for listener in listeners),
        "speeches per second": requests / took,
    }


def main(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a speech model.")],
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "auto",
    streams: Annotated[str, typer.Option(help="How many at once, comma-separated.")] = "1,4,16",
    frames: Annotated[int, typer.Option(min=1, help="Length of each speech.")] = 64,
    reference_seconds: Annotated[str, typer.Option(help="Lengths of references, comma-separated.")] = "2,5",
    requests: Annotated[int, typer.Option(min=1, help="Speeches of the trace with 20 voices.")] = 60,
    latency: Annotated[str, typer.Option()] = "low",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    counts = [int(count) for count in streams.split(",")]
    lengths = [float(length) for length in reference_seconds.split(",")]
    checkpoint = locate(source)
    config = EngineConfig(device=device, dtype=dtype, max_running=max(*counts, 8), memory_fraction=0.7)
    options = SpeechOptions(max_frames=frames, latency=latency)  # type: ignore[arg-type]
    bench = Bench(SpeechModel(checkpoint), build_speech_engine(checkpoint, config), options)
    bench.run([bench.request(bench.voice(1.0)) for _ in range(2)])  # warm up
    figures: dict[str, list[dict[str, float]]] = {
        "one stream": [one_stream(bench, max(lengths), repeats)],
        "many streams": [many_streams(bench, n, max(lengths)) for n in track(counts, "many streams", transient=True)],
        "20 voices": [
            trace(bench, length, requests, 8, cached=cached)
            for length in track(lengths, "20 voices", transient=True)
            for cached in (True, False)
        ],
    }
    for title, rows in figures.items():
        _show(title, rows)
    if out is not None:
        _write(out, source, bench.engine, figures)


def _show(title: str, rows: list[dict[str, float]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    Console().print(table)


def _write(out: Path, source: str, engine: SpeechEngine, figures: dict[str, Any]) -> None:
    core = engine.engine
    device = torch.cuda.get_device_name(core.device) if core.device.type == "cuda" else platform.machine()
    record = {
        "date": date.today().isoformat(),
        "model": source,
        "device": f"{device}, {torch.get_num_threads()} threads" if core.device.type == "cpu" else device,
        "dtype": str(core.dtype),
        "torch": torch.__version__,
        **figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
