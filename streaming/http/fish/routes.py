"""The APIs of Fish Audio's cloud and of its self-hosted server: which function answers which path."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute

from streaming.http.fish import models, references, vqgan
from streaming.http.fish.answers import fish, json, self_hosted
from streaming.http.fish.live import live
from streaming.http.fish.tts import text_to_speech


def add_fish_routes(app: FastAPI) -> None:
    """They stay out of the OpenAPI document, which is of OpenAI's shapes; docs/fish.md describes them."""
    app.add_route("/v1/tts", fish(text_to_speech), ["POST"])
    app.routes.append(WebSocketRoute("/v1/tts/live", live))
    app.add_route("/v1/health", _health, ["GET", "POST"])
    app.add_route("/model", fish(models.list_models), ["GET"])
    app.add_route("/model", fish(models.create_model), ["POST"])
    app.add_route("/model/{id}", fish(models.show_model), ["GET"])
    app.add_route("/model/{id}", fish(models.change_model), ["PATCH"])
    app.add_route("/model/{id}", fish(models.delete_model), ["DELETE"])
    app.add_route("/v1/references/add", self_hosted(references.add_reference), ["POST"])
    app.add_route("/v1/references/list", self_hosted(references.list_references), ["GET"])
    app.add_route("/v1/references/delete", self_hosted(references.delete_reference), ["DELETE"])
    app.add_route("/v1/references/update", self_hosted(references.rename_reference), ["POST"])
    app.add_route("/v1/vqgan/encode", self_hosted(vqgan.encode), ["POST"])
    app.add_route("/v1/vqgan/decode", self_hosted(vqgan.decode), ["POST"])


async def _health(_: Request) -> Response:
    return json({"status": "ok"})
