"""FFmpeg's audio filters on a stream of float32 mono samples."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np


def to_frame(samples: np.ndarray, rate: int, at: int) -> av.AudioFrame:
    """float32 [n] as a mono frame whose first sample is number `at` of its stream."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32)[None], format="flt", layout="mono")
    frame.sample_rate = rate
    frame.time_base = Fraction(1, rate)
    frame.pts = at
    return frame


class FilterChain:
    """Filters in a row, each (name, arguments) in FFmpeg's notation; they keep their state from push to push."""

    def __init__(self, rate: int, filters: Sequence[tuple[str, str]]) -> None:
        self._rate = rate
        self._pushed = 0
        self._graph = av.filter.Graph()
        self._graph.threads = 1  # by default as many for each stream as there are cores
        last = self._graph.add_abuffer(sample_rate=rate, format="flt", layout="mono", time_base=Fraction(1, rate))
        for name, arguments in [*filters, ("aformat", "sample_fmts=flt:channel_layouts=mono"), ("abuffersink", "")]:
            node = self._graph.add(name, arguments)
            last.link_to(node)
            last = node
        self._graph.configure()

    def push(self, samples: np.ndarray) -> np.ndarray:
        """float32 [n] in, float32 [m] out: what is ready by now, perhaps nothing."""
        if len(samples) == 0:
            return np.zeros(0, np.float32)
        self._graph.push(to_frame(samples, self._rate, self._pushed))
        self._pushed += len(samples)
        return self._pull()

    def finish(self) -> np.ndarray:
        """The rest, float32 [m]. Nothing may be pushed afterwards."""
        if self._pushed == 0:
            return np.zeros(0, np.float32)
        self._graph.push(None)
        return self._pull()

    def _pull(self) -> np.ndarray:
        ready = [np.zeros(0, np.float32)]
        while True:
            try:
                ready.append(self._graph.pull().to_ndarray()[0])
            except (BlockingIOError, EOFError):
                return np.concatenate(ready)


class Resampler(FilterChain):
    """float32 mono from one sample rate (Hz) to another.

    The same samples whatever pieces they come in, without seams; n samples become ceil(n * target / source) or one
    fewer.
    """

    def __init__(self, source_rate: int, target_rate: int) -> None:
        super().__init__(source_rate, [] if source_rate == target_rate else [("aresample", str(target_rate))])
