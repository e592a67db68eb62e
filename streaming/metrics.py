"""What Prometheus is told. A gateway counts HTTP and times streams; engines report their own figures when asked.

With several gateway processes, set PROMETHEUS_MULTIPROC_DIR to a directory of the server's own before they start: each
then answers /metrics with the sums over all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ar_core.stats import EngineStats

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_FACTORS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 5.0)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

HTTP_REQUESTS = Counter("triptych:http_requests_total", "HTTP requests", ["endpoint", "method"])
HTTP_RESPONSES = Counter("triptych:http_responses_total", "HTTP responses", ["endpoint", "method", "status_code"])
HTTP_ACTIVE = Gauge("triptych:http_requests_active", "HTTP requests in progress", multiprocess_mode="livesum")
FIRST_TOKEN = Histogram(
    "triptych:time_to_first_token_seconds", "Until the first token left the engine", ["model_name"], buckets=_SECONDS
)
INTER_TOKEN = Histogram(
    "triptych:inter_token_latency_seconds", "Between tokens of a stream", ["model_name"], buckets=_TOKEN_SECONDS
)
END_TO_END = Histogram(
    "triptych:e2e_request_latency_seconds", "Until an answer was whole", ["model_name"], buckets=_SECONDS
)
FIRST_AUDIO = Histogram("triptych:audio_ttfp_s", "Until the first sound left", ["model_name"], buckets=_SECONDS)
REAL_TIME_FACTOR = Histogram(
    "triptych:audio_rtf", "Time that a speech took, over its length", ["model_name"], buckets=_FACTORS
)
AUDIO_SECONDS = Counter("triptych:audio_duration_seconds_total", "Seconds of sound", ["model_name"])
SPEECHES = Counter("triptych:speech_stream_completed_total", "Speeches that were finished", ["model_name"])
UNDERRUNS = Counter(
    "triptych:audio_underruns_total", "Chunks that left later than a listener needed them", ["model_name"]
)
UNDERRUN_SECONDS = Counter("triptych:audio_underrun_seconds_total", "How much later, together", ["model_name"])


class StreamTimer:
    """Times one sequence, from its creation on."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._inter_token = INTER_TOKEN.labels(model_name)
        self._start = self._last = time.perf_counter()
        self._tokens = 0

    def tokens(self, count: int) -> None:
        """`count` tokens have arrived together."""
        now = time.perf_counter()
        if self._tokens == 0:
            FIRST_TOKEN.labels(self._model_name).observe(now - self._start)
        else:
            gap = (now - self._last) / count
            for _ in range(count):
                self._inter_token.observe(gap)
        self._last = now
        self._tokens += count

    def finish(self) -> None:
        END_TO_END.labels(self._model_name).observe(time.perf_counter() - self._start)


class SpeechTimer:
    """Times one speech, from its creation on, as its listener meets it."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._start = time.perf_counter()
        self._runs_dry_at = 0.0  # when a listener has heard all that was sent; 0: nothing was

    def chunk(self, seconds: float) -> None:
        """So many seconds of sound leave now."""
        now = time.perf_counter()
        if self._runs_dry_at == 0:
            FIRST_AUDIO.labels(self._model_name).observe(now - self._start)
        elif now > self._runs_dry_at:
            UNDERRUNS.labels(self._model_name).inc()
            UNDERRUN_SECONDS.labels(self._model_name).inc(now - self._runs_dry_at)
        self._runs_dry_at = max(self._runs_dry_at, now) + seconds
        AUDIO_SECONDS.labels(self._model_name).inc(seconds)

    def finish(self, seconds: float) -> None:
        """The speech, `seconds` long, is whole."""
        if seconds:
            took = time.perf_counter() - self._start
            REAL_TIME_FACTOR.labels(self._model_name).observe(took / seconds)
            SPEECHES.labels(self._model_name).inc()


def exposition(engines: Mapping[str, EngineStats | None]) -> bytes:
    """The text format: the gateways' metrics, and the engines' by model name. None is an engine that is down."""
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    own = CollectorRegistry()
    own.register(_EngineCollector(engines))
    return generate_latest(registry) + generate_latest(own)


class _EngineCollector(Collector):
    def __init__(self, engines: Mapping[str, EngineStats | None]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("triptych:engine_up", "Whether the engine answers", labels=["model_name"])
        for name, stats in self._engines.items():
            up.add_metric([name], 0.0 if stats is None else 1.0)
        yield up
        figures = {name: _figures(stats) for name, stats in self._engines.items() if stats is not None}
        for metric, (kind, help_text) in _ENGINE_METRICS.items():
            family = kind(f"triptych:{metric}", help_text, labels=["model_name"])
            for name, values in figures.items():
                family.add_metric([name], values[metric])
            yield family


_ENGINE_METRICS: dict[str, tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str]] = {
    "num_running_reqs": (GaugeMetricFamily, "Requests that the engine is computing"),
    "num_queue_reqs": (GaugeMetricFamily, "Requests that wait"),
    "num_used_tokens": (GaugeMetricFamily, "KV slots of running requests"),
    "max_total_num_tokens": (GaugeMetricFamily, "KV slots there are"),
    "token_usage": (GaugeMetricFamily, "Share of the KV slots that running requests hold"),
    "cache_hit_rate": (GaugeMetricFamily, "Share of prompt tokens found in the cache, since the start"),
    "prompt_tokens_total": (CounterMetricFamily, "Prompt tokens"),
    "generation_tokens_total": (CounterMetricFamily, "Tokens generated"),
    "cached_tokens_total": (CounterMetricFamily, "Prompt tokens found in the cache"),
    "evicted_tokens_total": (CounterMetricFamily, "Tokens evicted from the cache"),
    "num_requests_total": (CounterMetricFamily, "Requests that the engine took"),
    "num_aborted_requests_total": (CounterMetricFamily, "Requests that ended by cancellation"),
    "num_preemptions_total": (CounterMetricFamily, "Times that a running request had to give up its KV"),
    "output_stage_batches_total": (CounterMetricFamily, "Calls of what comes after the model: for speech, the codec"),
    "output_stage_items_total": (CounterMetricFamily, "Streams in these calls, added up"),
}


def _figures(stats: EngineStats) -> dict[str, float]:
    used = stats.kv_slots_used - stats.kv_slots_cached
    return {
        "num_running_reqs": stats.running,
        "num_queue_reqs": stats.waiting,
        "num_used_tokens": used,
        "max_total_num_tokens": stats.kv_slots,
        "token_usage": used / max(stats.kv_slots, 1),
        "cache_hit_rate": stats.cached_tokens / max(stats.prompt_tokens, 1),
        "prompt_tokens_total": stats.prompt_tokens,
        "generation_tokens_total": stats.generated_tokens,
        "cached_tokens_total": stats.cached_tokens,
        "evicted_tokens_total": stats.evicted_tokens,
        "num_requests_total": stats.requests,
        "num_aborted_requests_total": stats.aborted,
        "num_preemptions_total": stats.preempted,
        "output_stage_batches_total": stats.stage_batches,
        "output_stage_items_total": stats.stage_items,
    }
