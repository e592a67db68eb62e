"""/v1/audio/voices: made of recordings, listed, used and deleted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.streaming.speech_server import NAME, TRANSCRIPT, SpeechServer, recording

PATH = "/v1/audio/voices"
SPEECH = {"model": NAME, "input": "Hi.", "temperature": 0, "max_new_tokens": 8, "response_format": "wav"}


@pytest.fixture(autouse=True)
def empty_library(speech: SpeechServer) -> Iterator[None]:
    yield
    for voice in speech.library.list():
        speech.library.delete(voice.name)


def make(http: httpx.Client, name: str = "ann", sound: bytes | None = None, **fields: Any) -> httpx.Response:
    data = {"name": name, "consent": "cons_1", "ref_text": TRANSCRIPT, **fields}
    file = {"audio_sample": ("me.wav", recording() if sound is None else sound, "audio/wav")}
    return http.post(PATH, data={key: value for key, value in data.items() if value is not None}, files=file)


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_voice_has_the_shape_of_openai(speech_http: httpx.Client, speech: SpeechServer) -> None:
    made = make(speech_http, speaker_description="A test.", type="audio_sample").json()
    assert made["created_at"] > 1.7e9
    kept = speech.library.get("ann")
    assert made == {
        "id": "ann",
        "name": "ann",
        "object": "audio.voice",
        "type": "audio_sample",
        "created_at": int(kept.created_at),
        "ref_text": TRANSCRIPT,
        "speaker_description": "A test.",
        "duration": pytest.approx(1.6, abs=0.1),
    }
    assert speech_http.get(f"{PATH}/ann").json() == made
    listed = speech_http.get(PATH).json()
    assert listed == {"object": "list", "data": [made], "voices": ["default", "ann"], "has_more": False}
    assert speech_http.get(PATH, params={"model": NAME}).json() == listed
    deleted = speech_http.delete(f"{PATH}/ann").json()
    assert deleted == {"id": "ann", "object": "audio.voice.deleted", "deleted": True}
    assert speech_http.get(PATH).json()["voices"] == ["default"]


def test_a_voice_speaks_as_its_recording_does(speech_http: httpx.Client) -> None:
    sound = recording(pitch=1.2)
    assert make(speech_http, "bob", sound).status_code == 200
    plain = speech_http.post("/v1/audio/speech", json=SPEECH).content
    first = speech_http.post("/v1/audio/speech", json={**SPEECH, "voice": "bob"})
    assert first.content != plain
    again = speech_http.post("/v1/audio/speech", json={**SPEECH, "voice": {"id": "bob"}})
    assert np.array_equal(np.frombuffer(first.content[44:], "<i2"), np.frombuffer(again.content[44:], "<i2"))
    prompt, cached = (int(again.headers[name]) for name in ("x-prompt-tokens", "x-cached-tokens"))
    assert cached == prompt - 1
    found = error(speech_http.post("/v1/audio/speech", json={**SPEECH, "voice": "eve"}), 404)
    assert found["message"] == "there is no voice 'eve'; there are 'bob'; and \"default\", the model's own"


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"ref_text": None}, 400, "ref_text is missing: it must be what is said in audio_sample"),
        ({"ref_text": "  "}, 400, "ref_text is blank"),
        ({"name": "a/b"}, 400, "'a/b' cannot be a voice's name"),
        ({"name": "default"}, 400, "'default' means the model's own voice"),
        ({"name": None}, 400, "name is missing"),
        ({"type": "prompt"}, 400, "voices are made of recordings here"),
        ({"model": "other"}, 404, "is not served here"),
        ({"sound": b""}, 400, "the audio is empty"),
        ({"sound": b"noise" * 99}, 400, "cannot be decoded"),
        ({"sound": recording(0.7)}, 400, "at least 1 s are needed"),
        ({"sound": recording(61)}, 400, "longer than 60 s"),
        ({"sound": b"x" * ((10 << 20) + 1)}, 400, "at most 10485760 are allowed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_makes_no_voice_is_told_so(
    speech_http: httpx.Client, speech: SpeechServer, fields: dict[str, Any], status: int, message: str
) -> None:
    assert message in error(make(speech_http, **fields), status)["message"]
    assert speech.library.list() == []


def test_a_name_is_given_once(speech_http: httpx.Client) -> None:
    assert make(speech_http).status_code == 200
    assert "there is a voice 'ann' already" in error(make(speech_http), 409)["message"]


def test_unknown_voices_are_404s(speech_http: httpx.Client) -> None:
    for method in ("GET", "DELETE"):
        for name in ("eve", "default", "..%2f..%2fetc", "%00"):
            assert error(speech_http.request(method, f"{PATH}/{name}"), 404)["code"] in (
                "voice_not_found",
                "unknown_url",
            )


@pytest.mark.parametrize(
    "request_",
    [
        {"content": b"{}"},
        {"json": {"name": "x", "type": "prompt", "prompt": "A kind voice."}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"--b\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        {"content": b"<a/>", "headers": {"content-type": "text/html"}},
        {"data": {"name": "x", "ref_text": "y", "audio_sample": "not a file"}},
    ],
)
def test_bodies_that_are_no_form_are_refused(speech_http: httpx.Client, request_: dict[str, Any]) -> None:
    assert speech_http.post(PATH, **request_).status_code in (400, 415)
