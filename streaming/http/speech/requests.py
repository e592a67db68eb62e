"""The bodies that ask for speech and for voices, as OpenAI's clients and those of the neighbours send them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from modalities.speech.chunks import Latency
from streaming.http.requests import Body
from streaming.speech.references import DEFAULT_VOICE

MAX_INPUT = 1 << 16
_INT64 = 2**63
_Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_Codes = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]

SoundFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


class VoiceId(Body):
    id: str


class ReferenceRecording(Body):
    """A recording of the voice. Give `audio`, `audio_path` or `vq_codes`."""

    text: str = Field(description="What is said in it.")
    audio: str | None = Field(
        None,
        validation_alias=AliasChoices("audio", "ref_audio", "data"),
        description="A sound file as base64, or as a data: URL.",
    )
    audio_path: str | None = Field(None, description="A file in the folder that the server's operator allows.")
    vq_codes: Annotated[list[_Codes], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="The recording as the codec's codes, [codebooks][frames]."
    )


class SpeechSettings(Body):
    """How something is spoken: of one request, or of a session of many."""

    model: str | None = Field(None, description="One of the names that GET /v1/models lists. Default: the first.")
    voice: str | VoiceId | None = Field(
        None, description='A voice that GET /v1/audio/voices lists; "default": the model\'s own.'
    )
    speed: float = Field(1.0, ge=0.25, le=4)
    instructions: str | None = Field(
        None, max_length=4096, description="How it is said: the model reads this in brackets before the text."
    )
    references: Annotated[list[ReferenceRecording], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="Recordings of a voice that the server does not know."
    )
    ref_audio: str | None = Field(None, description="One such recording: base64 or a data: URL.")
    ref_text: str | None = Field(None, description="What is said in ref_audio.")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 or 0: no limit.")
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    max_new_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Frames of each part of the text.")
    sample_rate: int | None = Field(
        None, ge=1, le=768_000, description="In Hz. Default: the model's, as near as can be."
    )
    latency: Latency = Field("normal", description="How soon the first sound leaves, against how many calls it takes.")
    cache_salt: str | None = Field(
        None, max_length=256, description="Only requests with equal salts share cached prefixes."
    )
    priority: _Int32 | None = Field(None, description="Of waiting requests the lowest value starts first.")
    user: str | None = None

    # Fields of neighbours that mean nothing here: taken, and named in the header X-Triptych-Ignored.
    language: str | None = Field(None, description="Ignored: the model tells it from the text.")
    task_type: str | None = Field(None, description="Ignored: the model has one task.")
    initial_codec_chunk_frames: int | None = Field(None, description="Ignored: latency says it.")
    # And those that would mean something, which cannot be had.
    x_vector_only_mode: bool | None = Field(None, description="Refused if true: a voice needs its transcript.")
    word_timestamps: bool | None = Field(None, description="Refused if true.")
    duration_seconds: float | None = Field(None, description="Refused: the model chooses the length.")
    speaker_embedding: list[float] | None = Field(None, description="Refused: give references.")

    @property
    def voice_name(self) -> str:
        """Empty: no voice is named."""
        name = self.voice.id if isinstance(self.voice, VoiceId) else self.voice
        return "" if name in (None, DEFAULT_VOICE) else str(name)


class SpeechRequest(SpeechSettings):
    input: str = Field(max_length=MAX_INPUT, description="What is spoken; [whisper] and the like say how.")
    response_format: SoundFormat = "mp3"
    stream_format: Literal["audio", "sse"] = Field("audio", description="sse: events with the sound as base64.")
    stream: bool | None = Field(
        None, description="Matters to wav and flac: whole with their length if false, at once with none if true."
    )


class SessionConfig(SpeechSettings):
    """The first message of a speech socket."""

    type: Literal["session.config"]
    response_format: SoundFormat = "pcm"
    stream_audio: bool = Field(True, description="False: a sentence comes as one frame.")
    split_granularity: Literal["none", "sentence", "clause"] = Field(
        "sentence",
        description="What is spoken as one; a clause is not cut off its sentence. none: all up to input.done.",
    )


class VoiceForm(Body):
    """The fields of a form that makes a voice."""

    name: str
    audio_sample: bytes = Field(description="A sound file of 1 to 60 seconds and at most 10 MiB.")
    ref_text: str = Field(min_length=1, description="What is said in it, word for word.")
    speaker_description: str = Field("", max_length=1000)
    consent: str | None = Field(None, description="Ignored: who runs the server answers for its voices.")
    type: str | None = Field(None, description='"audio_sample" is what is supported.')
    model: str | None = Field(None, description="The speech model that the voice is for. Default: the first.")
