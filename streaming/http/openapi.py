"""The description of the API: /openapi.json, and a page for people at /docs that needs nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from audio.formats import FORMATS
from streaming.http import requests, schema
from streaming.http.speech import requests as speech_requests
from streaming.http.speech import schema as speech_schema

_REF = "#/components/schemas/"
_REQUESTS: tuple[type[BaseModel], ...] = (
    requests.ChatRequest,
    requests.CompletionRequest,
    requests.TokenizeRequest,
    requests.DetokenizeRequest,
    speech_requests.SpeechRequest,
    speech_requests.VoiceForm,
)
_ANSWERS: tuple[type[msgspec.Struct], ...] = (
    schema.ChatCompletion,
    schema.ChatCompletionChunk,
    schema.Completion,
    schema.ModelCard,
    schema.ModelList,
    schema.Tokenized,
    schema.Detokenized,
    schema.Health,
    schema.ErrorBody,
    speech_schema.SpeechAudioDelta,
    speech_schema.SpeechAudioDone,
    speech_schema.SpeechError,
    speech_schema.AudioVoice,
    speech_schema.AudioVoiceList,
    speech_schema.AudioVoiceDeleted,
)
_ERRORS = {
    400: "The request is wrong; the message says what, and what would be right.",
    401: "The server has an API key and the request does not carry it.",
    404: "No such model or voice; the message lists those that there are.",
    409: "The name is taken, or there are as many as there may be.",
    413: "The body is larger than the server allows.",
    415: "The body is of a type that is not read here.",
    500: "The server or the engine failed.",
    503: "The queue is full, or the engine is being restarted: try again after `Retry-After` seconds.",
}


def body_of(kind: type[BaseModel], media_type: str = "application/json") -> dict[str, Any]:
    """For a route's `openapi_extra`: the route reads a body of this kind."""
    content = {media_type: {"schema": {"$ref": _REF + kind.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


def answers(
    kind: type[msgspec.Struct], *errors: int, chunks: type[msgspec.Struct] | None = None
) -> dict[int | str, Any]:
    """For a route's `responses`: a 200 of this kind, or a stream of `chunks`, and the errors it may give."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF + kind.__name__}}}
    text = "The answer."
    if chunks is not None:
        text += f" With `stream`: events that hold a `{chunks.__name__}`, or at worst an `ErrorBody`, then `[DONE]`."
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"description": text, "content": content}, **_errors(errors)}


def sound_answers(*errors: int) -> dict[int | str, Any]:
    """The same for a 200 of sound, or of the events of a speech."""
    sound: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
    content = {kind.mime: sound for kind in FORMATS.values()}
    content["text/event-stream"] = {"schema": {"type": "string"}}
    text = (
        "The sound, sent while it is made. With `stream_format` sse: events that hold a `SpeechAudioDelta`, and at the "
        "end one with a `SpeechAudioDone` or a `SpeechError`."
    )
    return {200: {"description": text, "content": content}, **_errors(errors)}


def _errors(statuses: Iterable[int]) -> dict[int | str, Any]:
    described: dict[int | str, Any] = {}
    error = {"application/json": {"schema": {"$ref": _REF + schema.ErrorBody.__name__}}}
    for status in statuses:
        described[status] = {"description": _ERRORS[status], "content": error}
        if status == 503:
            described[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return described


def describe(app: FastAPI, *, with_key: bool) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's paths with our own records."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(kind, "validation") for kind in _REQUESTS], ref_template=_REF + "{model}")
    _, results = msgspec.json.schema_components(_ANSWERS, ref_template=_REF + "{name}")
    document["components"] = {"schemas": {**bodies["$defs"], **results}}
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own checks, which no route here uses
    if with_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


async def docs(request: Request) -> Response:
    document = request.app.openapi()
    rows = [
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td><td>{_body_link(operation)}</td></tr>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    fields = [_fields(kind.__name__, document["components"]["schemas"][kind.__name__]) for kind in _REQUESTS]
    return HTMLResponse(_PAGE.format(title=html.escape(request.app.title), rows="".join(rows), fields="".join(fields)))


def _body_link(operation: dict[str, Any]) -> str:
    if "requestBody" not in operation:
        return ""
    (content,) = operation["requestBody"]["content"].values()
    name = content["schema"]["$ref"].removeprefix(_REF)
    return f'<a href="#{name}">{name}</a>'


def _fields(name: str, record: dict[str, Any]) -> str:
    required = record.get("required", [])
    rows = [
        f"<tr><td><code>{html.escape(field)}</code></td><td>{'required' if field in required else ''}</td>"
        f"<td>{html.escape(_type(about))}</td><td>{html.escape(about.get('description', ''))}</td></tr>"
        for field, about in record["properties"].items()
    ]
    return f'<h2 id="{name}">{name}</h2><table>{"".join(rows)}</table>'


def _type(about: dict[str, Any]) -> str:
    if "anyOf" in about:
        return " or ".join(dict.fromkeys(_type(one) for one in about["anyOf"] if one.get("type") != "null"))
    if "$ref" in about:
        return str(about["$ref"].removeprefix(_REF))
    if about.get("type") == "array":
        return f"array of {_type(about['items'])}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join(
        [str(about.get("type", "any")), *(f"{sign} {about[key]}" for key, sign in limits.items() if key in about)]
    )


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}
td{{padding:.2em 1em .2em 0;vertical-align:top}}
table{{border-collapse:collapse}}tr{{border-bottom:1px solid #8884}}</style>
<h1>{title}</h1>
<p>Machine-readable: <a href="openapi.json">openapi.json</a>. Any OpenAI client works against this server.</p>
<table>{rows}</table>{fields}</html>
"""
