import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import reading
from audio.errors import AudioError
from audio.filters import to_frame
from audio.formats import FORMATS, encode_whole
from audio.reading import ReadingLimits, read_audio
from tests.audio.sounds import decoded, dominant_hertz, tone

RATE = 24000
CONTAINERS = [  # (FFmpeg's muxer, codec, channels, Hz)
    ("mp4", "aac", 2, 48000),
    ("wv", "wavpack", 8, 44100),
    ("w64", "pcm_s16le", 16, 16000),
    ("ipod", "alac", 1, 44100),
    ("webm", "libopus", 2, 48000),
    ("matroska", "pcm_f64le", 2, 96000),
    ("mov", "pcm_s24le", 1, 32000),
    ("aiff", "pcm_s16be", 2, 22050),
    ("au", "pcm_mulaw", 1, 8000),
    ("caf", "pcm_s16le", 1, 11025),
    ("mpegts", "aac", 1, 44100),
    ("ac3", "ac3", 6, 48000),
    ("amr", "libopencore_amrnb", 1, 8000),
]
SUBTYPES = ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"]


def muxed(muxer: str, codec: str, channels: int, rate: int, sound: np.ndarray, video: bool = False) -> bytes:
    """A file of `sound` (mono, `rate` Hz) in any of FFmpeg's containers."""
    file = io.BytesIO()
    with av.open(file, "w", format=muxer) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.codec_context.layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1", 16: "hexadecagonal"}[channels]
        if video:
            picture = container.add_stream("mpeg4", rate=25)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
            for _ in range(25):
                container.mux(picture.encode(av.VideoFrame(64, 48, "yuv420p")))
            container.mux(picture.encode(None))
        for at in range(0, len(sound), 4096):
            container.mux(stream.encode(to_frame(sound[at : at + 4096], rate, at)))
        container.mux(stream.encode(None))
    return file.getvalue()


def wav(samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT", kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def is_the_tone(samples: np.ndarray, hertz: float, seconds: float, within: float = 0.08) -> bool:
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert len(samples) / RATE == pytest.approx(seconds, abs=within)
    assert dominant_hertz(samples, RATE) == pytest.approx(hertz, abs=2)
    return True


@pytest.mark.parametrize("muxer, codec, channels, rate", CONTAINERS)
def test_what_ffmpeg_reads_is_read(muxer: str, codec: str, channels: int, rate: int) -> None:
    data = muxed(muxer, codec, channels, rate, tone(600, 1, rate))
    assert is_the_tone(read_audio(data, RATE), 600, 1)


@pytest.mark.parametrize("subtype", SUBTYPES)
@pytest.mark.parametrize("rate", [8000, 44100, 192000])
def test_what_libsndfile_reads_is_read(subtype: str, rate: int) -> None:
    samples = read_audio(wav(tone(600, 1, rate), rate, subtype), RATE)
    assert is_the_tone(samples, 600, 1)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "pcm"])
def test_what_we_write_is_read(name: str) -> None:
    assert is_the_tone(read_audio(encode_whole(tone(600, 1, 44100), name, source_rate=44100), RATE), 600, 1)


def test_the_sound_track_of_a_video_is_read() -> None:
    assert is_the_tone(read_audio(muxed("mp4", "aac", 1, 44100, tone(600, 1, 44100), video=True), RATE), 600, 1)


def test_a_rate_that_is_wanted_already_changes_nothing() -> None:
    sound = tone(600, 1, RATE)
    np.testing.assert_array_equal(read_audio(wav(sound), RATE), sound)


def test_channels_are_averaged() -> None:
    left, right = tone(600, 1, RATE), tone(900, 1, RATE)
    both = read_audio(wav(np.stack([left, right], axis=1)), RATE)
    np.testing.assert_allclose(both, (left + right) / 2, atol=1e-6)


def test_a_file_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a voice.wav"
    path.write_bytes(wav(tone(600, 1, RATE)))
    assert is_the_tone(read_audio(path, RATE), 600, 1)
    assert is_the_tone(read_audio(str(path), RATE), 600, 1)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 2e-3])
def test_silence_is_cut_off_at_both_ends_and_kept_inside(noise: float) -> None:
    sound = np.zeros(5 * RATE, np.float32)
    sound[2 * RATE : 3 * RATE] = tone(600, 1, RATE)
    sound[2 * RATE + 8000 : 2 * RATE + 16000] = 0
    sound += (noise * np.random.default_rng(1).standard_normal(len(sound))).astype(np.float32)
    got = read_audio(wav(sound), RATE)
    np.testing.assert_array_equal(got, sound[2 * RATE - RATE // 20 : 3 * RATE + RATE // 20])


def test_a_quiet_end_of_a_word_is_kept() -> None:
    fading = tone(600, 1.5, RATE, level=0.8) * np.logspace(0, -1.9, RATE * 3 // 2, dtype=np.float32)
    assert len(read_audio(wav(fading), RATE)) == len(fading)


def test_what_is_louder_than_full_scale_is_scaled_and_keeps_its_shape() -> None:
    loud = tone(600, 1, RATE, level=4.0)
    np.testing.assert_allclose(read_audio(wav(loud), RATE), loud / np.abs(loud).max(), atol=1e-6)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "empty: it has 0 bytes"),
        (b"RIFF", "cannot be decoded"),
        (b"<!DOCTYPE html><html>not found</html>", "cannot be decoded .*begin with b'<!DOCTYPE ht'"),
        (wav(np.zeros(0, np.float32)), "no samples"),
        (wav(np.zeros(RATE, np.float32)), "silent: nothing in its 1.00 s"),
        (wav(tone(600, 2, RATE, level=5e-4)), "silent"),
        (wav(tone(600, 0.2, RATE)), "0.20 s of sound in 0.20 s; at least 0.5 s"),
        (wav(np.pad(tone(600, 0.3, RATE), RATE)), "0.30 s of sound in 2.30 s"),
        (wav(tone(600, 61, 8000), 8000), "longer than 60 s"),
        (wav(np.full(RATE, np.nan, np.float32)), "not finite"),
        (wav(np.ones(100, np.float32), 10), "sample rate of 10 Hz; 1000 to 768000"),
    ],
)
def test_what_is_wrong_with_a_recording_is_told(data: bytes, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        read_audio(data, RATE)


def test_limits_can_be_set() -> None:
    data = wav(tone(600, 2, RATE))
    for limits, message in [
        (ReadingLimits(min_seconds=3), "at least 3 s"),
        (ReadingLimits(max_seconds=1.5), "longer than 1.5 s"),
        (ReadingLimits(max_bytes=1000), "more than 1000 bytes"),
    ]:
        with pytest.raises(AudioError, match=message):
            read_audio(data, RATE, limits)


def test_a_video_without_sound_is_told() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="without a sound track"):
        read_audio(file.getvalue(), RATE)


@pytest.mark.parametrize("path", ["nothing.wav", ".", "http://localhost/a.wav", "file:a.wav", "concat:a.wav", "\0"])
def test_a_path_that_is_no_file_is_told_and_nothing_else_is_opened(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(wav(tone(600, 1, RATE)))
    with pytest.raises(AudioError, match="no audio file"):
        read_audio(path, RATE)


def test_a_playlist_does_not_make_its_reader_open_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sound = tone(600, 1, RATE)
    (tmp_path / "secret.wav").write_bytes(wav(sound))
    (tmp_path / "secret.aac").write_bytes(encode_whole(sound, "aac", source_rate=RATE))
    concat = b"ffconcat version 1.0\nfile secret.wav\n"
    assert len(decoded(concat)[1]) == RATE, "FFmpeg itself would open it"
    hls = b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n"
    for playlist in (
        concat,
        hls % b"secret.aac",
        hls % os.fsencode(tmp_path / "secret.aac"),
        hls % b"http://localhost:9/a.aac",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    ):
        for source in (playlist, tmp_path / "list.m3u8"):
            (tmp_path / "list.m3u8").write_bytes(playlist)
            with pytest.raises(AudioError, match="cannot be decoded"):
                read_audio(source, RATE)


@pytest.mark.parametrize("decoder", ["_libsndfile_blocks", "_ffmpeg_blocks"])
def test_a_small_file_that_becomes_much_sound_is_given_up_early(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = np.zeros(8000 * 1200, np.float32)
    if decoder == "_libsndfile_blocks":
        data = wav(quiet, 8000, "PCM_16", "FLAC")
    else:
        data = muxed("matroska", "flac", 1, 8000, quiet)
    assert len(data) < len(quiet) / 20
    blocks: Callable[[bytes], reading.Blocks] = getattr(reading, decoder)
    seconds = 0.0

    def counted(data: bytes) -> reading.Blocks:
        nonlocal seconds
        for rate, block in blocks(data):
            seconds += len(block) / rate
            yield rate, block

    monkeypatch.setattr(reading, decoder, counted)
    with pytest.raises(AudioError, match="longer than 60 s"):
        read_audio(data, RATE)
    assert 60 < seconds < 100, "no more than a block beyond what is allowed"


def encoded_tones() -> dict[str, bytes]:
    sound = tone(600, 1, 44100)
    files = {n: encode_whole(sound, n, source_rate=44100) for n in FORMATS if n != "pcm"}
    return files | {m: muxed(m, codec, ch, rate, tone(600, 1, rate)) for m, codec, ch, rate in CONTAINERS}


FILES = encoded_tones()


def read_or_refused(data: bytes) -> np.ndarray | None:
    try:
        samples = read_audio(data, RATE)
    except AudioError:
        return None
    assert samples.dtype == np.float32 and np.isfinite(samples).all() and np.abs(samples).max() <= 1
    assert 0.5 * RATE <= len(samples) <= 60.2 * RATE
    return samples


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_gives_what_is_there_or_a_clear_error(name: str) -> None:
    data = FILES[name]
    lengths = [len(data) * k // 16 for k in range(16)] + [1, 4, 12, 44, 60, len(data) - 1]
    found = [read_or_refused(data[:n]) for n in lengths]
    assert found[0] is None
    if name not in ("mp4", "ipod", "mov"):  # their index is at the end
        block = 0.25 if name == "wv" else 0.08  # seconds that are lost when their end is
        assert found[15] is not None and is_the_tone(found[15], 600, 15 / 16, within=block)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", *(data[:60] for data in FILES.values())]))
def test_random_bytes_are_refused(noise: bytes, start: bytes) -> None:
    read_or_refused(start + noise)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_sound_or_a_clear_error(name: str) -> None:
    chance = random.Random(name)
    for _ in range(12):
        data = bytearray(FILES[name])
        for _ in range(chance.choice([1, 5, 50])):
            data[chance.randrange(chance.choice([64, 600, len(data)])) % len(data)] = chance.randrange(256)
        read_or_refused(bytes(data))
