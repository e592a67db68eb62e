"""In which model and voice a request of Fish's is spoken."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from audio.voices import Reference
from modalities.speech.tokenizer import SPEAKER_TAG
from streaming.http.fish.requests import ReferenceSound, SpeechRequest, speaker_list
from streaming.http.served import Models, ServedVoice, default_voice


def model_for(models: Models, header: str | None) -> ServedVoice:
    """The speech model that the header `model` names, else the first one: clients send names of the cloud's models.

    Raises ApiError if no speech model is served.
    """
    named = models.get(header or "")
    return named if isinstance(named, ServedVoice) else default_voice(models)


async def references_of(model: ServedVoice, body: SpeechRequest) -> list[Reference]:
    """The voice as references: several names, or several lists of recordings, are the speakers of a dialogue.

    Raises UnknownVoice, AudioError and what `EngineClient.submit` raises.
    """
    match body.reference_id:
        case None | "" | []:
            return await _sent_along(model, body)
        case str(name):
            return model.references.named(name)
        case names:
            voices = [model.references.named(name) for name in names]
            return [_spoken_by(i, reference) for i, voice in enumerate(voices) for reference in voice]


async def _sent_along(model: ServedVoice, body: SpeechRequest) -> list[Reference]:
    speakers = speaker_list(body)
    if speakers is not None:
        encoded = await asyncio.gather(*(_recorded(model, recordings) for recordings in speakers))
        return [_spoken_by(i, reference) for i, recordings in enumerate(encoded) for reference in recordings]
    return await _recorded(model, [entry for entry in body.references or [] if isinstance(entry, ReferenceSound)])


async def _recorded(model: ServedVoice, recordings: list[ReferenceSound]) -> list[Reference]:
    return list(await asyncio.gather(*(model.references.recorded(sound.audio, sound.text) for sound in recordings)))


def _spoken_by(speaker: int, reference: Reference) -> Reference:
    """The transcript says who speaks, whatever it said before."""
    return replace(reference, text=f"<|speaker:{speaker}|>{SPEAKER_TAG.sub('', reference.text)}")
