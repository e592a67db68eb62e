"""The records of answers with speech and about voices. The requests are in `requests.py`."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class InputTokenDetails(Struct):
    cached_tokens: int  # whose KV was found in the cache


class SpeechUsage(Struct):
    """Positions of the prompt (of its first part), and frames spoken."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_token_details: InputTokenDetails


class SpeechAudioDelta(Struct):
    """An event of a stream: the next bytes of the sound file."""

    audio: bytes  # base64 on the wire
    type: Literal["speech.audio.delta"] = "speech.audio.delta"


class SpeechAudioDone(Struct):
    """The last event of a stream. `finish_reason` is length if the speech had to be cut."""

    usage: SpeechUsage
    request_id: str
    finish_reason: str
    sample_rate: int  # Hz
    duration: float  # seconds
    type: Literal["speech.audio.done"] = "speech.audio.done"


class SpeechError(Struct):
    """What a stream or a socket says of a failure."""

    message: str
    code: str | None
    param: str | None
    type: Literal["error"] = "error"


class AudioVoice(Struct):
    id: str
    created_at: int
    name: str
    ref_text: str
    speaker_description: str
    duration: float  # seconds of its recordings
    object: Literal["audio.voice"] = "audio.voice"
    type: Literal["audio_sample"] = "audio_sample"


class AudioVoiceList(Struct):
    """`voices` are the names that requests may give."""

    data: list[AudioVoice]
    voices: list[str]
    has_more: bool = False
    object: Literal["list"] = "list"


class AudioVoiceDeleted(Struct):
    id: str
    deleted: bool = True
    object: Literal["audio.voice.deleted"] = "audio.voice.deleted"


# What a speech socket says


class SessionConfigured(Struct):
    model: str
    voice: str
    format: str
    sample_rate: int
    type: Literal["session.configured"] = "session.configured"


class AudioStart(Struct):
    """Binary frames follow, all of this sentence."""

    utterance_index: int
    sentence_index: int
    sentence_text: str
    format: str
    sample_rate: int
    type: Literal["audio.start"] = "audio.start"


class AudioDone(Struct):
    """The sentence is whole, or has failed."""

    utterance_index: int
    sentence_index: int
    total_bytes: int
    duration: float
    usage: SpeechUsage
    error: bool
    type: Literal["audio.done"] = "audio.done"


class InputCommitted(Struct):
    """`input.done` was read: what follows is another utterance."""

    utterance_index: int
    type: Literal["input.committed"] = "input.committed"


class SessionDone(Struct):
    """All of the utterance has been spoken. The socket stays open, unless `session.close` was read."""

    utterance_index: int
    total_sentences: int
    type: Literal["session.done"] = "session.done"
