"""One speech on its way out: what the engine makes, with effects, as bytes of a sound format, and what it took."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ar_core.request import FinishReason, Output, Request
from audio.effects import Effects
from audio.formats import encode_whole, open_encoder
from streaming.client import EngineUnavailable
from streaming.metrics import SpeechTimer

if TYPE_CHECKING:
    from streaming.http.served import ServedVoice


@dataclass(frozen=True, slots=True)
class Delivery:
    """How sound leaves: sample_rate in Hz, bitrate in kbit/s, None for the format's own; volume in dB."""

    format: str = "mp3"
    sample_rate: int | None = None
    bitrate: int | None = None
    speed: float = 1.0
    volume: float = 0.0


class Speech:
    """What the engine makes of a request, taken once; the figures are right at any time, and final after it.

    Raises AudioError for a delivery that cannot be.
    """

    def __init__(self, model: ServedVoice, request: Request, delivery: Delivery) -> None:
        self.request = request
        self.rows: list[list[int]] = []  # emitted so far, those that end turns among them
        self.frames = 0  # spoken so far
        self.seconds = 0.0  # of sound so far, effects included
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.finish: FinishReason | None = None
        self._client = model.client
        self._tokenizer = model.speech.tokenizer
        self._rate = model.speech.sample_rate
        self._effects = Effects(self._rate, speed=delivery.speed, volume=delivery.volume)
        self._timer = SpeechTimer(model.name)

    async def samples(self) -> AsyncGenerator[np.ndarray, None]:
        """float32 [n] at the model's rate, effects applied, as they are made. Closing it early cancels what still runs.

        Raises what `EngineClient.submit` raises.
        """
        async with aclosing(self._client.submit(self.request)) as outputs:
            async for output in outputs:
                self._note(output)
                if output.payload:
                    yield self._count(self._effects.push(np.frombuffer(output.payload, dtype=np.float32)))
        if self.finish is None:
            raise EngineUnavailable("the engine ended the speech without finishing it")
        yield self._count(self._effects.finish())
        self._timer.finish(self.seconds)

    def _note(self, output: Output) -> None:
        if output.finish in (FinishReason.ABORT, FinishReason.ERROR):
            raise EngineUnavailable(output.error or "the engine gave the speech up")
        self.rows += output.rows
        if output.rows:
            self.frames += int(self._tokenizer.is_frame(np.array(output.rows)).sum())
        self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens
        self.finish = output.finish

    def _count(self, samples: np.ndarray) -> np.ndarray:
        seconds = len(samples) / self._rate
        self.seconds += seconds
        if seconds:
            self._timer.chunk(seconds)
        return samples


class Synthesis(Speech):
    """A speech as a file: take either the `chunks` or the `whole` of it.

    Raises AudioError for a delivery that cannot be.
    """

    def __init__(self, model: ServedVoice, request: Request, delivery: Delivery) -> None:
        super().__init__(model, request, delivery)
        self._delivery = delivery
        self._encoder = open_encoder(
            delivery.format, source_rate=self._rate, sample_rate=delivery.sample_rate, bitrate=delivery.bitrate
        )

    @property
    def media_type(self) -> str:
        return self._encoder.settings.format.mime

    @property
    def sample_rate(self) -> int:
        """Of what leaves, in Hz."""
        return self._encoder.settings.rate

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The file, piece by piece, as it is made. Closing it early cancels what still runs in the engine.

        Raises what `EngineClient.submit` raises.
        """
        async with aclosing(self.samples()) as sound:
            async for samples in sound:
                data = self._encoder.push(samples)
                if data:
                    yield data
        data = self._encoder.finish()
        if data:
            yield data

    async def whole(self) -> bytes:
        """The file at once, its length in its header. Raises what `chunks` raises."""
        async with aclosing(self.samples()) as sound:
            pieces = [np.zeros(0, np.float32), *[samples async for samples in sound]]
        d = self._delivery
        return encode_whole(
            np.concatenate(pieces), d.format, source_rate=self._rate, sample_rate=d.sample_rate, bitrate=d.bitrate
        )
