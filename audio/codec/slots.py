"""The histories of streams that come and go, in a fixed number of slots."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from audio.codec.history import Carried, Plan


class Slots:
    """Up to `count` open streams.

    `rows` [count, plan.width] and `frames` int64 [count] keep their addresses, so a captured CUDA graph may use them.
    """

    def __init__(self, plan: Plan, count: int, device: torch.device, dtype: torch.dtype) -> None:
        if count < 1:
            raise ValueError(f"slots is {count}; it must be at least 1")
        self._plan = plan
        self._lengths: dict[int, int] = {}  # open slot -> frames so far, known without asking the device
        self._free = list(range(count - 1, -1, -1))
        self.rows = torch.zeros(count, plan.width, device=device, dtype=dtype)
        self.frames = torch.zeros(count, dtype=torch.int64, device=device)

    def open(self) -> int:
        """A slot at a stream's beginning. Raises RuntimeError if all are open."""
        if not self._free:
            raise RuntimeError(f"all {len(self.rows)} slots are open; close one, or make more")
        slot = self._free.pop()
        self.rows[slot].zero_()
        self.frames[slot].zero_()
        self._lengths[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Give the slot back. Raises ValueError if it is not open."""
        self.require_open([slot])
        del self._lengths[slot]
        self._free.append(slot)

    def require_open(self, slots: Iterable[int]) -> None:
        """Raises ValueError if one is not open."""
        closed = sorted(set(slots) - set(self._lengths))
        if closed:
            raise ValueError(f"slot {closed[0]} is not open; open are {sorted(self._lengths) or 'none'}")

    def lengthen(self, slots: Iterable[int], frames: int) -> int:
        """Note that the open slots get `frames` more frames; the length of the longest after that."""
        for slot in slots:
            self._lengths[slot] += frames
        return max(self._lengths[slot] for slot in slots)

    def gather(self, slots: torch.Tensor) -> Carried:
        """A copy of the histories of slots, int64 [B] without repeats."""
        return Carried(self._plan, self.rows.index_select(0, slots), self.frames.index_select(0, slots))

    def scatter(self, slots: torch.Tensor, history: Carried) -> None:
        """Put back what `gather` gave, after `advance`."""
        self.rows.index_copy_(0, slots, history.rows)
        self.frames.index_copy_(0, slots, history.frames)
