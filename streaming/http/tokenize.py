"""POST /v1/tokenize and /v1/detokenize: what the models' tokenisers and templates make of a text."""

from __future__ import annotations

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from streaming.http.body import parse_body
from streaming.http.errors import bad_request
from streaming.http.prompts import decode_ids, encode_text, render_messages
from streaming.http.requests import DetokenizeRequest, TokenizeRequest
from streaming.http.sampling import check_ids
from streaming.http.schema import Detokenized, Tokenized
from streaming.http.served import find_model


async def tokenize(request: Request) -> Response:
    body = await parse_body(request, TokenizeRequest)
    model = find_model(request.app.state.models, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.messages is not None:
        ids = await render_messages(model, body.messages, body)
    else:
        ids = await encode_text(model, body.prompt or "")
    strings = [model.chat.token_text(token) for token in ids] if body.return_token_strs else UNSET
    return Response(
        msgspec.json.encode(Tokenized(len(ids), model.max_context, ids, strings)), media_type="application/json"
    )


async def detokenize(request: Request) -> Response:
    body = await parse_body(request, DetokenizeRequest)
    model = find_model(request.app.state.models, body.model)
    check_ids("tokens", body.tokens, model)
    text = await decode_ids(model, body.tokens)
    return Response(msgspec.json.encode(Detokenized(text)), media_type="application/json")
