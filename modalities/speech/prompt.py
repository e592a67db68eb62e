"""The conversation that makes a dual-AR model speak:

system     what is asked, and the voice: transcripts and frames of reference recordings
user       a text
assistant  the frames that speak it; the model goes on from where this turn opens

A long text is spoken in batches, one user turn each; what was spoken stays in the conversation. Every piece is
tokenised on its own, so that no token spans two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Reference:
    """The plain one; those of `audio.voices` are others."""

    text: str
    codes: np.ndarray


def conversation(
    tokenizer: SpeechTokenizer,
    batches: Sequence[str],
    references: Sequence[Recorded] = (),
    finished: Sequence[np.ndarray] = (),
) -> list[Segment]:
    """The prompt for the batch after the `finished` ones.

    finished: what the model emitted for the batches before, int64 [n, K + 1] each; the row that ended it is left out.
    The prompt begins with the one for the batch before and what was emitted for it, so that the cache has all that.
    Raises RequestError for a text or a recording that the model cannot take, ValueError if no batch is left.
    """
    if len(finished) >= len(batches):
        raise ValueError(f"{len(finished)} batches are finished, of {len(batches)}; there is none left to speak")
    parts = [*system(tokenizer, references), *opening(tokenizer, batches[0])]
    for rows, text in zip(finished, batches[1:]):
        parts += continuation(tokenizer, rows, text)
    return _joined(parts)


def continuation(tokenizer: SpeechTokenizer, rows: np.ndarray, text: str) -> list[Segment]:
    """What is added to a conversation when a batch is finished, to speak the next text.

    rows: what the model emitted for it, int64 [n, K + 1].
    """
    rows = np.asarray(rows, dtype=np.int64)
    return _joined([Frames(rows[tokenizer.is_frame(rows)]), closing(tokenizer), *opening(tokenizer, text)])


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


def _joined(parts: Sequence[Segment]) -> list[Segment]:
    """The same, with neighbouring tokens in one segment."""
    joined: list[Segment] = []
    for part in parts:
        if isinstance(part, Tokens) and joined and isinstance(joined[-1], Tokens):
            joined[-1] = Tokens([*joined[-1].ids, *part.ids])
        elif not isinstance(part, Frames) or len(part.rows):
            joined.append(part)
    return joined
