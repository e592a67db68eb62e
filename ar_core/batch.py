"""The tensors of one step: all that a model sees besides its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Embeds:
    """Rows that stand in for `embed(inputs)` at some positions: at int64 [n], rows [n, dim]."""

    at: torch.Tensor
    rows: torch.Tensor


@dataclass(slots=True)
class Batch:
    """T new positions of B sequences, one sequence after another.

    The lists are host copies of what the tensors beside them say, so that no code has to ask the device.
    """

    inputs: torch.Tensor  # int64 [T, width]
    positions: torch.Tensor  # int64 [T]: index of each new position in its sequence
    slots: torch.Tensor  # int64 [T]: where each new position's KV is stored
    query_start: torch.Tensor  # int32 [B + 1]: where each sequence's new positions begin; the last is T
    context_len: torch.Tensor  # int32 [B]: length of each sequence, its new positions counted
    slot_table: torch.Tensor  # int32 [lanes, max_context]: slot of every position of every running sequence
    lanes: torch.Tensor  # int64 [B]: the sequences' rows of slot_table
    select: torch.Tensor  # int64 [S]: which of the T positions the head reads
    query_lens: list[int]  # [B]
    context_lens: list[int]  # [B]
    first_slots: list[int]  # [B]: first slot of a sequence whose slots are consecutive, else -1
    embeds: Embeds | None = None

    @property
    def decode_only(self) -> bool:
        """Whether every sequence has exactly one new position."""
        return len(self.query_lens) == self.inputs.shape[0]
