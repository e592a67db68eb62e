"""What a speech engine is asked: to speak, turn by turn; to encode a recording; to decode codes.

A request to speak has the segments of the system message, then its turns. The other two have one segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ar_core.request import Frames, Tokens
from modalities.speech.chunks import Latency

Prompt = tuple[Tokens | Frames, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """A text to speak: the model is asked with `opening`, and emits frames until it ends or has `max_frames`.

    If another turn follows, the frames stay in the conversation, and `closing` after them. A turn that is `alone` is
    spoken as if there had been none before it.
    """

    opening: Prompt
    closing: Prompt
    max_frames: int
    latency: Latency
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Recording:
    """Samples float32 [n] at the codec's rate, to be encoded."""

    samples: np.ndarray


@dataclass(frozen=True, slots=True)
class Codes:
    """Integers [K, T], to be decoded."""

    codes: np.ndarray
