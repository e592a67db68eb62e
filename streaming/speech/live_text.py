"""Text that arrives in any pieces, cut into what is spoken at once."""

from __future__ import annotations

from modalities.speech.split import first_part, first_sentences
from modalities.speech.tokenizer import SPEAKER_TAG

_WINDOW = 4  # parts that are looked at to find the end of the first


class LiveText:
    """What is cut off depends on the text and on where it is flushed, not on the pieces that it came in.

    A part leaves as soon as it is one or more whole sentences of `least` characters together, or when it is longer than
    `most` bytes of UTF-8 and is cut as a long text is. A part that begins within a speaker's turn repeats the tag.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._text = ""
        self._speaker = ""  # the tag of the turn that the text begins in

    @property
    def held(self) -> int:
        """Characters that wait for what comes."""
        return len(self._text)

    def push(self, text: str) -> list[str]:
        """The parts that are complete now."""
        self._text += text
        parts = []
        while length := self._first():
            parts.append(self._take(length))
        return [part for part in parts if part]

    def flush(self) -> str:
        """The rest, empty if nothing is left to speak."""
        return self._take(len(self._text))

    def _first(self) -> int:
        window = self._text[: _WINDOW * self._most]
        sentences = first_sentences(window, self._least)
        if sentences and len(window[:sentences].strip().encode()) <= self._most:
            return sentences
        return first_part(window, self._most)

    def _take(self, length: int) -> str:
        part, self._text = self._text[:length].strip(), self._text[length:]
        if not SPEAKER_TAG.match(part):
            part = self._speaker + part
        tags = SPEAKER_TAG.findall(part)
        if tags:
            self._speaker = tags[-1]
        return part if SPEAKER_TAG.sub("", part).strip() else ""
