"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from msgspec import UnsetType
from starlette.requests import Request
from starlette.responses import Response

from streaming.http.body import parse_body
from streaming.http.connection import while_connected
from streaming.http.errors import bad_request, shown, unsupported
from streaming.http.generation import Generation, Piece
from streaming.http.logprobs import PlacedLogprob, chat_logprobs
from streaming.http.prompts import render_messages
from streaming.http.requests import ChatRequest
from streaming.http.sampling import engine_requests, sampling_params
from streaming.http.schema import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    FinishName,
    Usage,
)
from streaming.http.served import ServedModel, find_model
from streaming.http.sse import EventStream, event
from streaming.http.stream_usage import StreamUsage


async def create_chat_completion(request: Request) -> Response:
    body = await parse_body(request, ChatRequest)
    model = find_model(request.app.state.models, body.model)
    usage = StreamUsage.of(body)
    answer = await _prepare(body, model)
    if body.stream:
        return EventStream(_chunks(answer, usage))
    completion = await while_connected(request.receive, _whole(answer))
    return Response(msgspec.json.encode(completion), media_type="application/json")


@dataclass(frozen=True)
class _Answer:
    id: str
    created: int
    model: ServedModel
    generation: Generation
    logprobs: bool


async def _prepare(body: ChatRequest, model: ServedModel) -> _Answer:
    _refuse_unsupported(body)
    answer_id = f"chatcmpl-{secrets.token_hex(16)}"
    wants_logprobs = bool(body.logprobs)
    logprobs = (body.top_logprobs or 0) if wants_logprobs else None
    sampling = sampling_params(body, model, body.max_completion_tokens or body.max_tokens, logprobs)
    prompt = await render_messages(model, body.messages, body)
    requests = engine_requests(answer_id, body, model, [prompt], sampling, prompt_field="messages")
    generation = Generation(model, requests, body.stop_strings, body.n or 1)
    return _Answer(answer_id, int(time.time()), model, generation, wants_logprobs)


def _refuse_unsupported(body: ChatRequest) -> None:
    if body.tools and body.tool_choice != "none":
        raise unsupported('tools are not supported yet; leave them out, or set tool_choice to "none"', "tools")
    if body.functions:
        raise unsupported("functions are not supported; leave them out", "functions")
    if body.response_format is not None and body.response_format.type != "text":
        kind = shown(body.response_format.type)
        raise unsupported(f'response_format.type is {kind}; only "text" is supported yet', "response_format.type")
    if body.modalities and body.modalities != ["text"]:
        raise unsupported('modalities must be ["text"]; this model makes text only', "modalities")
    if body.continue_final_message:
        raise unsupported("continue_final_message is not supported; leave it out", "continue_final_message")
    if body.top_logprobs and not body.logprobs:
        raise bad_request(f"top_logprobs is {body.top_logprobs}; it needs logprobs to be true", "top_logprobs")


async def _whole(answer: _Answer) -> ChatCompletion:
    texts: list[list[str]] = [[] for _ in answer.generation.choices]
    logprobs: list[list[PlacedLogprob]] = [[] for _ in answer.generation.choices]
    finishes: list[FinishName | None] = [None for _ in answer.generation.choices]
    async with aclosing(answer.generation.pieces()) as batches:
        async for batch in batches:
            for piece in batch:
                texts[piece.index].append(piece.text)
                logprobs[piece.index] += piece.logprobs
                finishes[piece.index] = piece.finish
    choices = [
        ChatChoice(
            index=i,
            message=ChatMessage("".join(texts[i])),
            logprobs=chat_logprobs(logprobs[i], answer.model.chat) if answer.logprobs else None,
            finish_reason=finishes[i],
        )
        for i in range(len(texts))
    ]
    return ChatCompletion(
        answer.id, answer.created, answer.model.name, choices, answer.generation.usage, answer.model.fingerprint
    )


async def _chunks(answer: _Answer, usage: StreamUsage) -> AsyncGenerator[bytes, None]:
    generation = answer.generation
    fingerprint = answer.model.fingerprint

    def chunk(choices: list[ChatChunkChoice], counts: Usage | UnsetType | None) -> bytes:
        return event(
            ChatCompletionChunk(answer.id, answer.created, answer.model.name, choices, fingerprint, usage=counts)
        )

    roles = [ChatChunkChoice(choice.index, ChatDelta(role="assistant", content="")) for choice in generation.choices]
    async with aclosing(generation.pieces()) as batches:
        async for batch in batches:
            counts = usage.so_far(generation)
            choices = roles + [choice for piece in batch for choice in _chunk_choices(piece, answer)]
            roles = []
            if choices:
                yield b"".join([chunk([choice], counts) for choice in choices])
    if usage.at_end:
        yield chunk([], generation.usage)


def _chunk_choices(piece: Piece, answer: _Answer) -> list[ChatChunkChoice]:
    """The text, and the ending, each as a choice of its own chunk."""
    choices = []
    if piece.text or piece.logprobs:
        logprobs = chat_logprobs(piece.logprobs, answer.model.chat) if answer.logprobs else None
        choices.append(ChatChunkChoice(piece.index, ChatDelta(content=piece.text), logprobs))
    if piece.finish is not None:
        choices.append(ChatChunkChoice(piece.index, ChatDelta(), finish_reason=piece.finish))
    return choices
