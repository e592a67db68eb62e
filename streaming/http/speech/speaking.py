"""From a request's fields to a model, a voice and options: all that a text needs to be spoken."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from audio.errors import AudioError
from audio.formats.table import settle
from audio.voices import Reference, UnknownVoice
from modalities.speech.model import Said, SpeechOptions
from streaming.http.errors import ApiError, bad_request, unsupported
from streaming.http.served import Models, ServedVoice, default_voice, find_voice
from streaming.http.speech.reference_sound import sound_in, sound_of
from streaming.http.speech.requests import ReferenceRecording, SpeechSettings
from streaming.http.speech.schema import InputTokenDetails, SpeechUsage
from streaming.speech.synthesis import Delivery, Synthesis

IGNORED = ("language", "task_type", "initial_codec_chunk_frames")
_REFUSED = {
    "x_vector_only_mode": "a voice needs a recording and its transcript; leave it out and give ref_text",
    "word_timestamps": "there are no timestamps of words here; leave it out",
    "duration_seconds": "the model chooses how long a text takes; speed changes that",
    "speaker_embedding": "this model knows voices by recordings; give references",
}
_DEFAULTS = SpeechOptions()


@dataclass(frozen=True)
class Speaking:
    model: ServedVoice
    references: Sequence[Reference]
    options: SpeechOptions
    delivery: Delivery

    @property
    def sample_rate(self) -> int:
        """Of what leaves, in Hz."""
        return self.delivery.sample_rate or self.model.speech.sample_rate

    async def synthesis(self, speech_id: str, text: str, before: Sequence[Said] = ()) -> Synthesis:
        """Ready to be spoken. Raises RequestError for a text that cannot be."""
        ask = self.model.speech.request
        request = await asyncio.to_thread(ask, speech_id, text, self.references, self.options, before)
        return Synthesis(self.model, request, self.delivery)


async def speaking(body: SpeechSettings, format: str, models: Models, folder: Path | None) -> Speaking:
    """`folder`: whose files requests may name as recordings.

    Raises ApiError, AudioError for recordings that cannot be used, and what `EngineClient.submit` raises.
    """
    _refuse_unsupported(body)
    model = model_of(models, body.model)
    try:
        rate = settle(format, model.speech.sample_rate, body.sample_rate, None).rate
    except AudioError as error:
        raise bad_request(str(error), "sample_rate") from None
    delivery = Delivery(format, sample_rate=rate, speed=body.speed)
    return Speaking(model, await _references(body, model, folder), _options(body), delivery)


def model_of(models: Models, name: str | None) -> ServedVoice:
    """The speech model of that name, or the first. Raises ApiError."""
    return default_voice(models) if name is None else find_voice(models, name)


def ignored_fields(body: SpeechSettings) -> list[str]:
    return [name for name in IGNORED if getattr(body, name) is not None]


def usage_of(synthesis: Synthesis) -> SpeechUsage:
    prompt, frames = synthesis.prompt_tokens, synthesis.frames
    return SpeechUsage(prompt, frames, prompt + frames, InputTokenDetails(synthesis.cached_tokens))


def _refuse_unsupported(body: SpeechSettings) -> None:
    for name, why in _REFUSED.items():
        if getattr(body, name) not in (None, False):
            raise unsupported(f"{name} is not supported: {why}", name)


def _options(body: SpeechSettings) -> SpeechOptions:
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "repetition_penalty": body.repetition_penalty,
        "seed": body.seed,
        "max_frames": body.max_new_tokens,
        "style": body.instructions,
        "latency": body.latency,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
    }
    return replace(_DEFAULTS, **{name: value for name, value in given.items() if value is not None})


async def _references(body: SpeechSettings, model: ServedVoice, folder: Path | None) -> list[Reference]:
    own = bool(body.references) or body.ref_audio is not None
    if body.voice_name and own:
        raise bad_request("voice names one voice and references bring another; give one of them", "voice")
    if body.ref_text is not None and body.ref_audio is None:
        raise bad_request("ref_text is given without ref_audio, whose words it says", "ref_text")
    if body.voice_name:
        return await _named(body.voice_name, model)
    references = [
        await _reference(one, f"references[{i}]", model, folder) for i, one in enumerate(body.references or ())
    ]
    if body.ref_audio is not None:
        if not (body.ref_text or "").strip():
            raise bad_request(
                "ref_audio needs ref_text, what is said in it: there is no speech recognition here", "ref_text"
            )
        sound = await asyncio.to_thread(sound_of, body.ref_audio, "ref_audio", folder)
        references.append(await model.references.recorded(sound, body.ref_text or ""))
    return references


async def _named(name: str, model: ServedVoice) -> list[Reference]:
    try:
        return await asyncio.to_thread(model.references.named, name)
    except UnknownVoice as error:
        message = f'{error}; and "default", the model\'s own'
        raise ApiError(404, message, param="voice", code="voice_not_found") from None


async def _reference(one: ReferenceRecording, param: str, model: ServedVoice, folder: Path | None) -> Reference:
    if [one.audio, one.audio_path, one.vq_codes].count(None) != 2:
        raise bad_request(f"{param} must have one of audio, audio_path and vq_codes", param)
    if not one.text.strip():
        raise bad_request(f"{param} needs its text, what is said in it", f"{param}.text")
    if one.vq_codes is not None:
        return Reference(_codes(one.vq_codes, f"{param}.vq_codes", model), one.text)
    if one.audio is not None:
        sound = await asyncio.to_thread(sound_of, one.audio, f"{param}.audio", folder)
    else:
        sound = await asyncio.to_thread(sound_in, one.audio_path or "", f"{param}.audio_path", folder)
    return await model.references.recorded(sound, one.text)


def _codes(rows: list[list[int]], param: str, model: ServedVoice) -> np.ndarray:
    """int32 [K, T]."""
    books = model.speech.codec.num_codebooks
    lengths = sorted({len(row) for row in rows})
    if len(rows) != books or len(lengths) != 1:
        shape = f"{len(rows)} rows of {' or '.join(map(str, lengths[:3]))} codes"
        raise bad_request(f"{param} has {shape}; it must have {books} rows, equally long", param)
    return np.array(rows, dtype=np.int32)
