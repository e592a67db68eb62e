"""The bodies that Fish Audio's clients send: all fields of the cloud's API and of the self-hosted server's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ar_core.request import RequestError
from modalities.speech.model import SpeechOptions
from streaming.http.fields import as_bytes
from streaming.http.requests import Body
from streaming.speech.synthesis import Delivery

MAX_TEXT = 100_000  # characters
MAX_SPEAKERS = 16
MAX_REFERENCES = 32

_NO_LIMIT = 1 << 20  # frames, of which a part of a text never has so many
_LEAST_TOP_P = 1e-6  # a top_p of 0 leaves the likeliest alone, as this does
_INT64 = 2**63

Sound = Annotated[bytes, BeforeValidator(as_bytes)]
VoiceId = Annotated[str, Field(pattern=r"^[a-zA-Z0-9\-_ ]+$", min_length=1, max_length=255)]


class ReferenceSound(Body):
    audio: Sound
    text: str = Field(max_length=MAX_TEXT)


_Speaker = Annotated[list[ReferenceSound], Field(max_length=MAX_REFERENCES)]


class Prosody(Body):
    speed: float | None = Field(None, ge=0.5, le=2)
    volume: float | None = Field(None, ge=-20, le=20)
    normalize_loudness: bool | None = None


class SpeechRequest(Body):
    """What POST /v1/tts takes, and `start` on the socket. docs/fish.md says what becomes of each field."""

    text: str = Field(max_length=MAX_TEXT)
    reference_id: str | Annotated[list[str], Field(max_length=MAX_SPEAKERS)] | None = None
    references: _Speaker | Annotated[list[_Speaker], Field(max_length=MAX_SPEAKERS)] | None = None
    format: Literal["wav", "pcm", "mp3", "opus", "flac", "aac"] | None = None
    sample_rate: int | None = None
    mp3_bitrate: int | None = None
    opus_bitrate: int | None = None
    prosody: Prosody | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    max_new_tokens: int | None = Field(None, ge=0, le=2**31)
    chunk_length: int | None = Field(None, ge=100, le=1000)
    min_chunk_length: int | None = Field(None, ge=0, le=100)
    condition_on_previous_chunks: bool | None = None
    latency: Literal["low", "normal", "balanced"] | None = None
    streaming: bool | None = None
    normalize: bool | None = None
    early_stop_threshold: float | None = None
    use_memory_cache: Literal["on", "off"] | None = None
    features: list[str] | None = None

    @property
    def part_bytes(self) -> int:
        return self.chunk_length or 300

    @property
    def least_part(self) -> int:
        """Characters that the socket waits for before it begins to speak."""
        return 50 if self.min_chunk_length is None else self.min_chunk_length

    def options(self) -> SpeechOptions:
        """Raises RequestError."""
        return SpeechOptions(
            temperature=0.7 if self.temperature is None else self.temperature,
            top_p=max(0.7 if self.top_p is None else self.top_p, _LEAST_TOP_P),
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
            max_frames=1024 if self.max_new_tokens is None else self.max_new_tokens or _NO_LIMIT,
            part_bytes=self.part_bytes,
            remember=self.condition_on_previous_chunks is not False,
            latency=self.latency or "normal",
        )

    def delivery(self) -> Delivery:
        """Bitrates of other formats are left aside: clients send them all, whatever the format."""
        name = self.format or "mp3"
        bitrate = {"mp3": self.mp3_bitrate, "opus": self.opus_bitrate}.get(name)
        speed = self.prosody.speed if self.prosody else None
        volume = self.prosody.volume if self.prosody else None
        return Delivery(name, self.sample_rate, bitrate, speed or 1.0, volume or 0.0)


def ignored(body: SpeechRequest, fields: Mapping[str, Any]) -> list[str]:
    """The names of fields that ask for something that is not done. `fields` are those that were sent."""
    names = [
        *(["normalize"] if body.normalize else []),
        *(["prosody.normalize_loudness"] if body.prosody and body.prosody.normalize_loudness else []),
        *(["early_stop_threshold"] if body.early_stop_threshold not in (None, 1.0) else []),
        *(["use_memory_cache"] if body.use_memory_cache == "off" else []),
        *(["features"] if body.features else []),
        *(["references"] if body.reference_id and body.references else []),
    ]
    unknown = [name for name in fields if name not in SpeechRequest.model_fields]
    return names + [name for name in unknown if _NAME.fullmatch(name)][:_MAX_NAMES]


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # what can stand in a header
_MAX_NAMES = 20


class NewReference(Body):
    id: VoiceId
    audio: Sound
    text: str = Field(min_length=1, max_length=MAX_TEXT)


class OldReference(Body):
    reference_id: str


class RenamedReference(Body):
    old_reference_id: str
    new_reference_id: VoiceId


class NewModel(Body):
    title: str
    voices: list[Sound] = Field(min_length=1, max_length=MAX_REFERENCES)
    texts: list[str] = Field(default_factory=list)
    description: str = ""
    type: Literal["tts"] = "tts"
    train_mode: Literal["fast"] = "fast"


class ChangedModel(Body):
    title: str | None = None
    description: str | None = None


class Sounds(Body):
    audios: list[Sound] = Field(max_length=MAX_REFERENCES)


Code = Annotated[int, Field(ge=0, lt=2**31)]


class CodesOfSounds(Body):
    tokens: list[Annotated[list[list[Code]], Field(min_length=1)]] = Field(max_length=MAX_REFERENCES)


def speaker_list(body: SpeechRequest) -> list[list[ReferenceSound]] | None:
    """The references by speaker, or None where there is but one list of them."""
    nested = [entry for entry in body.references or [] if isinstance(entry, list)]
    return nested or None


def required_texts(body: NewModel) -> list[str]:
    """One transcript for each recording. Raises RequestError."""
    if len(body.texts) != len(body.voices):
        raise RequestError(
            f"texts has {len(body.texts)} transcripts and voices {len(body.voices)} recordings; there must be one "
            "transcript for each, as this server does not transcribe",
            "texts",
        )
    return body.texts
