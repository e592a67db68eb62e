"""The codec behind a dual-AR model: emitted frames become samples before they leave the engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ar_core.request import FinishReason
from audio.codec import Codec, StreamingDecoder
from modalities.speech.chunks import Chunks, Latency


class _Stream:
    """One speech: its chunks, the frames that wait for the next one, and its place in the decoder once it has any."""

    def __init__(self, latency: Latency) -> None:
        self.chunks = Chunks(latency)
        self.waiting: list[list[int]] = []  # codes [K] each
        self.slot: int | None = None


class CodecStage:
    """An OutputStage (see `ar_core.interfaces`).

    Payloads are the samples of the frames that became due, float32 bytes. A speech is the work of several of the
    engine's requests, one after the other, named `speech/0`, `speech/1`, ...: they share a stream of the decoder, so
    that one goes on where the other ended, sample by sample.

    If more speeches are under way than the decoder has slots (it takes several waves of preemption), those without one
    are silent until their part of the text ends, and that part is decoded by itself.
    """

    def __init__(self, codec: Codec, slots: int) -> None:
        """slots: speeches that may have begun and not ended."""
        self._codec = codec
        self._decoder = StreamingDecoder(codec, slots)
        self._free = slots
        self._streams: dict[str, _Stream] = {}
        self.batches = 0  # decoded so far
        self.items = 0  # streams in them, added up

    def open(self, speech: str, latency: Latency) -> None:
        self._streams[speech] = _Stream(latency)

    def close(self, speech: str) -> None:
        """Forget a speech that has ended."""
        stream = self._streams.pop(speech)
        if stream.slot is not None:
            self._decoder.close(stream.slot)
            self._free += 1

    def process(self, emitted: Sequence[tuple[str, list[list[int]], FinishReason | None]]) -> list[bytes | None]:
        payloads: list[bytes | None] = [None] * len(emitted)
        due = {}
        for index, (request_id, rows, finish) in enumerate(emitted):
            stream = self._streams.get(request_id.rpartition("/")[0])
            if stream is None:  # closed while a step was under way
                continue
            spoken = rows[:-1] if finish is FinishReason.STOP else rows  # the row that ends a turn is no sound
            stream.waiting += [row[1:] for row in spoken]
            ended = finish in (FinishReason.STOP, FinishReason.LENGTH)
            if finish is FinishReason.ABORT or not stream.chunks.due(len(stream.waiting), ended=ended):
                continue
            if self._has_slot(stream):
                due[index] = stream
            elif ended:
                payloads[index] = _bytes(self._codec.decode(_codes(stream)[None])[0])
        for index, samples in zip(due, self._decode(list(due.values())), strict=True):
            payloads[index] = samples
        return payloads

    def _has_slot(self, stream: _Stream) -> bool:
        """Whether the stream has a slot of the decoder, after giving it one if there is any."""
        if stream.slot is None and self._free:
            stream.slot = self._decoder.open()
            self._free -= 1
        return stream.slot is not None

    def _decode(self, streams: list[_Stream]) -> list[bytes]:
        """The waiting frames of these streams, which have slots, as samples: in one batched call."""
        if not streams:
            return []
        self.batches += 1
        self.items += len(streams)
        codes = {stream.slot: _codes(stream) for stream in streams if stream.slot is not None}
        decoded = self._decoder.decode(codes)
        return [_bytes(decoded[slot]) for slot in codes]


def _codes(stream: _Stream) -> torch.Tensor:
    """Take the frames that wait: int64 [K, n]."""
    codes = torch.tensor(stream.waiting).T
    stream.waiting = []
    return codes


def _bytes(samples: torch.Tensor) -> bytes:
    return samples.cpu().numpy().astype(np.float32).tobytes()
