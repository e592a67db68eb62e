"""The conversation that makes a dual-AR model speak:

system     what is asked, and the voice: transcripts and frames of reference recordings
user       a text
assistant  the frames that speak it; the model goes on from where this turn opens

A long text is spoken in parts, one user turn each; what was spoken stays in the conversation. Every piece is
tokenised on its own, so that no token spans two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ar_core.request import Frames, Tokens
from modalities.speech.tokenizer import END, SPEAKER_TAG, SpeechTokenizer

Segment = Tokens | Frames

_ASK = "convert the provided text to speech"
_ASK_WITH_VOICE = f"{_ASK} reference to the following:\n\nText:\n"


class Recorded(Protocol):
    """A recording of the voice: what is said in it, and its codes, integers [K, T]."""

    @property
    def text(self) -> str: ...

    @property
    def codes(self) -> np.ndarray: ...


def system(tokenizer: SpeechTokenizer, references: Sequence[Recorded]) -> list[Segment]:
    """What every conversation begins with."""
    start = _open(tokenizer, "system")
    if not references:
        return [start, Tokens(tokenizer.plain(_ASK)), closing(tokenizer)]
    return [
        start,
        Tokens(tokenizer.plain(_ASK_WITH_VOICE)),
        Tokens(tokenizer.spoken("\n".join(_tagged(ref.text, i) for i, ref in enumerate(references)))),
        Tokens(tokenizer.plain("\n\nSpeech:\n")),
        Frames(np.concatenate([tokenizer.rows(ref.codes) for ref in references])),
        closing(tokenizer),
    ]


def _tagged(text: str, speaker: int) -> str:
    """A transcript that says itself who speaks, as that of a dialogue does, is left as it is."""
    return text if SPEAKER_TAG.search(text) else f"<|speaker:{speaker}|>{text}"


def opening(tokenizer: SpeechTokenizer, text: str) -> list[Segment]:
    """The user's text, and the opening of the answer."""
    return [
        _open(tokenizer, "user"),
        Tokens(tokenizer.spoken(text)),
        closing(tokenizer),
        _open(tokenizer, "assistant"),
        Tokens([tokenizer.special("<|voice|>")]),
    ]


def _open(tokenizer: SpeechTokenizer, role: str) -> Tokens:
    return Tokens([tokenizer.special("<|im_start|>"), *tokenizer.plain(f"{role}\n")])


def closing(tokenizer: SpeechTokenizer) -> Tokens:
    """The end of a message."""
    return Tokens([tokenizer.special(END), *tokenizer.plain("\n")])
