"""POST /v1/tts: a text in, sound out while it is made."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from streaming.http.connection import while_connected
from streaming.http.fields import checked, decoded, is_form, read_fields
from streaming.http.fish.answers import IGNORED
from streaming.http.fish.requests import SpeechRequest, ignored
from streaming.http.fish.voice import model_for, references_of
from streaming.http.served import ServedVoice
from streaming.http.streamed import Streamed
from streaming.speech.synthesis import Synthesis

_LISTS = frozenset({"references", "reference_texts", "reference_id", "features"})


async def text_to_speech(request: Request) -> Response:
    fields = await read_fields(request, _LISTS)
    form = is_form(request)
    if form:
        fields = _of_form(fields)
    body = checked(SpeechRequest, fields, strict=not form)
    model = model_for(request.app.state.models, request.headers.get("model"))
    synthesis = await while_connected(request.receive, _prepared(model, body))
    headers = {"X-Request-Id": synthesis.request.id, "X-Sample-Rate": str(synthesis.sample_rate)}
    names = ignored(body, fields)
    if names:
        headers[IGNORED] = ", ".join(names)
    if body.streaming is False:
        sound = await while_connected(request.receive, synthesis.whole())
        return Response(sound, headers={**headers, **_figures(synthesis)}, media_type=synthesis.media_type)
    chunks = synthesis.chunks()
    # Up to here an error still gets a status of its own.
    first = await while_connected(request.receive, anext(chunks, b""))
    headers |= {"X-Prompt-Tokens": str(synthesis.prompt_tokens), "X-Cached-Tokens": str(synthesis.cached_tokens)}
    return Streamed(_all(first, chunks), media_type=synthesis.media_type, headers=headers)


async def _prepared(model: ServedVoice, body: SpeechRequest) -> Synthesis:
    options, delivery = body.options(), body.delivery()
    voice = await references_of(model, body)
    speech_id = f"tts-{secrets.token_hex(16)}"
    asked = await asyncio.to_thread(model.speech.request, speech_id, body.text, voice, options)
    return Synthesis(model, asked, delivery)


async def _all(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _figures(synthesis: Synthesis) -> dict[str, str]:
    return {
        "X-Prompt-Tokens": str(synthesis.prompt_tokens),
        "X-Cached-Tokens": str(synthesis.cached_tokens),
        "X-New-Tokens": str(synthesis.frames),
        "X-Audio-Seconds": f"{synthesis.seconds:.3f}",
    }


def _of_form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A form's fields as the other encodings have them. Objects are JSON; recordings are files, with texts beside them.

    Raises ApiError for what is no JSON.
    """
    shaped = {name: value for name, value in fields.items() if name != "reference_texts"}
    if isinstance(shaped.get("prosody"), str):
        shaped["prosody"] = decoded(shaped["prosody"].encode(), msgspec.json.decode, "prosody", "JSON")
    names = shaped.get("reference_id")
    if names is not None:
        shaped["reference_id"] = names[0] if len(names) == 1 else names
    sounds = shaped.get("references")
    if sounds is not None:
        texts = [*fields.get("reference_texts", ()), *[""] * len(sounds)]
        shaped["references"] = [{"audio": sound, "text": text} for sound, text in zip(sounds, texts)]
    return shaped
