"""Fish Audio's HTTP endpoints against a real engine with the tiny checkpoint."""

from __future__ import annotations

import base64
import io
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ar_core.request import QueueFull
from streaming.client import EngineUnavailable
from streaming.http.fish.answers import as_fish_error
from streaming.http.fish.requests import SpeechRequest
from tests.audio.sounds import decoded
from tests.streaming.failing_engine import failing_server
from tests.streaming.speech_server import RATE, TRANSCRIPT, SpeechServer, recording, speech_server

pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode
MSGPACK = {"content-type": "application/msgpack"}
TEXT = "The quick brown fox."
FRAMES = 6
SAMPLES = FRAMES * 2048


@pytest.fixture
def http(speech: SpeechServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=speech.url, timeout=60) as client:
        yield client
    for voice in speech.library.list():
        speech.library.delete(voice.name)


def body(**fields: Any) -> dict[str, Any]:
    return {"text": TEXT, "temperature": 0, "max_new_tokens": FRAMES, "format": "pcm", **fields}


def speak(http: httpx.Client, **fields: Any) -> httpx.Response:
    response = http.post("/v1/tts", json=body(**fields))
    assert response.status_code == 200, response.text
    return response


def refused(response: httpx.Response, status: int) -> str:
    """The message of an error in Fish's shape."""
    assert response.status_code == status, response.text
    answer = response.json()
    assert answer["status"] == status
    assert set(answer) <= {"status", "message", "success"}
    return str(answer["message"])


def add(http: httpx.Client, name: str, pitch: float = 1.0) -> None:
    sent = {"id": name, "audio": recording(pitch=pitch), "text": TRANSCRIPT}
    response = http.post("/v1/references/add", content=pack(sent), headers=MSGPACK)
    assert response.status_code == 200, response.text


def test_json_msgpack_and_forms_ask_for_the_same(http: httpx.Client) -> None:
    sound = recording()
    as_json = speak(http, references=[{"audio": base64.b64encode(sound).decode(), "text": TRANSCRIPT}])
    sent = body(references=[{"audio": sound, "text": TRANSCRIPT}])
    as_msgpack = http.post("/v1/tts", content=pack(sent), headers=MSGPACK)
    form = {name: str(value) for name, value in body(reference_texts=TRANSCRIPT).items()}
    as_form = http.post("/v1/tts", data=form, files={"references": sound})
    assert as_json.status_code == as_msgpack.status_code == as_form.status_code == 200
    assert as_json.content == as_msgpack.content == as_form.content
    assert len(as_json.content) == 2 * SAMPLES
    assert as_json.content != speak(http).content


def test_a_form_may_hold_what_it_names(http: httpx.Client) -> None:
    add(http, "alice")
    form = {
        "text": TEXT,
        "temperature": "0",
        "max_new_tokens": str(FRAMES),
        "format": "wav",
        "streaming": "false",
        "prosody": '{"speed": 2}',
        "reference_id": "alice",
    }
    response = http.post("/v1/tts", data=form, files={"nothing": b""})
    assert response.status_code == 200, response.text
    assert response.headers["x-audio-seconds"] == f"{SAMPLES / 2 / RATE:.3f}"
    refused(http.post("/v1/tts", data={**form, "prosody": "{"}), 422)
    refused(http.post("/v1/tts", data={**form, "streaming": "perhaps"}), 422)


@pytest.mark.parametrize("name", ["wav", "pcm", "mp3", "opus", "flac", "aac"])
def test_every_format_is_sound_of_the_right_length(http: httpx.Client, name: str) -> None:
    response = speak(http, format=name, max_new_tokens=12)
    if name == "pcm":
        assert len(response.content) == 2 * 12 * 2048
    else:
        rate, samples = decoded(response.content)
        assert rate == int(response.headers["x-sample-rate"])
        assert len(samples) / rate == pytest.approx(12 * 2048 / RATE, abs=0.08)


def test_mp3_is_what_leaves_when_nothing_is_said(http: httpx.Client) -> None:
    response = http.post("/v1/tts", json={"text": TEXT, "max_new_tokens": FRAMES})
    assert response.headers["content-type"] == "audio/mpeg"


def test_sound_leaves_while_it_is_made(speech: SpeechServer, http: httpx.Client) -> None:
    long = body(text=TEXT * 3, max_new_tokens=300, format="mp3", latency="low", chunk_length=300)
    with http.stream("POST", "/v1/tts", json=long) as response:
        chunks = response.iter_raw()
        next(chunks)
        assert speech.engine.has_work
    speech.until_idle()


def test_sample_rate_bitrate_speed_and_volume_are_honoured(http: httpx.Client) -> None:
    plain = np.frombuffer(speak(http).content, "<i2").astype(float)
    quiet = np.frombuffer(speak(http, prosody={"volume": -6}).content, "<i2").astype(float)
    assert np.abs(quiet).max() == pytest.approx(np.abs(plain).max() * 10 ** (-6 / 20), rel=0.01)
    assert len(speak(http, prosody={"speed": 2}).content) == len(plain)
    assert len(speak(http, sample_rate=8000).content) == pytest.approx(2 * SAMPLES * 8000 / RATE, abs=64)
    slow, fast = (speak(http, format="mp3", mp3_bitrate=rate, opus_bitrate=32).content for rate in (64, 192))
    assert len(fast) == pytest.approx(3 * len(slow), rel=0.2)
    refused(http.post("/v1/tts", json=body(format="mp3", mp3_bitrate=7)), 422)
    refused(http.post("/v1/tts", json=body(sample_rate=12345)), 422)


def test_without_streaming_a_wav_file_says_how_long_it_is(http: httpx.Client) -> None:
    whole = speak(http, format="wav", streaming=False)
    assert soundfile.info(io.BytesIO(whole.content)).frames == SAMPLES
    assert whole.headers["x-new-tokens"] == str(FRAMES)
    assert whole.headers["content-length"] == str(len(whole.content))


def test_a_seed_repeats_a_speech(http: httpx.Client) -> None:
    first, again, other = (speak(http, temperature=0.9, seed=seed).content for seed in (1, 1, 2))
    assert first == again != other


def test_fields_that_are_not_done_are_named_in_a_header(http: httpx.Client) -> None:
    nothing = speak(http, normalize=False, early_stop_threshold=1.0, use_memory_cache="on", features=[], prosody=None)
    assert "x-triptych-ignored" not in nothing.headers
    much = speak(
        http,
        normalize=True,
        early_stop_threshold=0.5,
        use_memory_cache="off",
        features=["quality-guard"],
        prosody={"normalize_loudness": True},
        unheard_of=1,
    )
    named = "normalize, prosody.normalize_loudness, early_stop_threshold, use_memory_cache, features, unheard_of"
    assert much.headers["x-triptych-ignored"] == named


def test_names_that_cannot_stand_in_a_header_do_not(http: httpx.Client) -> None:
    strange = {"\r\nX-Evil": 1, "ä": 1, "": 1, "x" * 5000: 1, "fine": 1, **{f"f{i}": 1 for i in range(100)}}
    named = speak(http, **strange).headers["x-triptych-ignored"].split(", ")
    assert named[0] == "fine"
    assert len(named) == 20


def test_every_field_of_the_record_is_in_the_documents() -> None:
    table = (Path(__file__).parents[2] / "docs" / "fish.md").read_text()
    for name in SpeechRequest.model_fields:
        assert f"`{name}`" in table


def test_an_unknown_voice_is_a_404_that_says_which_there_are(http: httpx.Client) -> None:
    add(http, "alice")
    add(http, "bob", pitch=0.7)
    message = refused(http.post("/v1/tts", json=body(reference_id="carol")), 404)
    assert "'carol'" in message and "'alice', 'bob'" in message
    refused(http.post("/v1/tts", json=body(reference_id=["alice", "carol"])), 404)


def test_a_voice_by_name_is_the_voice_of_its_recording(http: httpx.Client) -> None:
    add(http, "alice")
    by_name = speak(http, reference_id="alice")
    sent = [{"audio": base64.b64encode(recording()).decode(), "text": TRANSCRIPT}]
    assert by_name.content == speak(http, references=sent).content
    both = speak(http, reference_id="alice", references=[{**sent[0], "text": "other"}])
    assert both.content == by_name.content
    assert both.headers["x-triptych-ignored"] == "references"


def test_the_second_request_with_a_voice_finds_it_in_the_cache(http: httpx.Client) -> None:
    add(http, "alice", pitch=1.1)
    cold, warm = (speak(http, reference_id="alice", text=text) for text in ("First words.", "Then others."))
    assert int(warm.headers["x-cached-tokens"]) > int(cold.headers["x-cached-tokens"])
    assert int(warm.headers["x-cached-tokens"]) > 30


def test_several_voices_are_the_speakers_of_a_dialogue(http: httpx.Client) -> None:
    add(http, "alice")
    add(http, "bob", pitch=0.7)
    text = "<|speaker:0|>Hello.<|speaker:1|>Goodbye."
    by_name = speak(http, text=text, reference_id=["alice", "bob"])
    swapped = speak(http, text=text, reference_id=["bob", "alice"])
    recordings = [
        [{"audio": recording(), "text": TRANSCRIPT}],
        [{"audio": recording(pitch=0.7), "text": f"<|speaker:7|>{TRANSCRIPT}"}],
    ]
    sent = pack(body(text=text, references=recordings))
    nested = http.post("/v1/tts", content=sent, headers=MSGPACK)
    assert by_name.content == nested.content != swapped.content


def test_a_speaker_that_the_model_lacks_is_refused(http: httpx.Client) -> None:
    assert "speaker:99" in refused(http.post("/v1/tts", json=body(text="<|speaker:99|>Hello.")), 422)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"text": 5}, "text"),
        ({"text": "  "}, "nothing to speak"),
        ({"text": "x" * 100_001}, "text"),
        ({"chunk_length": 99}, "chunk_length"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("1e9")}, "temperature"),
        ({"format": "ogg"}, "format"),
        ({"latency": "fast"}, "latency"),
        ({"prosody": {"speed": 3}}, "prosody.speed"),
        ({"prosody": {"volume": 21}}, "prosody.volume"),
        ({"references": [{"audio": "???", "text": ""}]}, "base64"),
        ({"references": [{"audio": "AAAA", "text": ""}]}, "audio"),
        ({"references": [{"text": ""}]}, "audio"),
        ({"reference_id": 5}, "reference_id"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_wrong_field_is_a_422_that_names_it(http: httpx.Client, fields: dict[str, Any], named: str) -> None:
    assert named in refused(http.post("/v1/tts", json=body(**fields)), 422)


def test_a_text_that_is_missing_is_a_422(http: httpx.Client) -> None:
    assert refused(http.post("/v1/tts", json={}), 422) == "text is missing; it is required"


def test_other_types_and_sizes_of_bodies_are_refused(http: httpx.Client) -> None:
    refused(http.post("/v1/tts", content=b"<a/>", headers={"content-type": "text/xml"}), 415)
    refused(http.post("/v1/tts", content=b"[1]", headers={"content-type": "application/json"}), 422)
    refused(http.post("/v1/tts", content=b"\xff", headers=MSGPACK), 422)
    refused(http.post("/v1/tts", content=b"x", headers={"content-type": "multipart/form-data"}), 422)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(speech: SpeechServer) -> None:
    with socket.create_connection(("127.0.0.1", int(speech.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(b"POST /v1/tts HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_the_header_names_a_model_or_the_first_one_speaks(http: httpx.Client) -> None:
    for name in ("tiny", "s2-pro", "nobody's"):
        assert http.post("/v1/tts", json=body(), headers={"model": name}).status_code == 200


def test_errors_have_the_statuses_of_the_cloud() -> None:
    assert as_fish_error(QueueFull("full")).status == 429
    assert as_fish_error(EngineUnavailable("gone")).status == 503
    assert as_fish_error(ZeroDivisionError("secret")).status == 500
    assert "secret" not in as_fish_error(ZeroDivisionError("secret")).message


def test_the_key_is_asked_for_in_fishs_shape(tmp_path: Path) -> None:
    with speech_server(tmp_path, api_key="s3cret") as server, httpx.Client(base_url=server.url, timeout=60) as http:
        refused(http.post("/v1/tts", json=body()), 401)
        refused(http.get("/model"), 401)
        good = http.get("/model", headers={"authorization": "Bearer s3cret"})
        assert good.json() == {"total": 0, "items": []}


def test_a_client_that_leaves_stops_the_engine(speech: SpeechServer, http: httpx.Client) -> None:
    aborted = speech.engine.stats().aborted
    long = body(text=TEXT * 10, max_new_tokens=300, latency="low")
    with suppress(httpx.ReadError), http.stream("POST", "/v1/tts", json=long) as response:
        next(response.iter_raw())
    speech.until_idle()
    assert speech.engine.stats().aborted > aborted


def test_an_engine_that_has_no_room_or_is_gone_is_worth_another_try(tmp_path: Path) -> None:
    for failure, status in ((QueueFull("the queue is full"), 429), (EngineUnavailable("the engine stopped"), 503)):
        with failing_server(tmp_path, failure) as url:
            response = httpx.post(f"{url}/v1/tts", json=body(), timeout=20)
            assert str(failure) in refused(response, status)
            assert response.headers["retry-after"] == "1"


def test_an_error_in_mid_speech_breaks_the_answer_off(tmp_path: Path) -> None:
    with failing_server(tmp_path, EngineUnavailable("the engine stopped"), seconds=1) as url:
        refused(httpx.post(f"{url}/v1/tts", json=body(streaming=False), timeout=20), 503)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{url}/v1/tts", json=body(), timeout=20)


def test_health(http: httpx.Client) -> None:
    assert http.get("/v1/health").json() == http.post("/v1/health").json() == {"status": "ok"}


# References


def test_voices_are_added_listed_renamed_and_deleted_in_either_encoding(http: httpx.Client) -> None:
    made = http.post("/v1/references/add", data={"id": "a b-c_1", "text": TRANSCRIPT}, files={"audio": recording()})
    assert made.headers["content-type"] == "application/msgpack"
    assert unpack(made.content) == {"success": True, "message": "voice 'a b-c_1' was added", "reference_id": "a b-c_1"}
    listed = http.get("/v1/references/list", headers={"accept": "application/json"})
    assert listed.json() == {"success": True, "reference_ids": ["a b-c_1"], "message": "Success"}
    names = {"old_reference_id": "a b-c_1", "new_reference_id": "d"}
    renamed = unpack(http.post("/v1/references/update", json=names).content)
    assert renamed["success"] and renamed["new_reference_id"] == "d"
    assert unpack(http.get("/v1/references/list").content)["reference_ids"] == ["d"]
    gone = http.request("DELETE", "/v1/references/delete", json={"reference_id": "d"}, params={"format": "json"})
    assert gone.json()["success"] and gone.json()["reference_id"] == "d"
    assert unpack(http.get("/v1/references/list").content)["reference_ids"] == []


def test_what_cannot_be_done_with_a_voice_is_told(http: httpx.Client) -> None:
    add(http, "alice")
    add(http, "bob")
    as_json = {"params": {"format": "json"}}
    good = {"id": "carol", "text": TRANSCRIPT}
    refused(http.post("/v1/references/add", data={**good, "id": "bob"}, files={"audio": recording()}, **as_json), 409)
    for name in ("", "x" * 256, "a/b", "../a", "ä"):
        files = {"audio": recording()}
        refused(http.post("/v1/references/add", data={**good, "id": name}, files=files, **as_json), 422)
    short = {"audio": recording(0.1)}
    assert "0.5 s" in refused(http.post("/v1/references/add", data=good, files=short, **as_json), 422)
    refused(http.post("/v1/references/add", data=good, files={"audio": b"no sound"}, **as_json), 422)
    names = {"old_reference_id": "alice", "new_reference_id": "bob"}
    refused(http.post("/v1/references/update", json=names, **as_json), 409)
    refused(http.post("/v1/references/update", json={**names, "old_reference_id": "x"}, **as_json), 404)
    refused(http.post("/v1/references/update", json={**names, "new_reference_id": "alice"}, **as_json), 422)
    failed = http.request("DELETE", "/v1/references/delete", params={"reference_id": "nobody"})
    assert failed.status_code == 404
    assert unpack(failed.content)["success"] is False


# Models


def test_voices_have_the_records_of_the_cloud(http: httpx.Client) -> None:
    form = {"title": "Alice", "texts": ["One.", "Two."], "description": "a voice", "visibility": "private"}
    files = [("voices", recording()), ("voices", recording(pitch=0.7))]
    made = http.post("/model", data=form, files=files)
    assert made.status_code == 201, made.text
    assert made.headers["x-triptych-ignored"] == "visibility"
    voice = made.json()
    assert (voice["_id"], voice["title"], voice["state"]) == ("Alice", "Alice", "trained")
    assert voice["description"] == "a voice"
    assert [sample["text"] for sample in voice["samples"]] == ["One.", "Two."]
    assert http.get("/model/Alice").json() == voice
    assert http.patch("/model/Alice", data={"title": "Ann", "description": "another"}).json()["title"] == "Ann"
    assert http.get("/model/Ann").json()["description"] == "another"
    refused(http.get("/model/Alice"), 404)
    assert speak(http, reference_id="Ann").content
    assert http.delete("/model/Ann").status_code == 204
    refused(http.delete("/model/Ann"), 404)


def test_a_voice_needs_a_transcript_for_each_recording(http: httpx.Client) -> None:
    message = refused(http.post("/model", data={"title": "Alice"}, files=[("voices", recording())]), 422)
    assert "does not transcribe" in message
    refused(http.post("/model", data={"title": "Alice", "texts": ["x"]}), 422)


def test_pages_of_voices_are_the_newest_first(http: httpx.Client) -> None:
    for name in ("one", "two", "three"):
        add(http, name)

    def page(**query: Any) -> tuple[int, list[str]]:
        answer = http.get("/model", params=query).json()
        return answer["total"], [voice["title"] for voice in answer["items"]]

    assert page() == (3, ["three", "two", "one"])
    assert page(page_size=2, page_number=2) == (3, ["one"])
    assert page(title="T") == (2, ["three", "two"])
    assert page(tag="old") == (0, [])
    for wrong in ("0", "-1", "x", "1001", "²", "9" * 5000):
        refused(http.get("/model", params={"page_size": wrong}), 422)


# The codec


def test_sound_becomes_codes_and_codes_become_sound(http: httpx.Client) -> None:
    answer = http.post("/v1/vqgan/encode", content=pack({"audios": [recording(), recording(2)]}), headers=MSGPACK)
    tokens = unpack(answer.content)["tokens"]
    assert [len(rows) for rows in tokens] == [10, 10]
    assert len(tokens[1][0]) > len(tokens[0][0]) > 20
    made = http.post("/v1/vqgan/decode", content=pack({"tokens": tokens}), headers=MSGPACK)
    assert made.headers["x-sample-rate"] == str(RATE)
    audios = unpack(made.content)["audios"]
    assert [len(audio) for audio in audios] == [2 * 2048 * len(rows[0]) for rows in tokens]
    samples = np.frombuffer(audios[0], dtype=np.float16)
    assert np.isfinite(samples).all() and np.abs(samples).max() > 0.001
    as_json = http.post("/v1/vqgan/decode?format=json", json={"tokens": tokens[:1]}).json()
    assert base64.b64decode(as_json["audios"][0]) == audios[0]


@pytest.mark.parametrize(
    "tokens, named",
    [
        ([[[1]] * 9], "tokens[0] has 9 rows"),
        ([[[1]] * 9 + [[1, 2]]], "tokens[0] has 10 rows of 1, 2 codes"),
        ([[[256]] + [[1]] * 9], "from 0 to 255"),
        ([[[1]] * 9 + [[128]]], "from 0 to 127"),
        ([[[-1]] * 10], "tokens[0][0][0]"),
        ([[[1] * 5000] * 10], "at most 4096"),
        ([[]], "tokens[0]"),
    ],
)
def test_codes_that_the_codec_lacks_are_refused(http: httpx.Client, tokens: list[Any], named: str) -> None:
    assert named in refused(http.post("/v1/vqgan/decode?format=json", json={"tokens": tokens}), 422)


# Anything at all

_POSTS = ("/v1/tts", "/v1/references/add", "/v1/references/update", "/v1/vqgan/encode", "/v1/vqgan/decode", "/model")
_LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()
_VALUES = st.recursive(_LEAVES, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside))
_FIELDS = st.sampled_from(
    [*SpeechRequest.model_fields, "audios", "tokens", "id", "audio", "title", "voices", "texts", "old_reference_id"]
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(_POSTS), st.dictionaries(_FIELDS, _VALUES, max_size=6), st.integers(0, 20))
def test_any_fields_at_all_are_answered_without_a_fault(
    http: httpx.Client, path: str, fields: dict[str, Any], cut: int
) -> None:
    raw = pack(fields)
    response = http.post(path, content=raw[: len(raw) - cut], headers=MSGPACK)
    assert response.status_code < 500, response.text


def test_any_bytes_at_all_are_answered_without_a_fault(http: httpx.Client) -> None:
    chance = random.Random(5)
    kinds = ("application/json", "application/msgpack", "multipart/form-data; boundary=x", "multipart/form-data", "")
    for i in range(100):
        raw = chance.randbytes(chance.randrange(200))
        if i % 4 == 3:
            raw = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n' + raw + b"\r\n--x--"
        response = http.post(chance.choice(_POSTS), content=raw, headers={"content-type": chance.choice(kinds)})
        assert 400 <= response.status_code < 500
    deep = b"[" * 100_000
    assert http.post("/v1/tts", content=deep, headers={"content-type": "application/json"}).status_code == 422
    assert http.post("/v1/tts", content=b"\x81\xa4text" + b"\x91" * 100_000, headers=MSGPACK).status_code == 422


def test_many_clients_at_once_each_get_their_own(speech: SpeechServer, http: httpx.Client) -> None:
    alone = {i: speak(http, text=f"Sentence number {i}.").content for i in range(8)}
    together: dict[int, bytes] = {}

    def ask(i: int) -> None:
        together[i] = speak(http, text=f"Sentence number {i}.").content

    threads = [threading.Thread(target=ask, args=(i,)) for i in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: len(sound) for i, sound in together.items()} == {i: 2 * SAMPLES for i in alone}
    for i, sound in alone.items():
        close = np.abs(np.frombuffer(sound, "<i2").astype(int) - np.frombuffer(together[i], "<i2")) <= 4
        assert close.all()
    speech.until_idle()
