"""Segments as positions for a model with a FrameHead: rows [id, code 0, .. code K-1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ar_core.interfaces import Encoded, TokenEncoder, row_keys
from ar_core.request import Frames, RequestError, Tokens


@dataclass(frozen=True, slots=True)
class FrameTokenEncoder:
    """Token ids: rows without codes. The key of a position is its token, which no frame's is (see `row_keys`)."""

    vocab_size: int
    width: int

    def encode(self, segment: Tokens) -> Encoded:
        tokens = TokenEncoder(self.vocab_size).encode(segment)
        inputs = np.zeros((len(tokens.keys), self.width), dtype=np.int64)
        inputs[:, 0] = tokens.keys
        return Encoded(keys=tokens.keys, inputs=inputs)


@dataclass(frozen=True, slots=True)
class FrameEncoder:
    """Frames: the key of a position covers all its integers."""

    semantic: range
    codebook_size: int
    width: int

    def encode(self, segment: Frames) -> Encoded:
        rows = np.asarray(segment.rows, dtype=np.int64)
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise RequestError(f"frames have the shape {list(rows.shape)}; it must be [n, {self.width}]", "prompt")
        self._check(rows[:, 0], self.semantic, "the first integer of a frame")
        self._check(rows[:, 1:], range(self.codebook_size), "a code of a frame")
        return Encoded(keys=row_keys(rows), inputs=rows)

    @staticmethod
    def _check(found: np.ndarray, allowed: range, what: str) -> None:
        wrong = found[(found < allowed.start) | (found >= allowed.stop)]
        if wrong.size:
            raise RequestError(f"{what} is {wrong[0]}; it goes from {allowed.start} to {allowed.stop - 1}", "prompt")
