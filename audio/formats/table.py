"""The formats that speech leaves in, and which sample rates and bitrates each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from audio.errors import AudioError

AUTO_BITRATE = -1000  # opus: the encoder chooses

_PLAIN_RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
_MPEG1_RATES = (32000, 44100, 48000)
_MPEG1_BITRATES = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_BITRATES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_OPUS_BITRATES = (AUTO_BITRATE, 16, 24, 32, 48, 64, 96, 128)
_AAC_BITRATES = (16, 24, 32, 48, 64, 96, 128, 160, 192, 256)


@dataclass(frozen=True)
class Format:
    """One container with one codec in it; `muxer`, `codec` and the options are FFmpeg's names."""

    name: str
    mime: str
    suffix: str
    muxer: str
    codec: str
    rates: tuple[int, ...]  # Hz
    default_bitrate: int | None = None  # kbit/s; None: the format has no bitrates
    default_rate: int | None = None  # Hz; None: the source's rate, or the next one that the format has
    muxer_options: Mapping[str, str] = field(default_factory=dict)
    codec_options: Mapping[str, str] = field(default_factory=dict)

    def bitrates(self, rate: int) -> tuple[int, ...]:
        """The bitrates in kbit/s that go with a sample rate in Hz; empty if the format has none."""
        match self.name:
            case "mp3":
                return _MPEG1_BITRATES if rate in _MPEG1_RATES else _MPEG2_BITRATES
            case "opus":
                return _OPUS_BITRATES
            case "aac":  # a frame of 1024 samples has at most 6144 bits
                return tuple(b for b in _AAC_BITRATES if b * 1000 <= 6 * rate)
        return ()


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("wav", "audio/wav", ".wav", "wav", "pcm_s16le", _PLAIN_RATES),
        Format("pcm", "audio/pcm", ".pcm", "s16le", "pcm_s16le", _PLAIN_RATES),
        Format(
            "flac",
            "audio/flac",
            ".flac",
            "flac",
            "flac",
            _PLAIN_RATES,
            muxer_options={"metadata_header_padding": "0"},
            codec_options={"frame_size": "1024"},  # a frame is sent when it is full; the usual 4096 are 0.1 s
        ),
        Format(
            "mp3",
            "audio/mpeg",
            ".mp3",
            "mp3",
            "libmp3lame",
            (16000, 22050, 24000, *_MPEG1_RATES),
            default_bitrate=128,
            # A Xing header tells the length and so can only be written at the end.
            muxer_options={"write_xing": "0", "id3v2_version": "0"},
        ),
        Format(
            "opus",
            "audio/ogg",
            ".opus",
            "ogg",
            "libopus",
            (8000, 12000, 16000, 24000, 48000),
            default_bitrate=AUTO_BITRATE,
            default_rate=48000,
            muxer_options={"page_duration": "20000"},  # µs: one packet a page, not a second of them
        ),
        Format(
            "aac",
            "audio/aac",
            ".aac",
            "adts",
            "aac",
            _PLAIN_RATES,
            default_bitrate=128,
            codec_options={"aac_coder": "fast"},  # the other coder overshoots twofold where a tone sets in
        ),
    )
}


@dataclass(frozen=True)
class Settings:
    """What an encoder is asked for, checked: `rate` in Hz, `bitrate` in kbit/s or None where none is set."""

    format: Format
    rate: int
    bitrate: int | None


def settle(name: str, source_rate: int, sample_rate: int | None, bitrate: int | None) -> Settings:
    """Fill in the defaults. Raises AudioError naming what is not to be had and what is."""
    fmt = FORMATS.get(name)
    if fmt is None:
        raise AudioError(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
    rate = sample_rate or fmt.default_rate or min((r for r in fmt.rates if r >= source_rate), default=fmt.rates[-1])
    if rate not in fmt.rates:
        raise AudioError(f"{name} has no sample rate {rate}; it has {_listed(fmt.rates)} Hz")
    allowed = fmt.bitrates(rate)
    if not allowed:
        if bitrate is not None:
            raise AudioError(f"{name} has no bitrate, and {bitrate} was asked for; leave it out")
        return Settings(fmt, rate, None)
    if bitrate is None and fmt.default_bitrate is not None:
        bitrate = min(fmt.default_bitrate, allowed[-1])
    if bitrate not in allowed:
        raise AudioError(f"{name} at {rate} Hz has no bitrate {bitrate}; it has {_listed(allowed)} kbit/s")
    return Settings(fmt, rate, None if bitrate == AUTO_BITRATE else bitrate)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(f"{n} (automatic)" if n == AUTO_BITRATE else str(n) for n in numbers)
