"""Recordings in: any sound file to float32 mono samples, or an error that says what is wrong with it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
import numpy as np
import soundfile

from audio.errors import AudioError
from audio.filters import Resampler


def _decodes_sound(codec: str) -> bool:
    try:
        return bool(av.Codec(codec, "r").type == "audio")
    except av.codec.codec.UnknownCodecError:  # it only encodes
        return False


# FFmpeg's names of what holds sound. Everything else is refused: a playlist, say, makes FFmpeg open other files.
_CONTAINERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,gsm,loas,matroska,webm,mov,mp4,m4a,mp3,"
    "mpc,mpc8,mpeg,mpegts,ogg,oma,rm,shn,tak,truehd,tta,voc,w64,wav,wv"
)
_DECODERS = ",".join(name for name in av.codecs_available if _decodes_sound(name))
# Nothing opens a file or connection: no format that refers to others is allowed, and no protocol is there to do it.
# And no picture is decoded, which FFmpeg would do to learn about a video.
_OPTIONS = {"format_whitelist": _CONTAINERS, "codec_whitelist": _DECODERS, "protocol_whitelist": "none"}
_PATIENCE = 100  # packets without sound, beyond as many as had some, before a file is given up

_MP3 = (b"ID3", *(bytes([0xFF, 0xE0 | low]) for low in range(0x20)))

_RATES = (1000, 768_000)  # Hz; what lies outside is no recording, and costs memory or time out of proportion
_BLOCK_VALUES = 1 << 18  # decoded at a time, over all channels

_WINDOW = 0.01  # seconds over which loudness is taken
_SILENCE = 1e-3  # -60 dB of full scale: below, a window is silent whatever is around it
_QUIET = 1e-2  # -40 dB of the loudest window: below, a window at the border is not part of what was recorded
_MARGIN = 0.05  # seconds kept on either side of the sound


@dataclass(frozen=True)
class ReadingLimits:
    """What a recording may be. The least length is of its sound, without the silence around it."""

    min_seconds: float = 0.5
    max_seconds: float = 60.0
    max_bytes: int = 64 << 20


def read_audio(source: bytes | str | os.PathLike[str], rate: int, limits: ReadingLimits | None = None) -> np.ndarray:
    """The sound of a file, given as its bytes or its path: float32 [n], mono, at `rate` Hz, in [-1, 1].

    Channels are averaged, and silence at both ends is cut off but for a twentieth of a second. Decoding stops as soon
    as the sound is longer than allowed. Nothing but the given bytes is read, whatever the file refers to.

    Raises AudioError if the file is missing, empty, too big, undecodable, silent, too short or too long.
    """
    limits = limits or ReadingLimits()
    data = source if isinstance(source, bytes) else _file_bytes(Path(source), limits.max_bytes)
    if len(data) == 0:
        raise AudioError("the audio is empty: it has 0 bytes")
    if len(data) > limits.max_bytes:
        raise AudioError(f"the audio has more than {limits.max_bytes} bytes, which is the most that is allowed")
    try:
        samples = _decoded(_libsndfile_blocks, data, rate, limits.max_seconds)
    except _UndecodableError:
        try:
            samples = _decoded(_ffmpeg_blocks, data, rate, limits.max_seconds)
        except _UndecodableError as error:
            raise AudioError(
                f"the audio cannot be decoded ({error}): its {len(data)} bytes begin with {data[:12]!r}; "
                "send wav, flac, mp3, ogg, opus, m4a, webm or another file with sound in it"
            ) from error
    return _trimmed(samples, rate, limits.min_seconds)


class _UndecodableError(Exception):
    """This decoder cannot read the file; another one might."""


Blocks = Iterator[tuple[int, np.ndarray]]  # (Hz, float32 [n, channels])


def _file_bytes(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise AudioError(f"there is no audio file at {str(path)!r}")
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


@np.errstate(over="ignore", invalid="ignore")  # what becomes infinite or NaN is told in the end
def _decoded(blocks: Callable[[bytes], Blocks], data: bytes, rate: int, max_seconds: float) -> np.ndarray:
    """Everything that a decoder gives, mixed down and at one rate."""
    parts: list[np.ndarray] = []
    resampler: Resampler | None = None
    source_rate, seconds = 0, 0.0
    for block_rate, block in blocks(data):
        if not _RATES[0] <= block_rate <= _RATES[1]:
            raise AudioError(f"the audio has a sample rate of {block_rate} Hz; {_RATES[0]} to {_RATES[1]} are allowed")
        seconds += len(block) / block_rate
        if seconds > max_seconds:
            raise AudioError(f"the audio is longer than {max_seconds:g} s, which is the most that is allowed")
        if resampler is None or block_rate != source_rate:
            if resampler is not None:
                parts.append(resampler.finish())
            resampler, source_rate = Resampler(block_rate, rate), block_rate
        parts.append(resampler.push(block.mean(axis=1, dtype=np.float32)))
    if resampler is None:
        raise AudioError("the audio has no samples in it")
    return np.concatenate([*parts, resampler.finish()])


def _libsndfile_blocks(data: bytes) -> Blocks:
    if data.startswith(_MP3):
        raise _UndecodableError("libsndfile's mp3 decoder prints what it dislikes, so FFmpeg's has it")
    try:
        with soundfile.SoundFile(_Bytes(data)) as file:
            while len(block := file.read(max(1, _BLOCK_VALUES // file.channels), dtype="float32", always_2d=True)):
                yield file.samplerate, block
    except soundfile.SoundFileError as error:
        raise _UndecodableError(str(error)) from error


class _Bytes(io.BytesIO):
    """A damaged file can send libsndfile to before its start; an exception there would only be printed."""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def _ffmpeg_blocks(data: bytes) -> Blocks:
    decoded, fruitless, to_float = 0, 0, _ToFloat()
    try:
        with av.open(io.BytesIO(data), mode="r", options=_OPTIONS, metadata_errors="replace") as container:
            stream = container.streams.best("audio")
            if stream is None:
                raise _UndecodableError(f"it is {container.format.long_name} without a sound track")
            for packet in container.demux(stream):
                frames: list[av.AudioFrame] = []
                with suppress(av.error.InvalidDataError):  # a broken packet costs its own sound, not all of it
                    frames = cast(list[av.AudioFrame], packet.decode())
                decoded += len(frames)
                fruitless += not frames
                if fruitless > decoded + _PATIENCE:
                    break
                for frame in frames:
                    yield frame.sample_rate, to_float(frame)
    except (av.FFmpegError, IndexError) as error:  # PyAV's IndexError: a track that turns up in mid-file
        if decoded == 0:
            raise _UndecodableError(getattr(error, "strerror", "its tracks are not those it names")) from error
    if fruitless > decoded:
        raise _UndecodableError(f"{fruitless} of its packets gave no sound, {decoded} did")


class _ToFloat:
    """Frames in any of FFmpeg's sample formats to float32 [n, channels].

    Interleaved by FFmpeg, as PyAV looks for the planes of 8 and more channels in memory that is not the frame's.
    """

    def __init__(self) -> None:
        self._kind: tuple[str, str, int] | None = None
        self._resampler = av.AudioResampler(format="flt")

    def __call__(self, frame: av.AudioFrame) -> np.ndarray:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind:
            self._kind, self._resampler = kind, av.AudioResampler(format="flt")
        frame.pts = None
        none = np.zeros((0, frame.layout.nb_channels), np.float32)
        return np.concatenate(
            [none, *(f.to_ndarray().reshape(-1, none.shape[1]) for f in self._resampler.resample(frame))]
        )


def _trimmed(samples: np.ndarray, rate: int, min_seconds: float) -> np.ndarray:
    """Without the silence at both ends, and no louder than full scale."""
    if not np.isfinite(samples).all():
        raise AudioError("the audio has samples that are not finite numbers")
    window = max(1, round(rate * _WINDOW))
    padded = np.pad(samples, (0, -len(samples) % window)).reshape(-1, window)
    loudness = np.sqrt(np.mean(np.square(padded, dtype=np.float64), axis=1))
    peak = loudness.max(initial=0.0)
    if peak < _SILENCE:
        raise AudioError(f"the audio is silent: nothing in its {len(samples) / rate:.2f} s is louder than -60 dB")
    loud = np.flatnonzero(loudness >= max(_SILENCE, peak * _QUIET))
    first, last = loud[0] * window, min((loud[-1] + 1) * window, len(samples))
    if last - first < min_seconds * rate:
        raise AudioError(
            f"the audio has {(last - first) / rate:.2f} s of sound in {len(samples) / rate:.2f} s; "
            f"at least {min_seconds:g} s are needed"
        )
    margin = round(rate * _MARGIN)
    kept = samples[max(0, first - margin) : last + margin]
    return kept / np.float32(max(1.0, float(np.abs(kept).max())))
