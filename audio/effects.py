"""Speed without a change of pitch, and volume, on the way out."""

from __future__ import annotations

import numpy as np

from audio.errors import AudioError
from audio.filters import FilterChain

SPEEDS = (0.25, 4.0)
DECIBELS = (-20.0, 20.0)

_BLOCK = 256  # atempo gives the same samples for any pieces only if it is fed equal ones
_ONE_FILTER = (0.5, 2.0)  # beyond, one atempo skips sound instead of blending it


class Effects:
    """Makes a stream of float32 mono samples `speed` times as fast and `volume` dB louder.

    n samples become round(n / speed), and the same ones whatever pieces they come in. What volume lifts above full
    scale is clipped to it. Raises AudioError for values out of range.
    """

    def __init__(self, rate: int, *, speed: float = 1.0, volume: float = 0.0) -> None:
        _check("speed", speed, *SPEEDS)
        _check("volume", volume, *DECIBELS)
        self._rate = rate
        self._speed = speed
        self._gain = np.float32(10 ** (volume / 20))
        self._taken = 0
        self._given = 0
        self._tempo = FilterChain(rate, _tempo_filters(speed)) if speed != 1 else None

    def push(self, samples: np.ndarray) -> np.ndarray:
        """float32 [n] in, float32 [m] out: what is ready by now, perhaps nothing."""
        self._taken += len(samples)
        if self._tempo is not None:
            samples = self._tempo.push(samples)
        self._given += len(samples)
        return self._loud(samples)

    def finish(self) -> np.ndarray:
        """The rest, float32 [m]. Nothing may be pushed afterwards."""
        if self._tempo is None or self._taken == 0:
            return np.zeros(0, np.float32)
        # The filter drops what does not fill its last window. Silence pushes the sound through, and is cut off again.
        silence = np.zeros(int(self._rate * 0.2 * max(1.0, self._speed)), np.float32)
        rest = np.concatenate([self._tempo.push(silence), self._tempo.finish()])
        return self._loud(rest[: max(0, round(self._taken / self._speed) - self._given)])

    def _loud(self, samples: np.ndarray) -> np.ndarray:
        return samples if self._gain == 1 else np.clip(samples * self._gain, -1, 1)


def _tempo_filters(speed: float) -> list[tuple[str, str]]:
    filters = [("asetnsamples", f"nb_out_samples={_BLOCK}:pad=0")]
    slowest, fastest = _ONE_FILTER
    while not slowest <= speed <= fastest:
        step = fastest if speed > fastest else slowest
        filters.append(("atempo", str(step)))
        speed /= step
    return [*filters, ("atempo", str(speed))]


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise AudioError(f"{name} is {value}; it goes from {least:g} to {most:g}")
