"""The seams where a modality meets the engine. The engine calls these and knows nothing behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ar_core.request import FinishReason, RequestError, Tokens

if TYPE_CHECKING:
    from ar_core.attention.base import AttentionBackend
    from ar_core.batch import Batch
    from ar_core.sampling import SamplingState


@dataclass(frozen=True, slots=True)
class Encoded:
    """A segment as positions.

    keys: int64 [n]; equal keys (after equal predecessors) mean equal KV.
    inputs: int64 [n, width]; what the backbone's `embed` reads.
    embeds: [n, dim] on the engine's device, or None; rows that stand in for `embed(inputs)`.
    """

    keys: np.ndarray
    inputs: np.ndarray
    embeds: torch.Tensor | None = None


class SegmentEncoder(Protocol):
    """Turns one kind of segment into positions. Raises RequestError for a segment it cannot take."""

    def encode(self, segment: Any) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class TokenEncoder:
    """Token ids for a head that emits one integer: the key of a position is its token."""

    vocab_size: int

    def encode(self, segment: Tokens) -> Encoded:
        ids = np.asarray(segment.ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            wrong = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise RequestError(f"token id {wrong} is not in the vocabulary (0 to {self.vocab_size - 1})", "prompt")
        return Encoded(keys=ids, inputs=ids[:, None])


def row_keys(rows: np.ndarray) -> np.ndarray:
    """The cache keys of emitted rows: int64 [n, width] -> int64 [n].

    A single integer is its own key. A wider row is hashed over all its integers, so that two frames that differ
    anywhere differ in their key; its key is negative, so that no token id is like it.
    """
    if rows.shape[1] == 1:
        return rows[:, 0].astype(np.int64)
    rows = np.ascontiguousarray(rows, dtype=np.int64)
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype=np.int64) | np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer stores for one position."""

    num_heads: int
    head_dim: int
    value_dim: int


class Backbone(Protocol):
    """A decoder: positions in, hidden states out. Written-out families and transformers' own both look like this."""

    kv_layout: tuple[KVShape, ...]  # one per layer
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype  # of hidden states and KV

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """int64 [T, width] -> [T, dim]."""
        ...

    def forward(self, hidden: torch.Tensor, batch: Batch, attention: AttentionBackend) -> torch.Tensor:
        """[T, dim] -> [T, dim], after the final norm."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, dim] -> float32 [S, vocab]."""
        ...


@dataclass(slots=True)
class Emitted:
    """What a head made of S hidden states, still on the device.

    rows: int64 [S, width]. The rest is there only if a sequence asked for log-probabilities:
    logprob: float32 [S]; top_ids: int64 [S, n]; top_logprobs: float32 [S, n].
    """

    rows: torch.Tensor
    logprob: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


class Head(Protocol):
    """Emits one row of `width` integers for each hidden state: [S, dim] -> Emitted."""

    width: int

    def emit(self, hidden: torch.Tensor, sampling: SamplingState) -> Emitted: ...


class OutputStage(Protocol):
    """What happens to emitted rows on the device before they leave the engine: a codec, for speech.

    `process` is called once a step with what that step emitted, in one batch, and returns one payload (or None)
    per entry. An entry whose finish reason is set is the last of its request, also of one that was aborted.
    """

    def process(self, emitted: Sequence[tuple[str, list[list[int]], FinishReason | None]]) -> list[Any]: ...
