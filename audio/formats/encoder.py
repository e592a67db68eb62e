"""Samples to bytes of a format, while the samples come in or all at once."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

import av
import numpy as np

from audio.errors import AudioError
from audio.filters import to_frame
from audio.formats.table import Settings, settle


def open_encoder(
    format: str, *, source_rate: int, sample_rate: int | None = None, bitrate: int | None = None
) -> Encoder:
    """Start a stream of samples at `source_rate` Hz in one of `FORMATS`.

    sample_rate: of the file, in Hz; the default is the source's if the format has it, and 48 kHz for opus.
    bitrate: in kbit/s, -1000 for opus's own choice. Raises AudioError naming what is not to be had and what is.
    """
    return Encoder(settle(format, source_rate, sample_rate, bitrate), source_rate)


def encode_whole(
    samples: np.ndarray, format: str, *, source_rate: int, sample_rate: int | None = None, bitrate: int | None = None
) -> bytes:
    """A whole file of float32 [n] samples; the arguments are `open_encoder`'s.

    The bytes of a stream, but for the headers of wav and flac: here they tell the length.
    """
    file = io.BytesIO()
    writer = _Writer(settle(format, source_rate, sample_rate, bitrate), source_rate, file)
    writer.push(samples)
    writer.finish()
    return file.getvalue()


class Encoder:
    """One stream of float32 mono samples in [-1, 1] on its way into a format.

    Bytes leave as soon as the codec has made them. They do not depend on the pieces that the samples come in.
    """

    def __init__(self, settings: Settings, source_rate: int) -> None:
        self.settings = settings
        self._outbox = _Outbox()
        self._writer = _Writer(settings, source_rate, cast(BinaryIO, self._outbox))

    def header(self) -> bytes:
        """What the file begins with, to be sent before there is sound; else the first `push` gives it."""
        return self._outbox.take()

    def push(self, samples: np.ndarray) -> bytes:
        """The bytes that float32 [n] completes, perhaps none. Raises AudioError if a sample is not a finite number."""
        self._writer.push(samples)
        return self._outbox.take()

    def finish(self) -> bytes:
        """The bytes that are left. Nothing may be pushed afterwards."""
        self._writer.finish()
        return self._outbox.take()


class _Outbox:
    """A file that cannot go back, which a muxer sees by the missing `seek`, and that forgets what was taken."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes) -> int:
        self._bytes += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._bytes)
        self._bytes.clear()
        return taken


class _Writer:
    """A codec and a muxer that write into a file; into one with `seek`, the length too."""

    def __init__(self, settings: Settings, source_rate: int, file: BinaryIO) -> None:
        self._source_rate = source_rate
        self._pushed = 0
        fmt = settings.format
        self._container = av.open(
            file,
            "w",
            format=fmt.muxer,
            # Without `bitexact` an Ogg stream has a random number, and files name the library that wrote them.
            options={"flush_packets": "1", "fflags": "+bitexact", **fmt.muxer_options},
        )
        # The codec's context brings samples to its own rate and frame size, and keeps the state for that.
        stream = self._container.add_stream(fmt.codec, rate=settings.rate, options=dict(fmt.codec_options))
        self._stream = cast(av.AudioStream, stream)
        context = self._stream.codec_context
        context.layout = "mono"
        context.thread_count = 1
        context.flags |= av.codec.context.Flags.bitexact
        if settings.bitrate is not None:
            context.bit_rate = settings.bitrate * 1000
        self._container.start_encoding()

    def push(self, samples: np.ndarray) -> None:
        if len(samples) == 0:
            return
        if not np.isfinite(samples).all():
            raise AudioError("samples must be finite numbers; one of these is NaN or infinite")
        frame = to_frame(np.clip(samples, -1, 1), self._source_rate, self._pushed)
        self._pushed += len(samples)
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        if self._pushed:
            self._container.mux(self._stream.encode(None))
        self._container.close()
