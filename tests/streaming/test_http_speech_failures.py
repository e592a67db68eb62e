"""What a listener is told when the engine fails: before the first sound, and in the middle."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from websockets.sync.client import connect

from streaming.client import EngineUnavailable
from tests.streaming.speech_fakes import FakeSpeechClient, fake_speech_app
from tests.streaming.speech_server import serving

BODY = {"input": "Hi.", "response_format": "pcm"}
BYTES = 4 * 2048 * 2


@pytest.fixture(scope="module")
def client_and_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeSpeechClient, str]]:
    client = FakeSpeechClient()
    with serving(fake_speech_app(client, tmp_path_factory.mktemp("voices"))) as url:
        yield client, url


@pytest.fixture
def engine(client_and_url: tuple[FakeSpeechClient, str]) -> FakeSpeechClient:
    client_and_url[0].failure = None
    return client_and_url[0]


@pytest.fixture
def url(client_and_url: tuple[FakeSpeechClient, str], engine: FakeSpeechClient) -> str:
    return f"{client_and_url[1]}/v1/audio/speech"


def test_a_speech_that_ends_by_itself_counts_its_frames_alone(url: str) -> None:
    response = httpx.post(url, json={**BODY, "response_format": "wav"})
    assert response.headers["x-new-tokens"] == "4" and response.headers["x-finish-reason"] == "stop"
    assert len(response.content) == 44 + BYTES


def test_a_failure_in_the_middle_breaks_a_stream_of_bytes_off(url: str, engine: FakeSpeechClient) -> None:
    engine.failure = EngineUnavailable("the engine stopped")
    with httpx.stream("POST", url, json=BODY) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            response.read()


def test_a_failure_in_the_middle_of_events_is_an_event(url: str, engine: FakeSpeechClient) -> None:
    engine.failure = EngineUnavailable("the engine stopped")
    text = httpx.post(url, json={**BODY, "stream_format": "sse"}).text
    *_, last = (json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part)
    assert last == {"type": "error", "message": "the engine stopped", "code": "engine_unavailable", "param": None}


def test_a_failure_while_a_whole_file_is_made_has_a_status(url: str, engine: FakeSpeechClient) -> None:
    engine.failure = EngineUnavailable("the engine stopped")
    response = httpx.post(url, json={**BODY, "response_format": "wav"})
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["message"] == "the engine stopped"


def test_a_failure_on_a_socket_ends_the_sentence_and_not_the_session(url: str, engine: FakeSpeechClient) -> None:
    def say(text: str) -> list[dict[str, object]]:
        socket.send(json.dumps({"type": "input.text", "text": text}))
        socket.send(json.dumps({"type": "input.done"}))
        events: list[dict[str, object]] = []
        while not events or events[-1]["type"] != "session.done":
            message = socket.recv(timeout=20)
            if isinstance(message, str):
                events.append(json.loads(message))
        return [event for event in events if event["type"] in ("audio.done", "error")]

    with connect(f"{url.replace('http', 'ws')}/stream") as socket:
        socket.send(json.dumps({"type": "session.config"}))
        socket.recv()
        engine.failure = EngineUnavailable("the engine stopped")
        done, error = say("One.")
        assert done["error"] is True and error["message"] == "the engine stopped"
        engine.failure = RuntimeError("a secret of the server")
        done, error = say("Two.")
        assert done["error"] is True and "secret" not in str(error["message"])
        engine.failure = None
        (done,) = say("Three.")
        assert done["error"] is False and done["total_bytes"] == BYTES
