"""A toy model whose positions are frames: four integers, or an embedding row, go in; four integers come out.

It stands for what voice and vision models are to the engine. Everything in it is small, float32 and seeded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ar_core.attention.base import AttentionBackend, AttentionSpec
from ar_core.batch import Batch
from ar_core.interfaces import Emitted, Encoded, KVShape, row_keys
from ar_core.request import FinishReason
from ar_core.sampling import SamplingState, emit

WIDTH = 4
VOCAB = 40
DIM = 16
END = 39


class ToyBackbone:
    kv_layout = (KVShape(2, 8, 8), KVShape(2, 8, 8))
    max_context = 256
    vocab_size = VOCAB
    eos_token_ids = (END,)
    dtype = torch.float32

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        self.embedding = weight(WIDTH, VOCAB, DIM) * 4
        self.qkv = [weight(3 * DIM, DIM) for _ in self.kv_layout]
        self.position = weight(self.max_context, DIM) * 2
        self.out = weight(VOCAB, DIM) * 4
        self.embedded = 0  # positions that went through `embed`

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        self.embedded += len(inputs)
        return torch.stack([self.embedding[k, inputs[:, k]] for k in range(WIDTH)]).sum(0)

    def forward(self, hidden: torch.Tensor, batch: Batch, attention: AttentionBackend) -> torch.Tensor:
        hidden = hidden + self.position[batch.positions]
        for layer, weight in enumerate(self.qkv):
            q, k, v = (hidden @ weight.T).view(-1, 3, 2, 8).unbind(1)
            attended = attention.attend(q, k, v, layer, AttentionSpec(scale=8**-0.5))
            hidden = torch.nn.functional.layer_norm(hidden + attended.reshape(-1, DIM), (DIM,))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.out.T


class ToyHead:
    """Samples the first integer; the other three follow from it and the hidden state, one after the other."""

    width = WIDTH

    def __init__(self, backbone: ToyBackbone) -> None:
        self.backbone = backbone

    def emit(self, hidden: torch.Tensor, sampling: SamplingState) -> Emitted:
        first = emit(self.backbone.logits(hidden), sampling)
        row = [first.rows[:, 0]]
        for k in range(1, WIDTH):
            hidden = hidden + self.backbone.embedding[k - 1, row[-1]]
            row.append(self.backbone.logits(hidden).argmax(-1))
        first.rows = torch.stack(row, dim=1)
        return first


@dataclass(frozen=True)
class Frames:
    """A segment of frames: int64 [n, WIDTH]."""

    codes: np.ndarray


class FrameEncoder:
    def encode(self, segment: Frames) -> Encoded:
        return Encoded(row_keys(segment.codes), segment.codes)


@dataclass(frozen=True)
class Picture:
    """A segment of embedding rows, float32 [n, DIM], known by `digest`."""

    rows: torch.Tensor
    digest: int


class PictureEncoder:
    def encode(self, segment: Picture) -> Encoded:
        n = len(segment.rows)
        keys = row_keys(np.stack([np.full(n, segment.digest), np.arange(n)], axis=1))
        return Encoded(keys, np.zeros((n, WIDTH), dtype=np.int64), segment.rows)


class SumStage:
    """An output stage: the running sum of all integers that a request emitted."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.largest_batch = 0

    def process(self, emitted: list[tuple[str, list[list[int]], FinishReason | None]]) -> list[int]:
        self.largest_batch = max(self.largest_batch, len(emitted))
        payloads = []
        for request_id, rows, finish in emitted:
            total = self.sums.pop(request_id, 0) + sum(map(sum, rows))
            payloads.append(total)
            if finish is None:
                self.sums[request_id] = total
        return payloads
