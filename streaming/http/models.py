"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from streaming.http.schema import ModelCard, ModelList
from streaming.http.served import ServedModel, ServedVoice, find_any


async def list_models(request: Request) -> Response:
    cards = [_card(model) for model in request.app.state.models.values()]
    return Response(msgspec.json.encode(ModelList(cards)), media_type="application/json")


async def show_model(request: Request) -> Response:
    model = find_any(request.app.state.models, request.path_params["id"])
    return Response(msgspec.json.encode(_card(model)), media_type="application/json")


def _card(model: ServedModel | ServedVoice) -> ModelCard:
    return ModelCard(model.name, model.created, model.max_context)
