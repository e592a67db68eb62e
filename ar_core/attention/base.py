"""The one interface between models and attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ar_core.batch import Batch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How a layer attends, always causally.

    scale: multiplies q.k. window: a position sees itself and the window - 1 before it; None sees all. softcap:
    c * tanh(score / c) before the softmax.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionBackend(Protocol):
    def plan(self, batch: Batch) -> None:
        """Called once a step, before the first layer."""
        ...

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, spec: AttentionSpec
    ) -> torch.Tensor:
        """Store k and v in the planned batch's slots, then attend over each sequence's whole context.

        q [T, heads, head_dim], k [T, kv_heads, head_dim], v [T, kv_heads, value_dim] -> [T, heads, value_dim].
        All of the batch's k and v are stored before any is read, so a position may attend to one that another
        sequence computes in the same step.
        """
        ...
