"""A request in the engine: its positions, its slots, and how far it has come."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import torch

from ar_core.interfaces import Encoded, row_keys
from ar_core.radix import Node
from ar_core.request import FinishReason, Request


class State(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class EmbedSpan:
    """Embedding rows [n, dim] for the positions from `start` on."""

    start: int
    rows: torch.Tensor


class Sequence:
    """The positions of one request, prompt first, then what was emitted.

        0 ............ tree_len ........ computed ........ known ....... known + in_flight
        │ slots: tree's │ slots: own      │ no KV yet        │ emitted by a step whose
        │ (locked)      │                 │                  │ result is not handled yet

    `computed` counts positions whose KV is stored by a step already launched; one slot each.
    """

    __slots__ = (
        "arrival",
        "cached",
        "computed",
        "embeds",
        "finish",
        "first_slot",
        "in_flight",
        "inputs",
        "keys",
        "known",
        "lane",
        "limit",
        "node",
        "prompt_len",
        "request",
        "seed",
        "slots",
        "state",
        "stop_ids",
        "table_len",
        "tree_len",
    )

    def __init__(
        self,
        request: Request,
        prompt: list[Encoded],
        arrival: int,
        *,
        limit: int,
        width: int,
        seed: int,
        stop_ids: frozenset[int],
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.limit = limit  # positions that it may grow to, prompt included
        self.seed = seed
        self.stop_ids = stop_ids  # first integers of a row that end it
        self.prompt_len = self.known = sum(len(part.keys) for part in prompt)
        self.keys = np.zeros(limit, dtype=np.int64)
        self.inputs = np.zeros((limit, width), dtype=np.int64)
        self.embeds: list[EmbedSpan] = []
        self._fill(prompt)
        self.slots = np.zeros(limit, dtype=np.int32)
        self.state = State.WAITING
        self.finish: FinishReason | None = None
        self.cached: int | None = None  # prompt positions found in the cache when it first started
        self.in_flight = 0
        self.lane = 0  # row of the engine's per-sequence tables while it runs
        self.computed = 0
        self.tree_len = 0
        self.table_len = 0  # leading entries of `slots` that the engine's slot table has
        self.first_slot = 0  # where its slots begin if they are consecutive, else -1
        self.node: Node | None = None

    def _fill(self, prompt: list[Encoded]) -> None:
        at = 0
        for part in prompt:
            end = at + len(part.keys)
            self.keys[at:end] = part.keys
            self.inputs[at:end] = part.inputs
            if part.embeds is not None:
                self.embeds.append(EmbedSpan(at, part.embeds))
            at = end

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def order(self) -> tuple[int, int]:
        """Smaller goes first."""
        return self.request.priority, self.arrival

    @property
    def emitted(self) -> int:
        """Rows that launched steps emit for it."""
        return self.known + self.in_flight - self.prompt_len

    @property
    def length(self) -> int:
        """Positions that exist, the one in flight counted."""
        return self.known + self.in_flight

    @property
    def wants_step(self) -> bool:
        """Whether another step can bring it forward: the last row that it may emit is not followed, so needs no KV."""
        return self.length < self.limit

    def append(self, row: list[int]) -> None:
        """Note the row that the step in flight emitted."""
        self.in_flight -= 1
        self.inputs[self.known] = row
        self.keys[self.known] = row_keys(self.inputs[self.known : self.known + 1])[0]
        self.known += 1

    def take_slots(self, slots: np.ndarray) -> None:
        """Own the slots of the next positions to be computed."""
        end = self.computed + len(slots)
        if self.computed == 0:
            self.first_slot = int(slots[0])
        self._note_run(self.computed, slots)
        self.slots[self.computed : end] = slots
        self.computed = end

    def share_slots(self, slots: np.ndarray, node: Node | None) -> None:
        """Read the tree's slots for the first positions, in place of own ones if there were any."""
        n = len(slots)
        if not np.array_equal(self.slots[:n], slots) or self.computed < n:
            self.slots[:n] = slots
            self.table_len = min(self.table_len, self.tree_len)
            self.computed = max(self.computed, n)
            self.first_slot = int(slots[0])
            self._note_run(0, self.slots[: self.computed])
        self.tree_len = n
        self.node = node

    def leave(self) -> None:
        """Forget all slots: whoever called has passed them on."""
        self.computed = self.tree_len = self.table_len = self.first_slot = 0
        self.node = None

    def _note_run(self, start: int, slots: np.ndarray) -> None:
        if self.first_slot < 0 or not len(slots):
            return
        expected = self.first_slot + start
        if slots[0] != expected or slots[-1] != expected + len(slots) - 1 or (np.diff(slots) != 1).any():
            self.first_slot = -1
