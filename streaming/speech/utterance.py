"""A speech whose text comes in pieces: one file, each piece spoken with those before it in mind.

The engine is asked once for each piece. What was spoken before goes along as the beginning of its prompt, whose KV the
engine still has.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from ar_core.request import Frames, Request, Tokens
from audio.effects import Effects
from audio.formats import open_encoder
from audio.voices import Reference
from modalities.speech.model import SpeechOptions
from modalities.speech.prompt import Reference as PromptReference
from modalities.speech.segments import Prompt, Turn
from modalities.speech.split import split
from streaming.speech.synthesis import Delivery, Speech

if TYPE_CHECKING:
    from streaming.http.served import ServedVoice

_SEED_STRIDE = 0x632BE59BD9B4E019  # between the seeds of pieces


@dataclass(frozen=True, slots=True)
class _Spoken:
    """A turn that is over, as later prompts hold it."""

    segments: Prompt
    positions: int


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
        self._references = [PromptReference(r.text, r.codes) for r in references]
        self._options = options
        self._delivery = delivery
        rate = model.speech.sample_rate
        Effects(rate, speed=delivery.speed, volume=delivery.volume)  # or it would be told at the first piece only
        self._encoder = open_encoder(
            delivery.format, source_rate=rate, sample_rate=delivery.sample_rate, bitrate=delivery.bitrate
        )
        self._numbers = count()
        self._past: list[_Spoken] = []

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
        if not split(text, self._options.part_bytes):
            return
        request, turns = self._request(text)
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
            self._past += self._spoken(turns, speech.rows)

    def finish(self) -> bytes:
        """The end of the file, perhaps nothing. Nothing may be spoken afterwards."""
        return self._encoder.finish()

    def _count(self, speech: Speech) -> None:
        self.frames += speech.frames
        self.seconds += speech.seconds
        self.prompt_tokens += speech.prompt_tokens
        self.cached_tokens += speech.cached_tokens

    def _request(self, text: str) -> tuple[Request, list[Turn]]:
        number = next(self._numbers)
        options = self._options
        if number:
            # Who has been heard goes on before anybody of the same priority begins.
            options = replace(options, priority=options.priority - 1)
            if options.seed is not None:
                options = replace(options, seed=(options.seed + number * _SEED_STRIDE) % 2**63)
        asked = self._model.speech.request(f"{self.id}-{number}", text, self._references, options)
        turns = [segment for segment in asked.segments if isinstance(segment, Turn)]
        system = [segment for segment in asked.segments if not isinstance(segment, Turn)]
        self._forget(_positions(system) + sum(map(_most_positions, turns)))
        past = [segment for spoken in self._past for segment in spoken.segments]
        return replace(asked, segments=[*system, *past, *turns]), turns

    def _forget(self, needed: int) -> None:
        """Drop the oldest turns until `needed` positions find room in the context."""
        while self._past and needed + sum(spoken.positions for spoken in self._past) > self._model.max_context:
            del self._past[0]

    def _spoken(self, turns: Sequence[Turn], rows: Sequence[Sequence[int]]) -> list[_Spoken]:
        """Emitted rows by turn: one ends with a row that is no frame, or when it is as long as it may be."""
        spoken, at = [], 0
        emitted = np.array(rows, dtype=np.int64)
        is_frame = self._model.speech.tokenizer.is_frame(emitted) if len(emitted) else np.zeros(0, bool)
        for turn in turns:
            start = at
            while at < len(emitted) and is_frame[at] and at - start < turn.max_frames:
                at += 1
            frames = [Frames(emitted[start:at])] if at > start else []
            at += at < len(emitted) and at - start < turn.max_frames
            segments = (*turn.opening, *frames, *turn.closing)
            spoken.append(_Spoken(segments, _positions(segments)))
        return spoken


def _positions(segments: Sequence[Tokens | Frames]) -> int:
    return sum(len(segment.ids) if isinstance(segment, Tokens) else len(segment.rows) for segment in segments)


def _most_positions(turn: Turn) -> int:
    return _positions(turn.opening) + turn.max_frames + _positions(turn.closing)
