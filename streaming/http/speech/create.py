"""POST /v1/audio/speech: a text in, sound out while it is made."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from streaming.http.body import parse_body
from streaming.http.connection import while_connected
from streaming.http.errors import ApiError
from streaming.http.speech.requests import SpeechRequest
from streaming.http.speech.schema import SpeechAudioDelta, SpeechAudioDone, SpeechError
from streaming.http.speech.speaking import ignored_fields, speaking, usage_of
from streaming.http.sse import HEADERS, event
from streaming.http.streamed import Streamed
from streaming.speech.synthesis import Synthesis

_LENGTH_IN_HEADER = ("wav", "flac")


async def create_speech(request: Request) -> Response:
    body = await parse_body(request, SpeechRequest)
    synthesis = await while_connected(request.receive, _prepare(request, body))
    headers = _headers(body, synthesis)
    if body.stream_format == "sse":
        return SpeechEvents(_events(synthesis), media_type="text/event-stream", headers={**HEADERS, **headers})
    if body.response_format in _LENGTH_IN_HEADER and not body.stream:
        sound = await while_connected(request.receive, synthesis.whole())
        headers |= _prompt_headers(synthesis) | _final_headers(synthesis)
        return Response(sound, headers=headers, media_type=synthesis.media_type)
    return Streamed(
        synthesis.chunks(),
        media_type=synthesis.media_type,
        headers=headers,
        late_headers=lambda: _prompt_headers(synthesis),
    )


class SpeechEvents(Streamed):
    """The events of one speech; the last says what it took, or what went wrong."""

    def ending(self, error: ApiError | None) -> bytes | None:
        return b"" if error is None else event(SpeechError(error.message, error.code, error.param))


async def _prepare(request: Request, body: SpeechRequest) -> Synthesis:
    state = request.app.state
    how = await speaking(body, body.response_format, state.models, state.reference_folder)
    return await how.synthesis(f"speech-{secrets.token_hex(16)}", body.input)


async def _events(synthesis: Synthesis) -> AsyncGenerator[bytes, None]:
    async with aclosing(synthesis.chunks()) as chunks:
        async for chunk in chunks:
            yield event(SpeechAudioDelta(chunk))
    yield event(
        SpeechAudioDone(
            usage_of(synthesis),
            synthesis.request.id,
            str(synthesis.finish),
            synthesis.sample_rate,
            round(synthesis.seconds, 3),
        )
    )


def _headers(body: SpeechRequest, synthesis: Synthesis) -> dict[str, str]:
    headers = {
        "X-Request-Id": synthesis.request.id,
        "X-Sample-Rate": str(synthesis.sample_rate),
        "X-Channels": "1",
    }
    if body.response_format == "pcm":
        headers["X-Bit-Depth"] = "16"
    if ignored := ignored_fields(body):
        headers["X-Triptych-Ignored"] = ", ".join(ignored)
    return headers


def _prompt_headers(synthesis: Synthesis) -> dict[str, str]:
    return {"X-Prompt-Tokens": str(synthesis.prompt_tokens), "X-Cached-Tokens": str(synthesis.cached_tokens)}


def _final_headers(synthesis: Synthesis) -> dict[str, str]:
    return {
        "X-New-Tokens": str(synthesis.frames),
        "X-Audio-Seconds": f"{synthesis.seconds:.3f}",
        "X-Finish-Reason": str(synthesis.finish),
    }
