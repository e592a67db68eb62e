"""Fish Audio's own Python packages, and JavaScript, against a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
import wave
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path

import fishaudio
import ormsgpack
import pytest
from fish_audio_sdk import (
    AsyncWebSocketSession,
    HttpCodeErr,
    ReferenceAudio,
    Session,
    TTSRequest,
    WebSocketErr,
    WebSocketSession,
)
from fishaudio.exceptions import APIError, AuthenticationError, NotFoundError, WebSocketError
from fishaudio.types import FlushEvent, Prosody, TextEvent, TTSConfig
from fishaudio.types import ReferenceAudio as NewReferenceAudio
from websockets.sync.client import connect

from benchmarks.server import Server, running
from tests.audio.sounds import decoded
from tests.streaming.speech_server import TINY, TRANSCRIPT, recording

KEY = "s3cret"
FRAMES = 6
SAMPLES = 2048 * FRAMES
SHORT = {"max_new_tokens": FRAMES, "temperature": 0.0}
TEXTS = ["Hi ", "you."]
_JS = Path(__file__).parent / "js" / "fish"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`triptych serve` with the tiny speech model, as a user starts it."""
    voices = str(tmp_path_factory.mktemp("voices"))
    options = ["--model", f"tiny={TINY}", "--dtype", "float32", "--port", "0", "--voices", voices]
    with running("streaming.cli", "serve", *options, environment={"TRIPTYCH_API_KEY": KEY}) as started:
        yield started


@pytest.fixture
def old(server: Server) -> Iterator[Session]:
    """The package as it was up to version 1.0."""
    with Session(KEY, base_url=server.url) as session:
        yield session


@pytest.fixture
def new(server: Server) -> Iterator[fishaudio.FishAudio]:
    client = fishaudio.FishAudio(api_key=KEY, base_url=server.url)
    yield client
    client.close()


def seconds_of(sound: bytes) -> float:
    rate, samples = decoded(sound)
    return len(samples) / rate


def test_the_old_session_speaks(old: Session) -> None:
    sound = b"".join(old.tts(TTSRequest(text="Hi.", format="mp3")))
    assert 0.1 < seconds_of(sound) < 60


def test_the_old_session_knows_voices(old: Session) -> None:
    made = old.create_model(title="old voice", voices=[recording()], texts=[TRANSCRIPT], description="mine")
    assert (made.id, made.state, made.description) == ("old voice", "trained", "mine")
    assert [model.id for model in old.list_models(title="old").items] == ["old voice"]
    old.update_model("old voice", title="older voice")
    assert old.get_model("older voice").title == "older voice"
    request = TTSRequest(text="Hi.", reference_id="older voice", format="wav")
    assert b"".join(old.tts(request))[:4] == b"RIFF"
    old.delete_model("older voice")
    with pytest.raises(HttpCodeErr) as missing:
        old.get_model("older voice")
    assert missing.value.status == 404
    assert "there is no voice 'older voice'" in missing.value.message


async def test_the_old_session_speaks_without_blocking(server: Server) -> None:
    async with Session(KEY, base_url=server.url) as session:
        request = TTSRequest(text="Hi.", format="mp3", references=[ReferenceAudio(audio=recording(), text=TRANSCRIPT)])
        sound = b"".join([chunk async for chunk in session.tts.awaitable(request)])
        assert 0.1 < seconds_of(sound) < 60
        assert (await session.list_models.awaitable()).total == 0


def test_a_wrong_key_is_told_to_either(server: Server) -> None:
    with pytest.raises(HttpCodeErr) as refused, Session("wrong", base_url=server.url) as session:
        session.list_models()
    assert refused.value.status == 401
    with pytest.raises(AuthenticationError):
        fishaudio.FishAudio(api_key="wrong", base_url=server.url).tts.convert(text="Hello.")


def test_the_old_socket_speaks(server: Server) -> None:
    with WebSocketSession(KEY, base_url=server.url) as session:
        sound = b"".join(session.tts(TTSRequest(text="", format="mp3"), iter(TEXTS)))
        assert 0.1 < seconds_of(sound) < 60
        with pytest.raises(WebSocketErr):
            list(session.tts(TTSRequest(text="", reference_id="nobody"), iter(TEXTS)))


async def test_the_old_socket_speaks_without_blocking(server: Server) -> None:
    async def texts() -> AsyncIterator[str]:
        for text in TEXTS:
            yield text

    async with AsyncWebSocketSession(KEY, base_url=server.url) as session:
        sound = b"".join([chunk async for chunk in session.tts(TTSRequest(text="", format="mp3"), texts())])
    assert 0.1 < seconds_of(sound) < 100


def test_the_new_client_speaks(new: fishaudio.FishAudio) -> None:
    config = TTSConfig(format="wav", prosody=Prosody(speed=2.0, volume=-3.0), sample_rate=16000, **SHORT)
    sound = new.tts.convert(text="Hello there.", config=config)
    assert seconds_of(sound) == pytest.approx(SAMPLES / 44100 / 2, abs=0.01)
    config = TTSConfig(format="opus", opus_bitrate=24, latency="normal", **SHORT)
    chunks = list(new.tts.stream(text="Hello there.", config=config))
    assert seconds_of(b"".join(chunks)) == pytest.approx(SAMPLES / 44100, abs=0.08)


def test_the_new_client_knows_voices(new: fishaudio.FishAudio) -> None:
    made = new.voices.create(title="new voice", voices=[recording(), recording(pitch=0.8)], texts=["One.", "Two."])
    assert [sample.text for sample in made.samples] == ["One.", "Two."]
    assert new.voices.list().total == 1
    new.voices.update("new voice", description="described")
    assert new.voices.get("new voice").description == "described"
    config = TTSConfig(format="pcm", reference_id="new voice", **SHORT)
    assert len(new.tts.convert(text="Hello.", config=config)) == 2 * SAMPLES
    new.voices.delete("new voice")
    with pytest.raises(NotFoundError, match="there is no voice 'new voice'"):
        new.tts.convert(text="Hello.", config=config)
    with pytest.raises(APIError, match="does not transcribe"):
        new.voices.create(title="x", voices=[recording()])


def test_the_new_socket_speaks(new: fishaudio.FishAudio) -> None:
    config = TTSConfig(format="pcm", references=[NewReferenceAudio(audio=recording(), text=TRANSCRIPT)], **SHORT)
    pieces = [TextEvent(text="Hello there."), FlushEvent(), "This is the second part."]
    assert len(b"".join(new.tts.stream_websocket(iter(pieces), config=config))) == 2 * 2 * SAMPLES
    with pytest.raises(WebSocketError):
        list(new.tts.stream_websocket(iter(pieces), config=config, reference_id="nobody"))


async def test_the_new_client_speaks_without_blocking(server: Server) -> None:
    async def texts() -> AsyncIterator[str]:
        for text in TEXTS:
            yield text

    async with fishaudio.AsyncFishAudio(api_key=KEY, base_url=server.url) as client:
        config = TTSConfig(format="mp3", **SHORT)
        assert seconds_of(await client.tts.convert(text="Hello.", config=config)) < 1
        sound = b"".join([chunk async for chunk in client.tts.stream_websocket(texts(), config=config)])
        assert seconds_of(sound) == pytest.approx(SAMPLES / 44100, abs=0.08)
        assert (await client.voices.list()).total == 0


def test_msgpack_by_hand(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "model": "s2-pro"}
    with connect(f"ws{server.url.removeprefix('http')}/v1/tts/live", additional_headers=headers) as socket:
        request = {"text": "Hello.", "format": "wav", "temperature": 0, "max_new_tokens": FRAMES}
        for _ in range(2):
            socket.send(ormsgpack.packb({"event": "start", "request": request}))
            socket.send(ormsgpack.packb({"event": "stop"}))
            sound = b""
            while (event := ormsgpack.unpackb(socket.recv(timeout=30)))["event"] == "audio":
                sound += event["audio"]
            assert (event["event"], event["reason"]) == ("finish", "stop")
            with wave.open(BytesIO(sound)) as file:
                assert (file.getframerate(), file.getnchannels()) == (44100, 1)
                assert len(file.readframes(1 << 30)) == 2 * SAMPLES


def test_a_socket_of_javascript(server: Server, tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on the PATH")
    for file in _JS.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=240, check=True)
    command = ["node", "live.js", server.url, KEY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    for utterance in (first, second):
        assert utterance["errors"] == []
        assert utterance["finish"]["reason"] == "stop"
        assert utterance["head"] == "RIFF"
        assert utterance["bytes"] == first["bytes"] > 2 * 2 * SAMPLES
