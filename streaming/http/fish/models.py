"""/model: the voice library as the cloud has it. A voice's id is its name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from audio.voices import Voice
from streaming.http.connection import while_connected
from streaming.http.errors import ApiError, shown
from streaming.http.fields import checked, is_form, read_fields
from streaming.http.fish.answers import IGNORED, json
from streaming.http.fish.requests import ChangedModel, NewModel, required_texts
from streaming.http.fish.voice import model_for
from streaming.speech.references import References

_LISTS = frozenset({"voices", "texts", "tags"})
_FILTERS = ("tag", "language", "title_language", "author_id")  # of which no voice here has any
_MOST_PER_PAGE = 1000


async def list_models(request: Request) -> Response:
    """The newest first, as `sort_by=created_at` asks for; other orders are by what is not counted here."""
    query = request.query_params
    size = _number(query.get("page_size", "10"), "page_size", 1, _MOST_PER_PAGE)
    page = _number(query.get("page_number", "1"), "page_number", 1, 1 << 31)
    voices = await asyncio.to_thread(_references(request).library.list)
    voices.sort(key=lambda voice: -voice.created_at)
    title = query.get("title", "").casefold()
    found = [voice for voice in voices if title in voice.name.casefold()]
    if any(query.get(name) for name in _FILTERS):
        found = []
    shown_here = found[(page - 1) * size : page * size]
    return json({"total": len(found), "items": [_entity(voice) for voice in shown_here]})


async def create_model(request: Request) -> Response:
    fields = await read_fields(request, _LISTS)
    body = checked(NewModel, fields, strict=not is_form(request))
    texts = required_texts(body)
    voice = await while_connected(request.receive, _made(_references(request), body, texts))
    return json(_entity(voice), 201, _ignoring(fields))


async def show_model(request: Request) -> Response:
    return json(_entity(await asyncio.to_thread(_references(request).library.get, request.path_params["id"])))


async def change_model(request: Request) -> Response:
    fields = await read_fields(request, _LISTS)
    body = checked(ChangedModel, fields, strict=not is_form(request))
    library, name = _references(request).library, request.path_params["id"]
    voice = await asyncio.to_thread(library.get, name)
    if body.description is not None and body.description != voice.description:
        voice = await asyncio.to_thread(library.describe, name, body.description)
    if body.title is not None and body.title != name:
        voice = await asyncio.to_thread(library.rename, name, body.title)
    return json(_entity(voice), 200, _ignoring(fields))


async def delete_model(request: Request) -> Response:
    await asyncio.to_thread(_references(request).library.delete, request.path_params["id"])
    return Response(status_code=204)


async def _made(references: References, body: NewModel, texts: Sequence[str]) -> Voice:
    recordings = [references.recorded(sound, text) for sound, text in zip(body.voices, texts)]
    return await references.keep(body.title, await asyncio.gather(*recordings), body.description)


def _ignoring(fields: dict[str, Any]) -> dict[str, str]:
    ignored = [name for name in ("visibility", "tags", "cover_image", "enhance_audio_quality") if fields.get(name)]
    return {IGNORED: ", ".join(ignored)} if ignored else {}


def _entity(voice: Voice) -> dict[str, Any]:
    """The cloud's record; what is not known here is empty. Recordings are kept as codes, so samples have no audio."""
    created = datetime.fromtimestamp(voice.created_at, UTC).isoformat()
    samples = [
        {"title": f"Recording {number}", "text": reference.text, "task_id": "", "audio": ""}
        for number, reference in enumerate(voice.references, 1)
    ]
    return {
        "_id": voice.name,
        "type": "tts",
        "title": voice.name,
        "description": voice.description,
        "cover_image": "",
        "train_mode": "fast",
        "state": "trained",
        "tags": [],
        "samples": samples,
        "created_at": created,
        "updated_at": created,
        "languages": [],
        "visibility": "private",
        "lock_visibility": True,
        "like_count": 0,
        "mark_count": 0,
        "shared_count": 0,
        "task_count": 0,
        "liked": False,
        "marked": False,
        "author": {"_id": "", "nickname": "", "avatar": ""},
    }


def _number(text: str, name: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and least <= int(text) <= most):
        raise ApiError(422, f"{name} is {shown(text)}; it must be a whole number from {least} to {most}")
    return int(text)


def _references(request: Request) -> References:
    return model_for(request.app.state.models, request.headers.get("model")).references
