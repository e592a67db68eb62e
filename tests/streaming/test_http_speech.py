"""POST /v1/audio/speech against a real engine with the tiny checkpoint."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file

from streaming.http.errors import ApiError
from streaming.http.speech.reference_sound import sound_in, sound_of
from tests.audio.sounds import decoded
from tests.streaming.speech_server import NAME, RATE, TINY, TRANSCRIPT, SpeechServer, recording

PATH = "/v1/audio/speech"
TEXT = "The quick brown fox."
FRAME = 2048


def body(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "input": TEXT, "temperature": 0, "max_new_tokens": 12, **fields}


def speak(speech_http: httpx.Client, **fields: Any) -> httpx.Response:
    response = speech_http.post(PATH, json=body(**fields))
    assert response.status_code == 200, response.text
    return response


def samples(pcm: bytes) -> np.ndarray:
    return np.frombuffer(pcm, dtype="<i2").astype(np.float32) / 32768


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def events(text: str) -> list[dict[str, Any]]:
    parts = text.split("\n\n")
    assert parts[-1] == "" and all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def test_greedy_speech_is_what_the_reference_computes(speech_http: httpx.Client) -> None:
    golden = load_file(TINY / "speech.safetensors")["audio_noref"].numpy()
    response = speak(speech_http, response_format="pcm", max_new_tokens=24)
    assert response.headers["x-sample-rate"] == str(RATE)
    assert (response.headers["x-channels"], response.headers["x-bit-depth"]) == ("1", "16")
    assert response.headers["content-type"] == "audio/pcm"
    assert response.headers["x-request-id"].startswith("speech-")
    assert response.headers["x-prompt-tokens"] == "85"
    assert np.abs(samples(response.content) - golden).max() < 2e-4


def test_a_voice_sent_as_codes_is_what_the_reference_computes(speech_http: httpx.Client) -> None:
    codes = load_file(TINY / "golden.safetensors")["reference_codes"].tolist()
    golden = load_file(TINY / "speech.safetensors")["audio_ref"].numpy()
    voice = [{"text": TRANSCRIPT, "vq_codes": codes}]
    response = speak(speech_http, response_format="pcm", max_new_tokens=24, references=voice)
    assert response.headers["x-prompt-tokens"] == "182"
    assert np.abs(samples(response.content) - golden).max() < 2e-4


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_every_format_is_sent_while_it_is_made(speech_http: httpx.Client, name: str) -> None:
    whole = samples(speak(speech_http, response_format="pcm").content)
    with speech_http.stream("POST", PATH, json=body(response_format=name, stream=True)) as response:
        assert response.status_code == 200
        assert "content-length" not in response.headers
        pieces = list(response.iter_raw())
    assert len(pieces) > 1
    if name == "pcm":
        assert np.array_equal(samples(b"".join(pieces)), whole)
        return
    rate, sound = decoded(b"".join(pieces))
    assert len(sound) / rate == pytest.approx(len(whole) / RATE, abs=0.12)


def test_mp3_is_the_default(speech_http: httpx.Client) -> None:
    response = speak(speech_http)
    assert response.headers["content-type"] == "audio/mpeg"
    assert response.content[:2] in (b"\xff\xfb", b"\xff\xfa")


def test_wav_and_flac_come_whole_with_their_length(speech_http: httpx.Client) -> None:
    pcm = speak(speech_http, response_format="pcm").content
    wav = speak(speech_http, response_format="wav")
    assert wav.headers["content-length"] == str(len(wav.content))
    assert int.from_bytes(wav.content[4:8], "little") == len(wav.content) - 8
    assert wav.content.endswith(pcm)
    assert wav.headers["x-finish-reason"] == "length" and wav.headers["x-new-tokens"] == "12"
    assert float(wav.headers["x-audio-seconds"]) == pytest.approx(12 * FRAME / RATE, abs=1e-3)
    flac = speak(speech_http, response_format="flac")
    assert np.array_equal(decoded(flac.content)[1], samples(pcm))


def test_events_hold_the_same_bytes_and_end_with_the_usage(speech_http: httpx.Client) -> None:
    pcm = speak(speech_http, response_format="pcm", seed=3, temperature=0.8).content
    response = speak(speech_http, response_format="pcm", seed=3, temperature=0.8, stream_format="sse")
    assert response.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events(response.text)
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == pcm
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert usage["input_tokens"] == 85 and usage["output_tokens"] == 12 and usage["total_tokens"] == 97
    assert usage["input_token_details"]["cached_tokens"] == 84
    assert done["request_id"] == response.headers["x-request-id"]
    assert done["duration"] == pytest.approx(12 * FRAME / RATE, abs=1e-3)


def test_seeds_and_temperatures_decide_what_is_said(speech_http: httpx.Client) -> None:
    def said(**fields: Any) -> bytes:
        return speak(speech_http, response_format="pcm", temperature=0.9, **fields).content

    assert said(seed=1) == said(seed=1) != said(seed=2)
    assert said(seed=1, top_k=1, cache_salt="mine") == said(seed=2, top_k=1)


def test_the_second_request_with_a_recording_starts_from_the_cache(
    speech_http: httpx.Client, speech: SpeechServer
) -> None:
    sound = base64.b64encode(recording(pitch=1.1)).decode()
    voice = {"ref_text": "A transcript of its own.", "response_format": "wav"}
    first = speak(speech_http, ref_audio=sound, input="One.", **voice)
    before = speech.engine.stats().cached_tokens
    second = speak(speech_http, ref_audio=f"data:audio/wav;base64,{sound}", **voice)
    prompt, cached = (int(second.headers[name]) for name in ("x-prompt-tokens", "x-cached-tokens"))
    assert int(first.headers["x-cached-tokens"]) < 100
    assert prompt - cached < 50
    assert cached > 100 + 1.5 * RATE / FRAME
    assert speech.engine.stats().cached_tokens == before + cached


def test_two_voices_at_once_say_what_each_says_alone(speech_http: httpx.Client) -> None:
    voices = [base64.b64encode(recording(pitch=pitch)).decode() for pitch in (0.9, 1.3)]
    requests = [{"ref_audio": voice, "ref_text": TRANSCRIPT, "response_format": "pcm"} for voice in voices]
    alone = [speak(speech_http, **fields).content for fields in requests]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda fields: speak(speech_http, **fields).content, requests * 2))
    for sound, expected in zip(together, alone * 2):
        assert np.abs(samples(sound) - samples(expected)).max() < 2e-3


def test_speed_changes_the_length_and_sample_rate_the_samples(speech_http: httpx.Client) -> None:
    normal = len(speak(speech_http, response_format="pcm").content)
    assert len(speak(speech_http, response_format="pcm", speed=2).content) == pytest.approx(normal / 2, abs=4)
    response = speak(speech_http, response_format="pcm", sample_rate=16000)
    assert response.headers["x-sample-rate"] == "16000"
    assert len(response.content) == pytest.approx(normal * 16000 / RATE, rel=0.01)


def test_instructions_stand_in_brackets_before_the_text(speech_http: httpx.Client) -> None:
    styled = speak(speech_http, response_format="pcm", instructions="whisper").content
    assert styled == speak(speech_http, response_format="pcm", input=f"[whisper] {TEXT}").content
    assert styled != speak(speech_http, response_format="pcm").content
    both = speak(speech_http, response_format="pcm", input=f"<|speaker:1|>{TEXT}", instructions="[loud]\n").content
    assert both == speak(speech_http, response_format="pcm", input=f"<|speaker:1|>[(loud)] {TEXT}").content


def test_a_long_text_is_spoken_part_by_part(speech_http: httpx.Client) -> None:
    long = "Some words are said here. " * 20
    done = events(speak(speech_http, input=long, max_new_tokens=4, stream_format="sse", response_format="pcm").text)[-1]
    assert done["usage"]["output_tokens"] == 4 * 2
    assert done["finish_reason"] == "length"


def test_fields_that_mean_nothing_are_named_in_a_header(speech_http: httpx.Client) -> None:
    response = speak(speech_http, language="English", initial_codec_chunk_frames=10, user="me", unheard_of=1)
    assert response.headers["x-triptych-ignored"] == "language, initial_codec_chunk_frames"
    assert "x-triptych-ignored" not in speak(speech_http).headers


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": " \n"}, "input", "nothing to speak"),
        ({"input": 3}, "input", "input is 3; it must be a valid string"),
        ({"input": "<|speaker:99|>Hi."}, "input", "no token <|speaker:99|>"),
        ({"response_format": "m4a"}, "response_format", "'mp3', 'opus', 'aac', 'flac', 'wav' or 'pcm'"),
        ({"speed": 5}, "speed", "less than or equal to 4"),
        ({"sample_rate": 12345}, "sample_rate", "mp3 has no sample rate 12345; it has 16000"),
        ({"voice": {"name": "x"}}, "voice.id", "voice.id is missing"),
        ({"voice": "x", "ref_audio": "aGk="}, "voice", "give one of them"),
        ({"ref_audio": "aGk="}, "ref_text", "ref_audio needs ref_text"),
        ({"ref_text": "Hi."}, "ref_text", "without ref_audio"),
        ({"ref_audio": "aGk=", "ref_text": "Hi."}, None, "cannot be decoded"),
        ({"ref_audio": "http://x/y.wav", "ref_text": "Hi."}, "ref_audio", "neither base64 nor a data: URL"),
        ({"ref_audio": "data:audio/wav,x", "ref_text": "Hi."}, "ref_audio", "without base64"),
        ({"references": [{"audio": "aGk="}]}, "references[0].text", "missing"),
        ({"references": [{"text": "Hi."}]}, "references[0]", "one of audio, audio_path and vq_codes"),
        ({"references": [{"text": "Hi.", "vq_codes": [[1, 2], [3]]}]}, "references[0].vq_codes", "10 rows"),
        ({"references": [{"text": "Hi.", "vq_codes": [[999]] * 10}]}, "references", "goes from 0 to 255"),
        ({"references": [{"text": "Hi.", "audio_path": "a.wav"}]}, "references[0].audio_path", "names no recording"),
        ({"x_vector_only_mode": True}, "x_vector_only_mode", "not supported"),
        ({"word_timestamps": True}, "word_timestamps", "not supported"),
        ({"max_new_tokens": 0}, "max_new_tokens", "greater than or equal to 1"),
        ({"references": [{"text": "x" * 600, "vq_codes": [[1]] * 10}]}, "input", "at most 511 fit"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_request_is_told_what_would_be_right(
    speech_http: httpx.Client, fields: dict[str, Any], param: str | None, message: str
) -> None:
    found = error(speech_http.post(PATH, json=body(**fields)), 400)
    assert found["param"] == param
    assert message in found["message"]


def test_models_and_voices_that_are_not_there_are_404s_that_list_those_that_are(speech_http: httpx.Client) -> None:
    found = error(speech_http.post(PATH, json=body(model="gpt")), 404)
    assert found["message"] == 'model "gpt" is not served here; these are: tiny'
    found = error(speech_http.post(PATH, json=body(voice="alloy")), 404)
    assert found["param"] == "voice" and found["code"] == "voice_not_found"
    assert "there is no voice 'alloy'; there " in found["message"] and '"default"' in found["message"]


def test_the_default_voice_and_no_model_are_fine(speech_http: httpx.Client) -> None:
    plain = speak(speech_http, response_format="pcm").content
    assert speak(speech_http, response_format="pcm", voice="default").content == plain
    assert speak(speech_http, response_format="pcm", voice={"id": "default"}, model=None).content == plain


def test_files_of_the_server_are_read_from_the_allowed_folder_alone(
    speech_http: httpx.Client, speech: SpeechServer, reference_folder: Path
) -> None:
    (reference_folder / "deep").mkdir(exist_ok=True)
    (reference_folder / "deep" / "me.wav").write_bytes(recording())
    outside = reference_folder.parent / "secret.wav"
    outside.write_bytes(recording())
    link = reference_folder / "link.wav"
    link.unlink(missing_ok=True)
    link.symlink_to(outside)

    def ask(name: str, field: str = "audio_path") -> httpx.Response:
        voice = [{"text": TRANSCRIPT, field: name}]
        return speech_http.post(PATH, json=body(references=voice))

    assert ask("deep/me.wav").status_code == 200
    assert ask("deep/me.wav", "audio").status_code == 200
    assert ask("file://deep/me.wav").status_code == 200
    assert ask(str(reference_folder / "deep" / "me.wav")).status_code == 200
    for name in ("../secret.wav", "link.wav", str(outside), "deep", "", "deep/../../secret.wav", "a\0b", "x" * 5000):
        assert "names no recording here" in error(ask(name), 400)["message"]
    assert "neither base64" in error(ask("../secret.wav", "audio"), 400)["message"]


def test_without_a_folder_no_file_can_be_named() -> None:
    with pytest.raises(ApiError, match="only if it was started with --reference-folder"):
        sound_in("a.wav", "audio_path", None)
    with pytest.raises(
        ApiError, match="Nothing is fetched from elsewhere, and files of the server can be named only if"
    ):
        sound_of("/etc/hostname.wav", "ref_audio", None)
    assert sound_of("aG\nk=", "ref_audio", None) == b"hi"


def test_a_client_that_leaves_ends_the_work(speech_http: httpx.Client, speech: SpeechServer) -> None:
    long = {"input": "Many words. " * 200, "max_new_tokens": 400}
    for fields in ({}, {"stream_format": "sse"}):
        aborted = speech.engine.stats().aborted
        with speech_http.stream("POST", PATH, json=body(response_format="pcm", **long, **fields)) as response:
            next(response.iter_raw())
            speech.until(lambda: speech.engine.stats().running == 1)
        speech.until_idle()
        assert speech.engine.stats().aborted == aborted + 1
    with pytest.raises(httpx.ReadTimeout):
        speech_http.post(PATH, json=body(response_format="wav", **long), timeout=0.5)
    speech.until_idle()


def test_the_models_are_listed_and_chat_is_refused(speech_http: httpx.Client) -> None:
    assert [card["id"] for card in speech_http.get("/v1/models").json()["data"]] == [NAME]
    assert speech_http.get(f"/v1/models/{NAME}").json()["max_model_len"] == 512
    chat = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
    assert "use it with /v1/audio/speech" in error(speech_http.post("/v1/chat/completions", json=chat), 400)["message"]


def test_the_figures_add_up(speech_http: httpx.Client, speech: SpeechServer) -> None:
    def figure(name: str) -> float:
        lines = speech_http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"triptych:{name}{{"))

    names = ("audio_duration_seconds_total", "speech_stream_completed_total", "audio_ttfp_s_count", "audio_rtf_count")
    before = [figure(name) for name in names]
    seconds = 2 * 12 * FRAME / RATE
    speak(speech_http)
    speak(speech_http, response_format="wav")
    after = [figure(name) for name in names]
    assert [b - a for a, b in zip(before, after)] == pytest.approx([seconds, 2, 2, 2])
    assert figure("output_stage_batches_total") > 0
    speech.until_idle()
