"""Log-probabilities beside the text they belong to, in the shapes of chat and of completions."""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ar_core.request import TokenLogprob
from streaming.http.schema import ChatLogprobs, CompletionLogprobs, TokenLogprobs, TopLogprob

if TYPE_CHECKING:
    from modalities.chat import ChatModel

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class PlacedLogprob:
    offset: int  # characters of the answer before this token
    entry: TokenLogprob


class LogprobGate:
    """Holds a token's log-probability back until some of its text has been sent.

    So what a held-back or matched stop string consists of does not leak here either.
    """

    def __init__(self, chat: ChatModel) -> None:
        self._chat = chat
        self._held: deque[tuple[int, PlacedLogprob]] = deque()  # with the byte at which the token starts
        self._bytes = 0
        self._characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._sent_bytes = 0

    def release(self, entries: list[TokenLogprob], text: str, *, ended: bool) -> list[PlacedLogprob]:
        """Add what was emitted, and take what `text`, sent next, covers; at a regular end, all."""
        for entry in entries:
            self._held.append((self._bytes, PlacedLogprob(self._characters, entry)))
            raw = self._chat.token_bytes(entry.token)
            self._bytes += len(raw)
            self._characters += len(self._decoder.decode(raw))
        self._sent_bytes += len(text.encode())
        released = []
        while self._held and (ended or self._held[0][0] < self._sent_bytes):
            released.append(self._held.popleft()[1])
        return released


def chat_logprobs(placed: list[PlacedLogprob], chat: ChatModel) -> ChatLogprobs:
    return ChatLogprobs([_chat_entry(item.entry, chat) for item in placed])


def completion_logprobs(placed: list[PlacedLogprob], chat: ChatModel, start: int) -> CompletionLogprobs:
    """The legacy shape. `start` is the length of an echoed prompt, in characters."""
    tops = []
    for item in placed:
        top = {_legacy_token(token, chat): _finite(logprob) for token, logprob in item.entry.top}
        top.setdefault(_legacy_token(item.entry.token, chat), _finite(item.entry.logprob))
        tops.append(top)
    return CompletionLogprobs(
        tokens=[_legacy_token(item.entry.token, chat) for item in placed],
        token_logprobs=[_finite(item.entry.logprob) for item in placed],
        top_logprobs=tops,
        text_offset=[start + item.offset for item in placed],
    )


def _chat_entry(entry: TokenLogprob, chat: ChatModel) -> TokenLogprobs:
    def fields(token: int, logprob: float) -> tuple[str, float, list[int]]:
        return chat.token_text(token), _finite(logprob), list(chat.token_bytes(token))

    top = [TopLogprob(*fields(token, logprob)) for token, logprob in entry.top]
    return TokenLogprobs(*fields(entry.token, entry.logprob), top)


def _legacy_token(token: int, chat: ChatModel) -> str:
    """Part of a character is written as its bytes, so that two different tokens are never the same key."""
    raw = chat.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
