"""Text out of tokens as they come, exact to the byte."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """The bytes that each token adds to a text. Ids that the tokenizer does not know add nothing."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is one of transformers'."""
        self._tokenizer = tokenizer
        self._added = {token: str(added.content) for token, added in tokenizer.added_tokens_decoder.items()}
        self._special = frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        self._spell = _speller(tokenizer)
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._bytes(token)
        return found

    def is_special(self, token: int) -> bool:
        """Whether a token is no part of what is said: a turn's end, a role."""
        return token in self._special

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        return b"" if piece is None else self._spell(token, piece)


class TextStream:
    """One answer's text: whole characters, no special tokens, and nothing of a stop string or behind it.

    Of several stop strings the one that is complete first counts, so that it does not matter how tokens come together.
    """

    def __init__(self, tokens: TokenBytes, stop: Sequence[str]) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = ""  # could be the beginning of a stop string
        self.stopped = False  # a stop string was found

    def push(self, ids: Sequence[int]) -> str:
        """Take token ids; returns the text that is certain by now."""
        if self.stopped:
            return ""
        raw = b"".join(self._tokens[token] for token in ids if not self._tokens.is_special(token))
        return self._release(self._decoder.decode(raw), at_end=False)

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(b"", final=True), at_end=True)

    def _release(self, new: str, *, at_end: bool) -> str:
        if not self._stop:
            return new
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            _, start = min(found)
            return text[:start]
        keep = 0 if at_end else max(_could_begin(stop, text) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _could_begin(stop: str, text: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


Speller = Callable[[int, str], bytes]


def _speller(tokenizer: Any) -> Speller:
    """How this kind of tokenizer writes bytes as tokens, read off its decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    kinds = _decoder_kinds(json.loads(decoder.__getstate__())) if decoder is not None else []
    if "ByteLevel" in kinds:
        return _spell_byte_level
    if "ByteFallback" in kinds:
        return _spell_byte_fallback
    return _ByDecoding(tokenizer).spell


def _decoder_kinds(decoder: dict[str, Any]) -> list[str]:
    return [decoder["type"], *(kind for part in decoder.get("decoders", ()) for kind in _decoder_kinds(part))]


def _spell_byte_level(_: int, piece: str) -> bytes:
    """GPT-2's way: each byte is one printable character."""
    table = _byte_level_table()
    return b"".join(table[char] if char in table else char.encode() for char in piece)


@cache
def _byte_level_table() -> dict[str, bytes]:
    """Printable bytes stand for themselves, the others for the characters from 256 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


def _spell_byte_fallback(_: int, piece: str) -> bytes:
    """SentencePiece's way: ▁ is a space, and a byte that is in no piece is written <0x..>."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


class _ByDecoding:
    """Any other way: what a token adds to the text of one before it. Wrong only for parts of characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)
        self._anchor_text = self._decode(self._anchor)

    def spell(self, token: int, _: str) -> bytes:
        return self._decode([*self._anchor, token])[len(self._anchor_text) :].encode()

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text
