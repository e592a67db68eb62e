"""How many frames of a stream are decoded and sent together: few at first, so that it begins soon, then more.

A listener never runs dry as long as a chunk is made before the one before it has been heard. A chunk is `growth` times
as long as that, so speech must be made at least `growth` times as fast as it is heard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Latency = Literal["low", "balanced", "normal"]


@dataclass(frozen=True, slots=True)
class Pace:
    """Frames of the first chunk, by what each next one is longer, and where that ends."""

    first: int
    growth: float
    most: int


PACES: dict[Latency, Pace] = {
    "low": Pace(first=1, growth=1.25, most=8),
    "balanced": Pace(first=2, growth=1.5, most=16),
    "normal": Pace(first=2, growth=2.0, most=32),
}


class Chunks:
    """Says when the frames that a stream has ready make a chunk."""

    def __init__(self, latency: Latency) -> None:
        self._pace = PACES[latency]
        self._size = float(self._pace.first)

    def due(self, frames: int, *, ended: bool) -> bool:
        """Whether so many frames are to be sent now; if so, the next chunk may have to be longer."""
        if frames == 0 or (frames < int(self._size) and not ended):
            return False
        self._size = min(self._size * self._pace.growth, self._pace.most)
        return True
