"""POST /v1/completions: the older shape, text or token ids in and text out."""

from __future__ import annotations

import asyncio
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
from streaming.http.errors import bad_request, unsupported
from streaming.http.generation import Generation, Piece
from streaming.http.logprobs import PlacedLogprob, completion_logprobs
from streaming.http.prompts import decode_ids, encode_text
from streaming.http.requests import MAX_PROMPTS, CompletionRequest
from streaming.http.sampling import check_ids, engine_requests, sampling_params
from streaming.http.schema import Completion, CompletionChoice, FinishName, Usage
from streaming.http.served import ServedModel, find_model
from streaming.http.sse import EventStream, event
from streaming.http.stream_usage import StreamUsage


async def create_completion(request: Request) -> Response:
    body = await parse_body(request, CompletionRequest)
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
    echoes: list[str]  # what each choice starts with

    def completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self.id, self.created, self.model.name, choices, self.model.fingerprint, usage)

    def choice(self, index: int, text: str, placed: list[PlacedLogprob], finish: FinishName | None) -> CompletionChoice:
        start = len(self.echoes[index])
        logprobs = completion_logprobs(placed, self.model.chat, start) if self.logprobs else None
        return CompletionChoice(index, text, logprobs, finish)


async def _prepare(body: CompletionRequest, model: ServedModel) -> _Answer:
    _refuse_unsupported(body)
    answer_id = f"cmpl-{secrets.token_hex(16)}"
    n = body.n or 1
    sampling = sampling_params(body, model, body.max_tokens, body.logprobs)
    prompts = await _prompt_ids(body, model)
    if len(prompts) * n > MAX_PROMPTS:
        raise bad_request(f"{len(prompts)} prompts with n {n} are too many; at most {MAX_PROMPTS} answers fit", "n")
    requests = engine_requests(answer_id, body, model, prompts, sampling, prompt_field="prompt")
    echoes = await _prompt_texts(body, model, prompts) if body.echo else [""] * len(prompts)
    generation = Generation(model, requests, body.stop_strings, n)
    return _Answer(
        answer_id,
        int(time.time()),
        model,
        generation,
        body.logprobs is not None,
        [echo for echo in echoes for _ in range(n)],
    )


def _refuse_unsupported(body: CompletionRequest) -> None:
    if body.suffix:
        raise unsupported("suffix is not supported, since this model cannot fill in the middle; leave it out", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise unsupported(f"best_of is {body.best_of}; it must equal n, {body.n or 1}, or be left out", "best_of")
    if body.echo and body.logprobs is not None:
        raise unsupported("echo with logprobs is not supported: prompts have no log-probabilities here", "echo")


async def _prompt_ids(body: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """The four forms of `prompt`, as a list of token id lists."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [await encode_text(model, prompt)]
    prompts: list[list[int]] = []
    flat: list[int] = []
    for item in prompt:
        match item:
            case str():
                prompts.append(await encode_text(model, item))
                await asyncio.sleep(0)  # many texts: other streams go on between them
            case int():
                flat.append(item)
            case list():
                prompts.append(item)
    if flat:
        prompts.append(flat)
    for ids in prompts:
        check_ids("prompt", ids, model)
    return prompts


async def _prompt_texts(body: CompletionRequest, model: ServedModel, prompts: list[list[int]]) -> list[str]:
    if isinstance(body.prompt, str):
        return [body.prompt]
    texts = [text for text in body.prompt if isinstance(text, str)]
    return texts or [await decode_ids(model, ids) for ids in prompts]


async def _whole(answer: _Answer) -> Completion:
    texts = [[echo] for echo in answer.echoes]
    logprobs: list[list[PlacedLogprob]] = [[] for _ in texts]
    finishes: list[FinishName | None] = [None for _ in texts]
    async with aclosing(answer.generation.pieces()) as batches:
        async for batch in batches:
            for piece in batch:
                texts[piece.index].append(piece.text)
                logprobs[piece.index] += piece.logprobs
                finishes[piece.index] = piece.finish
    choices = [answer.choice(i, "".join(texts[i]), logprobs[i], finishes[i]) for i in range(len(texts))]
    return answer.completion(choices, answer.generation.usage)


async def _chunks(answer: _Answer, usage: StreamUsage) -> AsyncGenerator[bytes, None]:
    generation = answer.generation
    echoes = [CompletionChoice(i, echo) for i, echo in enumerate(answer.echoes) if echo]
    async with aclosing(generation.pieces()) as batches:
        async for batch in batches:
            counts = usage.so_far(generation)
            choices = echoes + [_chunk_choice(piece, answer) for piece in batch if _says_something(piece)]
            echoes = []
            if choices:
                yield b"".join([event(answer.completion([choice], counts)) for choice in choices])
    if usage.at_end:
        yield event(answer.completion([], generation.usage))


def _says_something(piece: Piece) -> bool:
    return bool(piece.text or piece.logprobs or piece.finish)


def _chunk_choice(piece: Piece, answer: _Answer) -> CompletionChoice:
    return answer.choice(piece.index, piece.text, piece.logprobs, piece.finish)
