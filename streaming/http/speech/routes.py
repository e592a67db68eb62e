"""The paths of speech and voices."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.routing import WebSocketRoute

from streaming.http.openapi import answers, body_of, sound_answers
from streaming.http.speech import schema
from streaming.http.speech.create import create_speech
from streaming.http.speech.requests import SpeechRequest, VoiceForm
from streaming.http.speech.socket import speech_socket
from streaming.http.speech.voices import create_voice, delete_voice, list_voices, show_voice


def add_speech_routes(app: FastAPI) -> None:
    def add(method: str, path: str, handler: Any, summary: str, **options: Any) -> None:
        app.add_api_route(path, handler, methods=[method], summary=summary, response_model=None, **options)

    add(
        "POST",
        "/v1/audio/speech",
        create_speech,
        "Speak a text",
        responses=sound_answers(400, 401, 404, 413, 500, 503),
        openapi_extra=body_of(SpeechRequest),
    )
    model = {"name": "model", "in": "query", "required": False, "schema": {"type": "string"}}
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    voices = "/v1/audio/voices"
    add(
        "POST",
        voices,
        create_voice,
        "Make a voice of a recording",
        responses=answers(schema.AudioVoice, 400, 401, 404, 409, 413, 415, 500, 503),
        openapi_extra=body_of(VoiceForm, "multipart/form-data"),
    )
    add(
        "GET",
        voices,
        list_voices,
        "The voices there are",
        responses=answers(schema.AudioVoiceList, 400, 401, 404),
        openapi_extra={"parameters": [model]},
    )
    add(
        "GET",
        f"{voices}/{{id}}",
        show_voice,
        "One voice",
        responses=answers(schema.AudioVoice, 400, 401, 404),
        openapi_extra={"parameters": [name, model]},
    )
    add(
        "DELETE",
        f"{voices}/{{id}}",
        delete_voice,
        "Delete a voice",
        responses=answers(schema.AudioVoiceDeleted, 400, 401, 404),
        openapi_extra={"parameters": [name, model]},
    )
    app.routes.append(WebSocketRoute("/v1/audio/speech/stream", speech_socket))
