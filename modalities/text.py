"""A text that a language model made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ar_core.request import TokenLogprob


@dataclass(frozen=True, slots=True)
class Text:
    """`tokens` are what was emitted, but for a stop token; a stop string is cut off `text` alone."""

    text: str
    tokens: list[int]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV was found in the cache
    logprobs: list[TokenLogprob] | None = None

    def __str__(self) -> str:
        return self.text
