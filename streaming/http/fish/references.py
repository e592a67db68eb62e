"""/v1/references/*: the voice library as the self-hosted server has it."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from streaming.http.connection import while_connected
from streaming.http.errors import ApiError
from streaming.http.fields import checked, is_form, read_fields
from streaming.http.fish.answers import negotiated
from streaming.http.fish.requests import NewReference, OldReference, RenamedReference
from streaming.http.fish.voice import model_for
from streaming.speech.references import References


async def add_reference(request: Request) -> Response:
    """A voice of one recording. A name that is taken is a 409."""
    body = checked(NewReference, await read_fields(request), strict=not is_form(request))
    references = _references(request)
    voice = await while_connected(request.receive, references.add(body.id, body.audio, body.text))
    return negotiated(
        request,
        {"success": True, "message": f"voice {voice.name!r} was added", "reference_id": voice.name},
    )


async def list_references(request: Request) -> Response:
    voices = await asyncio.to_thread(_references(request).library.list)
    return negotiated(
        request, {"success": True, "reference_ids": [voice.name for voice in voices], "message": "Success"}
    )


async def delete_reference(request: Request) -> Response:
    """The name is in the body, or in the query, as some clients send no body with DELETE."""
    name = request.query_params.get("reference_id")
    if name is None:
        name = checked(OldReference, await read_fields(request), strict=not is_form(request)).reference_id
    await asyncio.to_thread(_references(request).library.delete, name)
    return negotiated(request, {"success": True, "message": f"voice {name!r} was deleted", "reference_id": name})


async def rename_reference(request: Request) -> Response:
    body = checked(RenamedReference, await read_fields(request), strict=not is_form(request))
    old, new = body.old_reference_id, body.new_reference_id
    if old == new:
        raise ApiError(422, f"old_reference_id and new_reference_id are both {old!r}; choose another name")
    await asyncio.to_thread(_references(request).library.rename, old, new)
    answer = {
        "success": True,
        "message": f"voice {old!r} is now called {new!r}",
        "old_reference_id": old,
        "new_reference_id": new,
    }
    return negotiated(request, answer)


def _references(request: Request) -> References:
    return model_for(request.app.state.models, request.headers.get("model")).references
