"""The WebSocket /v1/audio/speech/stream against a real engine with the tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from streaming.http.speech import socket as speech_socket
from tests.audio.sounds import decoded
from tests.streaming.speech_server import NAME, RATE, SpeechServer, speech_server

CONFIG = {"type": "session.config", "temperature": 0, "max_new_tokens": 6}
FRAME_BYTES = 2 * 2048
Event = dict[str, Any]


class Session:
    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def hear(self) -> Event | bytes:
        message = self.socket.recv(timeout=20)
        return message if isinstance(message, bytes) else json.loads(message)

    def hear_until(self, kind: str) -> tuple[list[Event], list[bytes]]:
        """Events up to one of a kind, and the frames among them."""
        events: list[Event] = []
        frames: list[bytes] = []
        while not events or events[-1]["type"] != kind:
            message = self.hear()
            if isinstance(message, bytes):
                frames.append(message)
            else:
                events.append(message)
        return events, frames

    def configure(self, **fields: Any) -> Event:
        self.socket.send(json.dumps({**CONFIG, **fields}))
        event = self.hear()
        assert isinstance(event, dict)
        return event

    def speak(self, text: str) -> tuple[list[Event], list[bytes]]:
        """A whole utterance."""
        self.say("input.text", text=text)
        self.say("input.done")
        return self.hear_until("session.done")

    def closed(self) -> int:
        """The close code, once all is read."""
        try:
            while True:
                self.socket.recv(timeout=20)
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            return closed.rcvd.code


@contextmanager
def opened(server: SpeechServer) -> Iterator[Session]:
    with connect(server.socket_url) as socket:
        yield Session(socket)


@pytest.fixture
def session(speech: SpeechServer) -> Iterator[Session]:
    with opened(speech) as session:
        yield session


def kinds(events: list[Event]) -> list[str]:
    return [event["type"] for event in events]


def test_an_utterance_is_spoken_sentence_by_sentence(session: Session) -> None:
    assert session.configure() == {
        "type": "session.configured",
        "model": NAME,
        "voice": "default",
        "format": "pcm",
        "sample_rate": RATE,
    }
    events, frames = session.speak("Hello there. How are you?")
    spoken = [kind for kind in kinds(events) if kind != "input.committed"]  # that comes when it is read
    assert spoken == ["audio.start", "audio.done", "audio.start", "audio.done", "session.done"]
    assert len(events) == len(spoken) + 1
    starts = [event for event in events if event["type"] == "audio.start"]
    assert [(start["sentence_index"], start["sentence_text"]) for start in starts] == [
        (0, "Hello there."),
        (1, "How are you?"),
    ]
    assert {(start["utterance_index"], start["format"], start["sample_rate"]) for start in starts} == {(0, "pcm", RATE)}
    dones = [event for event in events if event["type"] == "audio.done"]
    assert [(done["total_bytes"], done["error"]) for done in dones] == [(6 * FRAME_BYTES, False)] * 2
    assert dones[0]["usage"]["output_tokens"] == 6
    assert sum(map(len, frames)) == 2 * 6 * FRAME_BYTES
    assert events[-1] == {"type": "session.done", "utterance_index": 0, "total_sentences": 2}


def test_speech_begins_with_the_first_sentence_and_text_may_come_in_any_pieces(session: Session) -> None:
    session.configure()
    for piece in "First one. Th":
        session.say("input.text", text=piece)
    events, frames = session.hear_until("audio.done")
    assert events[0]["sentence_text"] == "First one." and frames
    session.say("input.text", text="en the rest")
    session.say("input.done")
    events, _ = session.hear_until("session.done")
    assert "Then the rest" in [event.get("sentence_text") for event in events]


def test_pieces_say_what_the_whole_says(speech: SpeechServer) -> None:
    def frames(pieces: list[str]) -> bytes:
        with opened(speech) as session:
            session.configure(seed=5, temperature=0.8)
            for piece in pieces:
                session.say("input.text", text=piece)
            session.say("input.done")
            return b"".join(session.hear_until("session.done")[1])

    text = "One is here. Two is there."
    assert frames([text]) == frames(list(text))


def test_the_first_sentence_sounds_as_over_http(session: Session, speech_http: httpx.Client) -> None:
    session.configure()
    _, frames = session.speak("The quick brown fox.")
    body = {"input": "The quick brown fox.", "temperature": 0, "max_new_tokens": 6, "response_format": "pcm"}
    assert b"".join(frames) == speech_http.post("/v1/audio/speech", json=body).content


def test_utterances_follow_each_other_and_remember_what_was_said(session: Session) -> None:
    session.configure()
    first, _ = session.speak("Hello.")
    second, _ = session.speak("Hello.")
    prompts = [
        event["usage"]["input_tokens"]
        for events in (first, second)
        for event in events
        if event["type"] == "audio.done"
    ]
    assert prompts[1] > prompts[0] + 6  # the text and the frames of the first are in the prompt of the second
    assert second[-1] == {"type": "session.done", "utterance_index": 1, "total_sentences": 1}
    cached = next(event for event in second if event["type"] == "audio.done")["usage"]["input_token_details"]
    assert cached["cached_tokens"] >= prompts[0] + 5
    session.configure()
    third, _ = session.speak("Hello.")
    assert next(event for event in third if event["type"] == "audio.done")["usage"]["input_tokens"] == prompts[0]


def test_a_conversation_longer_than_the_context_forgets_its_beginning(session: Session) -> None:
    session.configure(max_new_tokens=60)
    for _ in range(8):
        events, _ = session.speak("A sentence of some length, to fill the context.")
        assert not any(event["type"] == "error" for event in events)


def test_the_configuration_may_change(session: Session) -> None:
    session.configure()
    assert session.configure(response_format="wav", sample_rate=24000, speed=2)["sample_rate"] == 24000
    _, frames = session.speak("Hello.")
    assert b"".join(frames).startswith(b"RIFF")
    assert session.configure(response_format="mp3", stream_audio=False)["format"] == "mp3"
    events, frames = session.speak("Hello. You there.")
    assert len(frames) == 2
    assert all(decoded(frame)[0] == RATE for frame in frames)
    assert session.configure(split_granularity="none")["type"] == "session.configured"
    events, _ = session.speak("Hello. You there.")
    assert [event["sentence_text"] for event in events if event["type"] == "audio.start"] == ["Hello. You there."]


def test_mistakes_are_told_and_the_session_goes_on(session: Session) -> None:
    def error() -> Event:
        event = session.hear()
        assert isinstance(event, dict) and event["type"] == "error", event
        return event

    session.say("input.text", text="Hi.")
    assert error()["code"] == "not_configured"
    assert "there is no voice 'eve'" in session.configure(voice="eve")["message"]
    assert session.configure(speed=9)["param"] == "speed"
    session.configure()
    session.socket.send("{")
    assert error()["code"] == "invalid_json"
    session.socket.send(b"\x00")
    assert "JSON in a text frame" in error()["message"]
    session.say("input.text")
    assert error()["message"] == "text is missing; it is required"
    session.socket.send("[1]")
    assert "JSON object" in error()["message"]
    session.say("something.new", text=1)  # events of other servers are ignored
    for _ in range(2):
        session.say("input.text", text=" " * (speech_socket.MAX_WAITING - 10))
    assert error()["code"] == "text_too_long"
    session.say("input.done")
    session.hear_until("session.done")
    session.say("input.text", text="<|speaker:99|>")
    session.say("input.text", text="a")
    session.say("input.done")
    events, _ = session.hear_until("session.done")
    assert "no token <|speaker:99|>" in next(event for event in events if event["type"] == "error")["message"]
    events, frames = session.speak("All is well.")
    assert frames and "error" not in kinds(events)


def test_an_empty_utterance_is_done_at_once(session: Session) -> None:
    session.configure()
    events, frames = session.speak("  ")
    assert kinds(events) == ["input.committed", "session.done"] and not frames
    assert events[-1]["total_sentences"] == 0


def test_session_close_speaks_what_is_left_and_closes(session: Session) -> None:
    session.configure()
    session.say("input.text", text="The last words")
    session.say("session.close")
    events, frames = session.hear_until("session.done")
    assert kinds(events) == ["audio.start", "audio.done", "session.done"] and frames
    assert session.closed() == 1000


def test_closing_the_socket_ends_the_work(speech: SpeechServer) -> None:
    aborted = speech.engine.stats().aborted
    with opened(speech) as session:
        session.configure(max_new_tokens=1000, split_granularity="none")
        session.say("input.text", text="Many words are said here. " * 60)
        session.say("input.done")
        session.hear_until("audio.start")
        while not isinstance(session.hear(), bytes):
            pass
    speech.until_idle()
    assert speech.engine.stats().aborted == aborted + 1


def test_who_says_nothing_is_sent_away(speech: SpeechServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_socket, "CONFIG_SECONDS", 0.1)
    with opened(speech) as session:
        event = session.hear()
        assert isinstance(event, dict) and event["code"] == "config_timeout"
        assert session.closed() == 1008
    monkeypatch.setattr(speech_socket, "IDLE_SECONDS", 0.4)
    with opened(speech) as session:
        session.configure()
        events, _ = session.speak("Hello.")
        assert events[-1]["type"] == "session.done"
        event = session.hear()
        assert isinstance(event, dict) and event["code"] == "idle_timeout"
        assert session.closed() == 1008


def test_many_sockets_are_served_at_once(speech: SpeechServer) -> None:
    def spoken(index: int) -> int:
        with opened(speech) as session:
            session.configure(seed=index)
            if index % 4 == 3:  # some leave in the middle
                session.say("input.text", text="Gone. ")
                return -1
            return sum(map(len, session.speak("Hello there. Good bye.")[1]))

    with ThreadPoolExecutor(12) as pool:
        lengths = list(pool.map(spoken, range(24)))
    assert [length for length in lengths if length >= 0] == [2 * 6 * FRAME_BYTES] * 18
    speech.until_idle()


def test_the_key_is_asked_of_sockets_too(tmp_path: Path) -> None:
    with speech_server(tmp_path, api_key="secret") as server:
        with pytest.raises(InvalidStatus) as refused:
            connect(server.socket_url)
        assert refused.value.response.status_code == 401
        assert b"needs its API key" in refused.value.response.body
        with connect(server.socket_url, additional_headers={"Authorization": "Bearer secret"}) as socket:
            assert Session(socket).configure()["type"] == "session.configured"
