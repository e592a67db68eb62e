"""OpenAI's own Python package against `triptych serve` with the tiny speech checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from benchmarks.server import running
from tests.audio.sounds import decoded
from tests.streaming.speech_server import NAME, RATE, TINY, TRANSCRIPT, recording

TEXT = "The quick brown fox."
GREEDY = {"temperature": 0, "max_new_tokens": 12}
SECONDS = 12 * 2048 / RATE


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("voices")
    arguments = ("--model", f"{NAME}={TINY}", "--device", "cpu", "--dtype", "float32", "--voices", str(folder))
    with (
        running("streaming.cli", "serve", "--port", "0", *arguments, environment={"OMP_NUM_THREADS": "1"}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", timeout=60, max_retries=0) as made,
    ):
        yield made


def test_a_bare_request_gives_an_mp3(client: openai.OpenAI) -> None:
    sound = client.audio.speech.create(model=NAME, voice="default", input=TEXT, extra_body=GREEDY)
    assert sound.response.headers["content-type"] == "audio/mpeg"
    rate, samples = decoded(sound.content)
    assert len(samples) / rate == pytest.approx(SECONDS, abs=0.1)


def test_streamed_sound_is_the_whole_sound(client: openai.OpenAI, tmp_path: Path) -> None:
    asked = {"model": NAME, "voice": "default", "input": TEXT, "response_format": "pcm"}
    whole = client.audio.speech.create(**asked, extra_body=GREEDY).content  # type: ignore[call-overload]
    with client.audio.speech.with_streaming_response.create(**asked, extra_body=GREEDY) as response:  # type: ignore[call-overload]
        pieces = list(response.iter_bytes())
    assert len(pieces) > 1 and b"".join(pieces) == whole
    with client.audio.speech.with_streaming_response.create(**asked, extra_body=GREEDY) as response:  # type: ignore[call-overload]
        response.stream_to_file(tmp_path / "x.pcm")
    assert (tmp_path / "x.pcm").read_bytes() == whole


def test_a_voice_is_made_used_and_deleted(client: openai.OpenAI) -> None:
    voice = client.audio.voices.create(
        audio_sample=("me.wav", recording(), "audio/wav"),
        consent="cons_1",
        name="ann",
        extra_body={"ref_text": TRANSCRIPT},
    )
    assert (voice.id, voice.name, voice.object, voice.type) == ("ann", "ann", "audio.voice", "audio_sample")

    def said(name: str | dict[str, str]) -> bytes:
        return client.audio.speech.create(
            model=NAME,
            voice=name,  # type: ignore[arg-type]
            input=TEXT,
            response_format="wav",
            extra_body=GREEDY,
        ).content

    assert said("ann") == said({"id": "ann"}) != said("default")
    deleted = client.audio.voices.delete("ann")
    assert deleted.deleted and deleted.object == "audio.voice.deleted"
    with pytest.raises(openai.NotFoundError, match="there is no voice 'ann'; there are none yet"):
        said("ann")


def test_mistakes_are_the_packages_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="nothing to speak"):
        client.audio.speech.create(model=NAME, voice="default", input="")
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.audio.speech.create(model="tts-1", voice="default", input=TEXT)
    with pytest.raises(openai.BadRequestError, match="ref_text is missing"):
        client.audio.voices.create(audio_sample=b"x", consent="cons_1", name="bob")


def test_speed_and_format_are_honoured(client: openai.OpenAI) -> None:
    sound = client.audio.speech.create(
        model=NAME, voice="default", input=TEXT, response_format="flac", speed=2, extra_body=GREEDY
    )
    rate, samples = decoded(sound.content)
    assert rate == RATE and len(samples) / rate == pytest.approx(SECONDS / 2, abs=0.01)
    assert np.abs(samples).max() > 0.01
