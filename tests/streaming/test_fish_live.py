"""The socket /v1/tts/live against a real engine with the tiny checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.client import EngineUnavailable
from streaming.http.fish import live as fish_live
from tests.audio.sounds import decoded
from tests.streaming.failing_engine import failing_server
from tests.streaming.live_client import FRAMES, Live, live, pack
from tests.streaming.speech_server import RATE, TRANSCRIPT, SpeechServer, recording, speech_server

BYTES = 2 * 2048 * FRAMES  # of a part of a text, as pcm
TEXT = "The quick brown fox jumps over the lazy dog by the river. It did so twice, and then once more for its own sake."


@pytest.fixture
def socket(speech: SpeechServer) -> Iterator[Live]:
    with live(speech.url) as opened:
        yield opened
    speech.until_idle()


def error_of(socket: Live) -> dict[str, Any]:
    event = socket.next()
    assert event["event"] == "error", event
    return event


def test_an_utterance_is_sound_and_then_a_finish(socket: Live) -> None:
    sound, finish = socket.say("Hello there.")
    assert len(sound) == BYTES
    assert finish["sample_rate"] == RATE
    assert finish["time"] == pytest.approx(BYTES / 2 / RATE, abs=0.001)
    assert finish["new_tokens"] == FRAMES
    assert finish["prompt_tokens"] > finish["cached_tokens"] >= 0
    assert finish["request_id"].startswith("live-")


def test_utterances_follow_one_another_on_one_socket(socket: Live) -> None:
    first, again = (socket.say("Hello there.")[0] for _ in range(2))
    assert first == again
    rate, samples = decoded(socket.say("Hello there.", format="mp3")[0])
    assert len(samples) / rate == pytest.approx(BYTES / 2 / RATE, abs=0.08)


def test_the_next_utterance_may_start_before_the_last_is_finished(socket: Live) -> None:
    for text in ("Hello there.", "Good morning."):
        socket.start()
        socket.text(text)
        socket.event("stop")
    both = [socket.until_finish() for _ in range(2)]
    assert [len(sound) for sound, _ in both] == [BYTES, BYTES]
    assert both[0][0] != both[1][0]


def test_the_pieces_that_a_text_comes_in_do_not_matter(socket: Live) -> None:
    whole, _ = socket.say(TEXT)
    assert len(whole) == 2 * BYTES
    assert socket.say(*TEXT)[0] == whole
    assert socket.say(*(TEXT[i : i + 7] for i in range(0, len(TEXT), 7)))[0] == whole
    assert socket.say(text=TEXT)[0] == whole


def test_speech_begins_with_the_first_whole_sentence(socket: Live) -> None:
    socket.start()
    socket.text(TEXT[:-10])
    assert socket.next()["event"] == "audio"  # and nobody has said stop or flush
    socket.text(TEXT[-10:])
    socket.event("stop")
    assert socket.until_finish()[1][0]["new_tokens"] == 2 * FRAMES


def test_a_flush_speaks_what_there_is(socket: Live) -> None:
    socket.start(format="wav", max_new_tokens=3)
    for text in ("Hello", "Good morning. Goodbye", "Yes"):
        socket.text(text)
        socket.event("flush")
        assert socket.next()["event"] == "audio"
    socket.event("flush")
    socket.event("stop")
    assert socket.until_finish()[1][0]["new_tokens"] == 9


def test_sound_of_all_flushes_is_one_file(socket: Live) -> None:
    for name in ("wav", "flac", "mp3", "opus", "aac"):
        socket.start(format=name)
        for text in ("One.", "Two.", "Three."):
            socket.text(text)
            socket.event("flush")
        socket.event("stop")
        rate, samples = decoded(socket.until_finish()[0])
        assert len(samples) / rate == pytest.approx(3 * BYTES / 2 / RATE, abs=0.08), name


def test_what_was_spoken_stays_in_mind_and_in_the_cache(socket: Live) -> None:
    def spoken(**fields: Any) -> tuple[bytes, dict[str, Any]]:
        socket.start(**fields)
        for text in ("A first part, which differs.", "A second one.", "A third one."):
            socket.text(text)
            socket.event("flush")
        socket.event("stop")
        sound, events = socket.until_finish()
        return sound, events[-1]

    alone, alone_took = spoken(condition_on_previous_chunks=False)
    sound, took = spoken()
    assert sound[:BYTES] == alone[:BYTES]
    assert sound[BYTES:] != alone[BYTES:]
    assert took["prompt_tokens"] > alone_took["prompt_tokens"]
    computed = took["prompt_tokens"] - took["cached_tokens"]
    assert computed < took["prompt_tokens"] / 2


def test_a_long_conversation_forgets_its_beginning_and_goes_on(socket: Live) -> None:
    texts = [f"This is sentence number {i}, and it is as long as the others are." for i in range(12)]
    _, finish = socket.say(" ".join(texts), max_new_tokens=20)
    assert finish["new_tokens"] == 12 * 20  # with 512 positions of context


def test_a_seed_repeats_an_utterance(socket: Live) -> None:
    first, again, other = (socket.say(TEXT, temperature=0.9, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_voices_come_by_name_or_with_the_start(speech: SpeechServer, socket: Live) -> None:
    sent = socket.say("Hello.", references=[{"audio": recording(), "text": TRANSCRIPT}])[0]
    assert sent != socket.say("Hello.")[0]
    with_name = {"id": "live", "text": TRANSCRIPT}
    httpx.post(f"{speech.url}/v1/references/add", data=with_name, files={"audio": recording()}, timeout=30)
    assert socket.say("Hello.", reference_id="live")[0] == sent
    speech.library.delete("live")


def test_an_error_ends_its_utterance_and_leaves_the_socket_open(socket: Live) -> None:
    socket.start(reference_id="nobody")
    socket.text("Hello.")
    socket.event("stop")
    _, (error, finish) = socket.until_finish()
    assert error["status"] == 404 and "there is no voice 'nobody'" in error["error"]
    assert finish["reason"] == "error"
    socket.start(mp3_bitrate=7, format="mp3")
    _, (error, finish) = socket.until_finish()
    assert error["status"] == 422 and "bitrate 7" in error["message"]
    socket.text("This is for the one that failed, and nobody complains again.")
    socket.event("flush")
    assert len(socket.say("Hello.")[0]) == BYTES


@pytest.mark.parametrize(
    "frame, named",
    [
        (b"", "no map"),
        (b"\xc1", "no map"),
        (pack([1, 2]), "no map"),
        (pack({1: 2}), "no map"),
        (pack({"event": "text", "text": "x" * 50})[:-1], "no map"),
        (pack({}), "no name"),
        (pack({"event": 5}), "no name"),
        (pack({"event": "text"}), "no text"),
        (pack({"event": "text", "text": b"bytes"}), "no text"),
        (pack({"event": "start"}), "start came while"),
        ('{"event": "stop"}', "binary"),
        (b"\x91" * 100_000, "no map"),
    ],
)
def test_a_bad_frame_is_an_error_and_harms_no_utterance(socket: Live, frame: bytes | str, named: str) -> None:
    socket.start()
    socket.text("Hello ")
    socket.socket.send(frame)
    error = error_of(socket)
    assert named in error["error"] and error["status"] == 422
    socket.text("there.")
    socket.event("stop")
    assert socket.until_finish()[0] == socket.say("Hello there.")[0]


def test_events_before_a_start_are_errors(socket: Live) -> None:
    for name in ("text", "flush", "stop"):
        socket.event(name, text="Hello.")
        assert f"{name} came without a start" in error_of(socket)["error"]
    for request in (None, 5, [], "x"):
        socket.event("start", request=request)
        assert "start has no request" in error_of(socket)["error"]
    for wrong in ({"format": "ogg"}, {"text": 5}, {"chunk_length": 1}):
        socket.start(**wrong)
        assert next(iter(wrong)) in error_of(socket)["error"]
    assert len(socket.say("Hello.")[0]) == BYTES


def test_unknown_events_are_ignored_and_ignored_fields_told(socket: Live) -> None:
    socket.event("ping")
    socket.start(normalize=True, features=["quality-guard"])
    socket.event("whatever", text="Hello.")
    socket.text("Hello.")
    socket.event("stop")
    sound, events = socket.until_finish()
    assert len(sound) == BYTES
    assert events[0] == {"event": "ignored", "fields": ["normalize", "features"]}


def test_an_utterance_without_text_is_finished_at_once(socket: Live) -> None:
    sound, finish = socket.say(format="pcm")
    assert sound == b"" and finish["new_tokens"] == 0
    sound, _ = socket.say("  ", " <|speaker:0|> ", format="wav")
    assert sound[:4] == b"RIFF"


def test_too_many_bad_frames_close_the_socket(socket: Live) -> None:
    with pytest.raises(ConnectionClosed) as closed:
        for _ in range(fish_live._MAX_BAD_FRAMES + 1):
            socket.socket.send(b"bad")
            error_of(socket)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


def test_more_text_than_may_wait_is_refused(socket: Live) -> None:
    socket.start(max_new_tokens=1)
    socket.text("word " * 19_000)
    socket.text("word " * 19_000)
    while (event := socket.next())["event"] == "audio":
        pass
    assert event["event"] == "error" and event["status"] == 429


def test_more_utterances_than_may_wait_are_refused(socket: Live) -> None:
    for _ in range(fish_live._MAX_WAITING + 1):
        socket.start(text="Hello.")
        socket.event("stop")
    events = []
    while [event["event"] for event in events].count("finish") < fish_live._MAX_WAITING:
        events.append(socket.next())
    refusals = [event for event in events if event["event"] == "error"]
    assert refusals[0]["status"] == 429
    assert all("came without a start" in event["error"] for event in refusals[1:])


def test_silence_closes_the_socket(speech: SpeechServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fish_live, "_IDLE_SECONDS", 0.1)
    with live(speech.url) as socket, pytest.raises(ConnectionClosed) as closed:
        socket.next()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


@pytest.mark.parametrize("closing", ["close", "abort"])
def test_a_client_that_leaves_stops_the_engine(speech: SpeechServer, closing: str) -> None:
    aborted = speech.engine.stats().aborted
    with live(speech.url) as socket:
        socket.start(max_new_tokens=400, text="word " * 15)
        socket.event("stop")
        socket.start(max_new_tokens=400, text="word " * 15)  # this one waits for the other
        socket.next()
        assert speech.engine.has_work
        if closing == "abort":
            socket.socket.socket.close()
    speech.until_idle()
    assert speech.engine.stats().aborted == aborted + 1


def test_the_key_is_asked_for_in_the_handshake(tmp_path: Path) -> None:
    with speech_server(tmp_path, api_key="s3cret") as server:
        with pytest.raises(InvalidStatus), live(server.url):
            pass
        with live(server.url, authorization="Bearer s3cret", model="s2-pro") as socket:
            assert len(socket.say("Hello.")[0]) == BYTES


def test_a_failing_engine_is_an_error_and_the_socket_stays_open(tmp_path: Path) -> None:
    with failing_server(tmp_path, EngineUnavailable("the engine stopped")) as url, live(url) as socket:
        for _ in range(2):
            socket.start(text="Hello.")
            socket.event("stop")
            _, (error, finish) = socket.until_finish()
            assert (error["status"], error["error"]) == (503, "the engine stopped")
            assert finish["reason"] == "error"


_LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()
_VALUES = st.recursive(_LEAVES, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside))
_NAMES = st.sampled_from(["start", "text", "flush", "stop", "other"])
_FIELDS = st.sampled_from(["text", "format", "references", "reference_id", "prosody", "seed", "chunk_length", "x"])
_EVENTS = st.fixed_dictionaries(
    {"event": _NAMES}, optional={"text": _VALUES, "request": st.dictionaries(_FIELDS, _VALUES, max_size=3) | _VALUES}
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(_EVENTS, st.integers(0, 3)), max_size=8))
def test_no_events_whatever_break_the_handler(speech: SpeechServer, events: list[tuple[dict[str, Any], int]]) -> None:
    with live(speech.url) as socket:
        for event, cut in events:
            raw = pack(event)
            socket.socket.send(raw[: len(raw) - cut])
        for _ in range(2):
            socket.event("stop")
        socket.start(text="Hello.", max_new_tokens=1)
        socket.event("stop")
        while (event := socket.next()) and (event["event"] != "finish" or event.get("time") != 0.046):
            assert event.get("status", 0) < 500, event


def test_no_bytes_whatever_break_the_handler(speech: SpeechServer) -> None:
    chance = random.Random(7)
    with live(speech.url) as socket:
        for _ in range(90):
            socket.socket.send(chance.randbytes(chance.randrange(60)))
        socket.start(text="Hello.")
        socket.event("stop")
        sound, events = socket.until_finish()
        assert len(sound) == BYTES
        assert {event.get("status", 422) for event in events} == {422}
