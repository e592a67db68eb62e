"""From messages and texts to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from streaming.http.errors import bad_request
from streaming.http.requests import Message, TemplateBody
from streaming.http.served import ServedModel

P = ParamSpec("P")
R = TypeVar("R")

_INLINE_SIZE = 8192  # characters or tokens: up to here the tokeniser takes a few milliseconds at most
# What a client may not set by chat_template_kwargs, since the server or another field does.
_OWN_VARIABLES = frozenset(
    {
        "messages",
        "conversation",
        "chat_template",
        "tools",
        "documents",
        "tokenizer",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
    }
)


async def render_messages(model: ServedModel, messages: list[Message], options: TemplateBody) -> list[int]:
    """The prompt that the model's chat template makes of the messages. Raises ApiError if it makes none."""
    if not model.chat.has_template:
        raise bad_request(f"model {model.name!r} has no chat template; use /v1/completions", "model")
    variables = options.chat_template_kwargs or {}
    for name in variables:
        if name in _OWN_VARIABLES:
            raise bad_request(f"chat_template_kwargs may not set {name!r}", "chat_template_kwargs")
    generation_prompt = options.add_generation_prompt is not False
    dicts = [message.for_template() for message in messages]
    size = sum(len(message["content"]) for message in dicts)

    def render() -> list[int]:
        try:
            return model.chat.render(dicts, add_generation_prompt=generation_prompt, template_kwargs=variables)
        except Exception as error:  # the template is a program of the checkpoint's, run on the client's data
            raise bad_request(f"the chat template does not take these messages: {error}", "messages") from error

    return await off_loop(size, render)


async def encode_text(model: ServedModel, text: str) -> list[int]:
    return await off_loop(len(text), model.chat.encode, text)


async def decode_ids(model: ServedModel, ids: list[int]) -> str:
    return await off_loop(len(ids), model.chat.decode, ids)


async def off_loop(size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function of the tokeniser; in a thread if the text is long, so that other streams go on meanwhile."""
    if size <= _INLINE_SIZE:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
