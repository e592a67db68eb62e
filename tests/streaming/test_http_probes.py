"""What probes and monitors see: /health, /ready and /metrics."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ar_core.stats import EngineStats
from streaming.http.app import build_app
from streaming.http.served import ServedModel
from streaming.messages import ModelInfo
from tests.streaming.http_fakes import CONTEXT, EOS, VOCAB, FakeChat, FakeEngine, running

INFO = ModelInfo("fake", "chat", "cpu", "float32", CONTEXT, VOCAB, (EOS,), 100)


def values(http: httpx.Client) -> dict[tuple[str, ...], float]:
    """By name and label values, as Prometheus would read them."""
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(s.name, *map(str, s.labels.values())): s.value for family in families for s in family.samples}


def ask(http: httpx.Client, model: str = "fake") -> None:
    http.post("/v1/completions", json={"model": model, "prompt": "Hi"})


def test_health_says_how_the_engines_are(http: httpx.Client, fake_engine: FakeEngine) -> None:
    states = {}
    for ready, info in ((True, INFO), (False, None), (False, INFO)):
        fake_engine.ready, fake_engine.info = ready, info
        response = http.get("/health")
        assert response.status_code == 200
        states[ready, info is None] = response.json()
    assert states == {
        (True, False): {"status": "ok", "engines": {"fake": "up"}},
        (False, True): {"status": "ok", "engines": {"fake": "starting"}},
        (False, False): {"status": "ok", "engines": {"fake": "restarting"}},
    }


def test_ready_is_503_until_every_engine_is_there() -> None:
    engines = {"one": FakeEngine(ready=False), "two": FakeEngine(ready=False)}
    app = build_app({name: ServedModel(name, 1, engine, FakeChat()) for name, engine in engines.items()})
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        for engine in engines.values():
            response = http.get("/ready")
            assert response.status_code == 503
            assert response.json()["status"] == "not ready"
            assert int(response.headers["retry-after"]) >= 1
            engine.ready = True
        assert http.get("/ready").json() == {"status": "ready", "engines": {"one": "up", "two": "up"}}
        engines["one"].ready = False
        assert http.get("/ready").status_code == 503


def test_metrics_count_requests_answers_and_waits(http: httpx.Client) -> None:
    before = values(http)
    for _ in range(3):
        ask(http)
    http.get("/v1/models/fake")
    http.get("/nowhere/at/all")
    ask(http, "gpt-9")
    after = values(http)

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grown("triptych:http_requests_total", "/v1/completions", "POST") == 4
    assert grown("triptych:http_responses_total", "/v1/completions", "POST", "200") == 3
    assert grown("triptych:http_responses_total", "/v1/completions", "POST", "404") == 1
    assert grown("triptych:http_responses_total", "/v1/models/*", "GET", "200") == 1
    assert grown("triptych:http_responses_total", "other", "GET", "404") == 1
    assert grown("triptych:time_to_first_token_seconds_count", "fake") == 3
    assert grown("triptych:e2e_request_latency_seconds_count", "fake") == 3
    assert grown("triptych:inter_token_latency_seconds_count", "fake") == 3 * 5
    assert after["triptych:http_requests_active",] == 1  # the one that asks


def test_metrics_hold_the_engines_figures(http: httpx.Client) -> None:
    found = values(http)
    expected = {"engine_up": 1, "num_running_reqs": 3, "num_queue_reqs": 2, "num_used_tokens": 20, "token_usage": 0.2}
    expected |= {"max_total_num_tokens": 100, "cache_hit_rate": 0, "prompt_tokens_total": 8, "cached_tokens_total": 0}
    others = ("generation_tokens", "evicted_tokens", "num_requests", "num_aborted_requests", "num_preemptions")
    expected |= {f"{name}_total": 0 for name in others}
    assert {name: found[f"triptych:{name}", "fake"] for name in expected} == expected


def test_an_engine_that_is_down_is_said_to_be(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.ready = False
    found = values(http)
    assert found["triptych:engine_up", "fake"] == 0
    assert ("triptych:num_running_reqs", "fake") not in found
    assert ("triptych:http_requests_active",) in found


def test_an_engine_in_a_long_step_does_not_hold_the_metrics_up(
    http: httpx.Client, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stats(self: FakeEngine) -> EngineStats:
        await asyncio.sleep(60)
        return EngineStats()

    monkeypatch.setattr(FakeEngine, "stats", stats)
    monkeypatch.setattr("streaming.http.health._STATS_SECONDS", 0.1)
    assert values(http)["triptych:engine_up", "fake"] == 0


@contextmanager
def gateway_process(metrics: Path) -> Iterator[str]:
    """A gateway in a process of its own, as several of one server are."""
    program = (
        "import sys, threading\n"
        "from tests.streaming.http_fakes import FakeEngine, fake_app, running\n"
        "with running(fake_app(FakeEngine())) as url:\n"
        "    print(url, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(metrics)},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def test_each_of_two_gateways_answers_with_the_sums_of_both(tmp_path: Path) -> None:
    with gateway_process(tmp_path) as first, gateway_process(tmp_path) as second:
        for url, count in ((first, 2), (second, 3)):
            with httpx.Client(base_url=url, timeout=20) as http:
                for _ in range(count):
                    ask(http)
        for url in (first, second):
            with httpx.Client(base_url=url, timeout=20) as http:
                found = values(http)
                assert found["triptych:http_responses_total", "/v1/completions", "POST", "200"] == 5
                assert found["triptych:e2e_request_latency_seconds_count", "fake"] == 5
                assert found["triptych:num_running_reqs", "fake"] == 3  # the engine's own, not summed
                assert found["triptych:http_requests_active",] == 1
