import io
import itertools

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.errors import AudioError
from audio.formats import AUTO_BITRATE, FORMATS, Encoder, encode_whole, open_encoder
from tests.audio.sounds import cut_at, decoded, dominant_hertz, level_beside, tone, vowels

SOURCE = 44100
EVERY_RATE = [(name, rate) for name, f in FORMATS.items() for rate in f.rates]
EVERY_BITRATE = [(name, rate, b) for name, rate in EVERY_RATE for b in FORMATS[name].bitrates(rate)]


def streamed(encoder: Encoder, pieces: list[np.ndarray]) -> bytes:
    return b"".join([encoder.header(), *(encoder.push(p) for p in pieces), encoder.finish()])


def samples_of(data: bytes, name: str, rate: int) -> np.ndarray:
    if name == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768
    found_rate, samples = decoded(data)
    assert found_rate == (48000 if name == "opus" else rate)
    return samples


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 10**6), max_size=30),
    source=st.sampled_from([24000, 44100]),
    rate=st.sampled_from([16000, 24000, 48000]),
)
def test_a_stream_in_any_pieces_is_the_whole_file(name: str, cuts: list[int], source: int, rate: int) -> None:
    sound = vowels(0.35, source)
    whole = encode_whole(sound, name, source_rate=source, sample_rate=rate)
    stream = streamed(open_encoder(name, source_rate=source, sample_rate=rate), cut_at(sound, cuts))
    header = {"wav": 44, "flac": 42}.get(name, 0)  # only there does a whole file know more than a stream
    assert stream[header:] == whole[header:]
    np.testing.assert_array_equal(samples_of(stream, name, rate), samples_of(whole, name, rate))


@pytest.mark.parametrize("name, rate", EVERY_RATE)
def test_every_rate_holds_the_sound_at_its_pitch_and_length(name: str, rate: int) -> None:
    sound = tone(600, 0.5, SOURCE)
    data = encode_whole(sound, name, source_rate=SOURCE, sample_rate=rate)
    got = samples_of(data, name, rate)
    heard = 48000 if name == "opus" else rate
    assert dominant_hertz(got, heard) == pytest.approx(600, abs=4)
    middle = got[len(got) // 4 : -len(got) // 4]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)
    padding = 0.0001 if FORMATS[name].default_bitrate is None else 3 * 1152 / rate + 0.02
    assert 0 <= len(got) / heard - 0.5 + 0.0001 <= padding + 0.0001


@pytest.mark.parametrize("name, rate, bitrate", EVERY_BITRATE)
def test_every_bitrate_is_kept(name: str, rate: int, bitrate: int) -> None:
    sound = np.tile(vowels(0.25, SOURCE), 2) + 0.05 * np.random.default_rng(0).standard_normal(SOURCE // 4 * 2)
    data = encode_whole(sound.astype(np.float32), name, source_rate=SOURCE, sample_rate=rate, bitrate=bitrate)
    kbits = len(data) * 8 / 500
    if bitrate != AUTO_BITRATE:
        assert kbits < bitrate * 1.45 + 10, "frames are padded at both ends, and pages have headers"
    if name == "mp3":
        assert kbits > bitrate * 0.95


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_come_early_and_keep_coming(name: str) -> None:
    encoder = open_encoder(name, source_rate=SOURCE)
    header = encoder.header()
    assert (len(header) > 0) == (name in ("wav", "flac", "opus"))
    pieces = [len(encoder.push(p)) for p in cut_at(vowels(2, SOURCE), list(range(882, 88200, 882)))]
    waits = [len(list(group)) for silent, group in itertools.groupby(pieces, key=lambda n: n == 0) if silent]
    assert pieces.index(next(n for n in pieces if n)) <= 5, "no sound after a tenth of a second"
    assert max(waits[1:], default=0) <= 3, "more than 60 ms were held back in the middle"


def test_a_streamed_wav_says_that_its_length_is_unknown_and_a_whole_one_says_it() -> None:
    sound = tone(440, 0.1, 24000)
    stream = streamed(open_encoder("wav", source_rate=24000), [sound])
    assert stream[4:8] == stream[40:44] == b"\xff\xff\xff\xff"
    whole = encode_whole(sound, "wav", source_rate=24000)
    assert whole[4:8] == (len(whole) - 8).to_bytes(4, "little")
    assert whole[40:44] == (2 * len(sound)).to_bytes(4, "little")
    for data in (stream, whole):
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        assert rate == 24000
        np.testing.assert_allclose(samples, sound, atol=1 / 32768)


def test_a_whole_flac_says_its_length() -> None:
    sound = tone(440, 0.1, 24000)
    assert soundfile.info(io.BytesIO(encode_whole(sound, "flac", source_rate=24000))).frames == 2400
    stream = streamed(open_encoder("flac", source_rate=24000), [sound])
    np.testing.assert_allclose(decoded(stream)[1], sound, atol=1 / 32768)


@pytest.mark.parametrize("name, rate", [("pcm", r) for r in FORMATS["pcm"].rates])
def test_resampling_leaves_no_seam_at_the_borders_of_pieces(name: str, rate: int) -> None:
    sound = tone(1000, 1, SOURCE)
    data = streamed(
        open_encoder(name, source_rate=SOURCE, sample_rate=rate), cut_at(sound, list(range(0, SOURCE, 441)))
    )
    got = samples_of(data, name, rate)[rate // 10 : -rate // 10]
    assert level_beside(got, rate, 1000) < -80, "a click every hundredth of a second would show beside the tone"
    assert np.abs(np.diff(got)).max() <= 0.5 * 2 * np.pi * 1000 / rate * 1.01, "the steepest step is the tone's own"


def test_what_is_louder_than_full_scale_is_clipped_and_not_wrapped() -> None:
    loud = np.array([0, 2, -2, 1, -1], np.float32)
    pcm = np.frombuffer(encode_whole(loud, "pcm", source_rate=24000), "<i2")
    assert pcm.tolist() == [0, 32767, -32768, 32767, -32768]


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_without_sound_ends_well(name: str) -> None:
    encoder = open_encoder(name, source_rate=SOURCE)
    header = encoder.header()
    assert encoder.push(np.zeros(0, np.float32)) + encoder.finish() == b""
    assert encode_whole(np.zeros(0, np.float32), name, source_rate=SOURCE)[:8] in (header[:8], b"RIFF\x24\0\0\0")


def test_two_streams_of_the_same_sound_are_the_same_bytes() -> None:
    sound = vowels(0.2, SOURCE)
    for name in FORMATS:
        assert encode_whole(sound, name, source_rate=SOURCE) == encode_whole(sound, name, source_rate=SOURCE)


@pytest.mark.parametrize(
    "name, source, rate",
    [("wav", 44100, 44100), ("mp3", 24000, 24000), ("mp3", 8000, 16000), ("opus", 44100, 48000), ("aac", 96000, 48000)],
)
def test_the_rate_is_the_sources_own_where_the_format_has_it(name: str, source: int, rate: int) -> None:
    assert open_encoder(name, source_rate=source).settings.rate == rate


@pytest.mark.parametrize(
    "name, rate, bitrate, message",
    [
        ("ogg", None, None, "no format 'ogg'; there are wav, pcm, flac, mp3, opus, aac"),
        ("mp3", 12345, None, "mp3 has no sample rate 12345; it has 16000, .*48000 Hz"),
        ("opus", 44100, None, "opus has no sample rate 44100; .*24000, 48000 Hz"),
        ("mp3", 44100, 65, "mp3 at 44100 Hz has no bitrate 65; it has 32, .*320 kbit/s"),
        ("mp3", 24000, 192, "mp3 at 24000 Hz has no bitrate 192; .*160 kbit/s"),
        ("opus", None, 0, r"opus at 48000 Hz has no bitrate 0; it has -1000 \(automatic\), 16"),
        ("wav", None, 128, "wav has no bitrate, and 128 was asked for"),
    ],
)
def test_an_error_names_what_is_not_to_be_had_and_what_is(
    name: str, rate: int | None, bitrate: int | None, message: str
) -> None:
    with pytest.raises(AudioError, match=message):
        open_encoder(name, source_rate=SOURCE, sample_rate=rate, bitrate=bitrate)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(AudioError, match="finite"):
        open_encoder("mp3", source_rate=SOURCE).push(np.array([0, value], np.float32))


def test_mime_types_and_suffixes() -> None:
    assert {f.name: (f.mime, f.suffix) for f in FORMATS.values()} == {
        "wav": ("audio/wav", ".wav"),
        "pcm": ("audio/pcm", ".pcm"),
        "flac": ("audio/flac", ".flac"),
        "mp3": ("audio/mpeg", ".mp3"),
        "opus": ("audio/ogg", ".opus"),
        "aac": ("audio/aac", ".aac"),
    }
