"""The events of the socket /v1/tts/live, as msgpack maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from streaming.http.errors import ApiError, bad_request
from streaming.http.fields import decoded
from streaming.speech.utterance import Utterance

MAX_AUDIO_BYTES = 32 << 10  # of one event: clients refuse messages that are much larger unless told otherwise
MAX_CONCURRENCY = 1  # utterances of one socket that are spoken at once; what else is started waits for its turn


def event_of(frame: bytes | None) -> dict[str, Any]:
    """A frame as it was sent, None for one of text. Raises ApiError for what is no event."""
    if frame is None:
        raise bad_request("a text frame was sent; events are msgpack maps in binary frames")
    event = decoded(frame, msgspec.msgpack.decode, "the frame", "msgpack")
    if not isinstance(event.get("event"), str):
        raise bad_request('an event has no name; it must have one as "event": start, text, flush or stop')
    return event


def text_of(event: dict[str, Any]) -> str:
    """What a `text` event says. Raises ApiError."""
    text = event.get("text")
    if not isinstance(text, str):
        raise bad_request('the event "text" has no text; it must have one as "text"', "text")
    return text


def audio(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), MAX_AUDIO_BYTES):
        yield msgspec.msgpack.encode({"event": "audio", "audio": data[at : at + MAX_AUDIO_BYTES]})


def ignored(names: list[str]) -> bytes:
    return msgspec.msgpack.encode({"event": "ignored", "fields": names})


def finish(utterance: Utterance) -> bytes:
    return msgspec.msgpack.encode(
        {
            "event": "finish",
            "reason": "stop",
            "request_id": utterance.id,
            "sample_rate": utterance.sample_rate,
            "time": round(utterance.seconds, 3),
            "prompt_tokens": utterance.prompt_tokens,
            "cached_tokens": utterance.cached_tokens,
            "new_tokens": utterance.frames,
        }
    )


def failure() -> bytes:
    return msgspec.msgpack.encode({"event": "finish", "reason": "error"})


def error(problem: ApiError) -> bytes:
    return msgspec.msgpack.encode(
        {
            "event": "error",
            "error": problem.message,
            "message": problem.message,
            "status": problem.status,
            "max_concurrency": MAX_CONCURRENCY,
        }
    )
