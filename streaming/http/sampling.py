"""From a request's fields to what the engine is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from ar_core.request import Request, SamplingParams, Tokens
from streaming.http.errors import bad_request
from streaming.http.requests import GenerationBody
from streaming.http.served import ServedModel

V = TypeVar("V")


def sampling_params(
    body: GenerationBody, model: ServedModel, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Raises ApiError if a token id is not in the vocabulary, RequestError if values do not go together."""
    check_ids("logit_bias", body.logit_bias or (), model)
    check_ids("stop_token_ids", body.stop_token_ids or (), model)
    limit = max_tokens or model.max_context
    min_tokens = body.min_tokens or 0
    if min_tokens > limit:
        raise bad_request(f"min_tokens is {min_tokens}; it must be at most max_tokens, {limit}", "min_tokens")
    return SamplingParams(
        max_tokens=limit,
        min_tokens=min_tokens,
        temperature=_or(body.temperature, 1.0),
        top_k=max(_or(body.top_k, 0), 0),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias or {},
        seed=body.seed,
        logprobs=logprobs,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )


def engine_requests(
    answer_id: str,
    body: GenerationBody,
    model: ServedModel,
    prompts: list[list[int]],
    sampling: SamplingParams,
    *,
    prompt_field: str,
) -> list[Request]:
    """`n` requests for each prompt, prompt by prompt. Raises ApiError if a prompt does not fit the model."""
    n = body.n or 1
    requests: list[Request] = []
    for prompt in prompts:
        fitted = _fit(prompt, model, sampling, prompt_field)
        for choice in range(n):
            params = fitted if body.seed is None else replace(fitted, seed=(body.seed + choice) % 2**63)
            request_id = f"{answer_id}-{len(requests)}"
            requests.append(Request(request_id, [Tokens(prompt)], params, body.priority or 0, body.cache_salt or ""))
    return requests


def check_ids(param: str, ids: Iterable[int], model: ServedModel) -> None:
    """Raises ApiError if an id is not in the vocabulary."""
    for token in ids:
        if not 0 <= token < model.chat.vocab_size:
            raise bad_request(f"{param} names token {token}; ids go from 0 to {model.chat.vocab_size - 1}", param)


def _fit(prompt: list[int], model: ServedModel, sampling: SamplingParams, field: str) -> SamplingParams:
    room = model.max_context - len(prompt)
    if not prompt:
        raise bad_request("the prompt is empty; it must have at least one token", field)
    if room < 1:
        raise bad_request(
            f"the prompt has {len(prompt)} tokens; at most {model.max_context - 1} fit, since the context of "
            f"{model.name!r} is {model.max_context} and the answer needs at least one",
            field,
            "context_length_exceeded",
        )
    return replace(sampling, max_tokens=min(sampling.max_tokens, room), min_tokens=min(sampling.min_tokens, room))


def _or(value: V | None, default: V) -> V:
    return default if value is None else value
