"""A speech whose text comes in pieces: one file, each piece spoken with those before it in mind.

The engine is asked once for each piece. What was spoken before goes along as the beginning of its prompt, whose KV the
engine still has.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from ar_core.request import Request
from audio.effects import Effects
from audio.formats import open_encoder
from audio.voices import Reference
from modalities.speech.model import Said, SpeechOptions
from modalities.speech.split import split
from streaming.speech.synthesis import Delivery, Speech

if TYPE_CHECKING:
    from streaming.http.served import ServedVoice

_SEED_STRIDE = 0x632BE59BD9B4E019  # between the seeds of pieces


class Utterance:
    """Take the bytes of `speak` for each piece, one after the other, then those of `finish`: all of them are the file.

    The figures add up over the pieces that have ended. Raises AudioError for a delivery that cannot be.
    """

    def __init__(
        self,
        model: ServedVoice,
        utterance_id: str,
        references: Sequence[Reference],
        options: SpeechOptions,
        delivery: Delivery,
    ) -> None:
        self.id = utterance_id
        self.frames = 0
        self.seconds = 0.0  # of sound, effects included
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._model = model
        self._references = list(references)
        self._options = options
        self._delivery = delivery
        rate = model.speech.sample_rate
        Effects(rate, speed=delivery.speed, volume=delivery.volume)  # or it would be told at the first piece only
        self._encoder = open_encoder(
            delivery.format, source_rate=rate, sample_rate=delivery.sample_rate, bitrate=delivery.bitrate
        )
        self._numbers = count()
        self._said: list[Said] = []

    @property
    def media_type(self) -> str:
        return self._encoder.settings.format.mime

    @property
    def sample_rate(self) -> int:
        """Of what leaves, in Hz."""
        return self._encoder.settings.rate

    async def speak(self, text: str) -> AsyncGenerator[bytes, None]:
        """What a piece of text adds to the file, as it is made; nothing where there is nothing to speak.

        Codecs and muxers hold some milliseconds back until more comes, or until `finish`. Closing this early cancels
        what still runs in the engine; the next piece is then spoken as if this one had not been. Raises RequestError
        and what `EngineClient.submit` raises.
        """
        parts = split(text, self._options.part_bytes)
        if not parts:
            return
        request = await asyncio.to_thread(self._request, text)  # a voice may have long transcripts
        speech = Speech(self._model, request, self._delivery)
        try:
            async with aclosing(speech.samples()) as sound:
                async for samples in sound:
                    data = self._encoder.push(samples)
                    if data:
                        yield data
        finally:
            self._count(speech)
        if self._options.remember:
            # Word for word what was asked, so that the engine finds it in its cache.
            self._remember(parts[0] if len(parts) == 1 else text, speech.rows)

    def finish(self) -> bytes:
        """The end of the file, perhaps nothing. Nothing may be spoken afterwards."""
        return self._encoder.finish()

    def _count(self, speech: Speech) -> None:
        self.frames += speech.frames
        self.seconds += speech.seconds
        self.prompt_tokens += speech.prompt_tokens
        self.cached_tokens += speech.cached_tokens

    def _request(self, text: str) -> Request:
        number = next(self._numbers)
        options = self._options
        if number:
            # Who has been heard goes on before anybody of the same priority begins.
            options = replace(options, priority=options.priority - 1)
            if options.seed is not None:
                options = replace(options, seed=(options.seed + number * _SEED_STRIDE) % 2**63)
        return self._model.speech.request(f"{self.id}-{number}", text, self._references, options, self._said)

    def _remember(self, text: str, rows: Sequence[Sequence[int]]) -> None:
        if rows:
            self._said.append(Said(text, np.array(rows, dtype=np.int64)))
        # What has no room in any prompt is forgotten.
        while sum(len(said.rows) for said in self._said) > self._model.max_context:
            del self._said[0]
