from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.streaming.http_fakes import FakeEngine, fake_app, running
from tests.streaming.speech_server import SpeechServer, speech_server


@pytest.fixture(scope="module")
def fake_engine_and_url() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine()
    with running(fake_app(engine, max_body_bytes=100_000)) as url:
        yield engine, url


@pytest.fixture
def fake_engine(fake_engine_and_url: tuple[FakeEngine, str]) -> FakeEngine:
    """The engine behind `http`, saying "Hello" until it is told otherwise."""
    engine, _ = fake_engine_and_url
    engine.reset()
    return engine


@pytest.fixture
def http(fake_engine_and_url: tuple[FakeEngine, str], fake_engine: FakeEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_engine_and_url[1], timeout=20) as client:
        yield client


@pytest.fixture(scope="package")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose files requests to `speech` may name."""
    folder = tmp_path_factory.mktemp("references") / "allowed"
    folder.mkdir()
    return folder


@pytest.fixture(scope="package")
def speech(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Iterator[SpeechServer]:
    """A real speech engine behind a gateway."""
    with speech_server(tmp_path_factory.mktemp("speech"), reference_folder=reference_folder) as server:
        yield server


@pytest.fixture
def speech_http(speech: SpeechServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=speech.url, timeout=60) as client:
        yield client
