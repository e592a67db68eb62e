"""The paged KV memory and its free list. A page is one position: a slot."""

from __future__ import annotations

import math
import os

import numpy as np
import torch

from ar_core.interfaces import KVShape

_CPU_BYTES = 4 << 30  # a CPU's pool is no larger than this, or than a quarter of its memory
_CACHE_LINE = 64  # bytes
_WINDOW = 8192  # slots looked at in one go when searching for free ones


class KVPool:
    """K and V of `num_slots` positions for every layer, and which slots are free.

    k[layer] is [num_slots + 1, kv_heads, head_dim] and v[layer] [num_slots + 1, kv_heads, value_dim]. Slot 0 is
    never handed out: padding writes there.
    """

    def __init__(
        self, layout: tuple[KVShape, ...], num_slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.k = [_zeros((num_slots + 1, s.num_heads, s.head_dim), dtype, device) for s in layout]
        self.v = [_zeros((num_slots + 1, s.num_heads, s.value_dim), dtype, device) for s in layout]
        self._free = np.ones(num_slots + 1, dtype=bool)
        self._free[0] = False
        self._num_free = num_slots
        self._cursor = 1

    @staticmethod
    def bytes_per_slot(layout: tuple[KVShape, ...], dtype: torch.dtype) -> int:
        return sum(s.num_heads * (s.head_dim + s.value_dim) for s in layout) * dtype.itemsize

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def free_mask(self) -> np.ndarray:
        """bool [num_slots + 1], for checks."""
        return self._free

    def alloc(self, n: int, after: int = 0, room: int = 0) -> np.ndarray:
        """n free slots, int32 [n]; the ones right after slot `after` where they are free.

        Consecutive slots let a backend read a sequence's KV as one view instead of gathering it, so a new
        sequence asks for `room`: slots behind its own that others take only when nothing else is free. Raises
        MemoryError if fewer than n are free.
        """
        if n > self._num_free:
            raise MemoryError(f"{n} KV slots wanted, {self._num_free} of {self.num_slots} are free")
        follow = slice(after + 1, after + 1 + n)
        if after > 0 and follow.stop <= self.num_slots + 1 and self._free[follow].all():
            slots = np.arange(follow.start, follow.stop, dtype=np.int32)
            self._free[slots] = False
        else:
            slots = self._search(n)
            self._cursor = (int(slots[-1]) + min(room, self.num_slots // 16)) % self.num_slots + 1
        self._num_free -= n
        return slots

    def extend(self, after: np.ndarray) -> np.ndarray:
        """One slot for each of B sequences whose last slots are `after`, int32 [B]:

        `alloc` for a whole decode step at once.
        """
        if len(after) > self._num_free:
            raise MemoryError(f"{len(after)} KV slots wanted, {self._num_free} of {self.num_slots} are free")
        slots = (after + 1).astype(np.int32)
        follows = slots <= self.num_slots
        follows[follows] = self._free[slots[follows]]
        # Sequences that share a prompt to its end have the same last slot: the first of them gets the one behind it.
        first = np.zeros(len(slots), dtype=bool)
        first[np.unique(slots, return_index=True)[1]] = True
        follows &= first
        self._free[slots[follows]] = False
        self._num_free -= int(follows.sum())
        rest = int(len(slots) - follows.sum())
        if rest:
            slots[~follows] = self.alloc(rest)
        return slots

    def free(self, slots: np.ndarray) -> None:
        """Give slots back. Raises ValueError if one of them is free already."""
        if len(slots) == 0:
            return
        if self._free[slots].any() or slots.min() < 1:
            raise ValueError("a slot was freed that is free already")
        self._free[slots] = True
        self._num_free += len(slots)

    def _search(self, n: int) -> np.ndarray:
        """Take the next n free slots from the cursor on, wrapping around. At least n are free."""
        found: list[np.ndarray] = []
        missing, at = n, self._cursor
        while missing:
            window = (np.flatnonzero(self._free[at : at + _WINDOW])[:missing] + at).astype(np.int32)
            self._free[window] = False
            found.append(window)
            missing -= len(window)
            at = at + _WINDOW if at + _WINDOW <= self.num_slots else 1
        return np.concatenate(found)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks for zeroed pages, which cost neither time nor memory until they are written to; torch writes them all.
    size = math.prod(shape) * dtype.itemsize
    pages = np.zeros(size + _CACHE_LINE, dtype=np.uint8)
    start = -pages.ctypes.data % _CACHE_LINE
    return torch.from_numpy(pages[start : start + size]).view(dtype).view(shape)


def affordable_slots(
    layout: tuple[KVShape, ...], dtype: torch.dtype, device: torch.device, memory_fraction: float
) -> int:
    """How many slots fit:

    on a GPU into `memory_fraction` of its memory, less what is taken now; on a CPU into a modest share of it.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * memory_fraction) - (total - free)
    else:
        budget = min(_CPU_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    return max(0, budget) // KVPool.bytes_per_slot(layout, dtype)
