"""Whole conversations with a speech model, put together from what `modalities.speech.prompt` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ar_core.request import Frames
from modalities.speech.prompt import Recorded, Segment, closing, opening, system
from modalities.speech.tokenizer import SpeechTokenizer


@dataclass(frozen=True)
class Reference:
    text: str
    codes: np.ndarray


def conversation(
    tokenizer: SpeechTokenizer,
    parts: Sequence[str],
    references: Sequence[Recorded] = (),
    finished: Sequence[np.ndarray] = (),
) -> list[Segment]:
    """The prompt for the part after the `finished` ones, of which the emitted rows, int64 [n, K + 1], are given."""
    segments = [*system(tokenizer, references), *opening(tokenizer, parts[0])]
    for rows, text in zip(finished, parts[1:]):
        segments += [Frames(rows[tokenizer.is_frame(rows)]), closing(tokenizer), *opening(tokenizer, text)]
    return segments
