"""What a layer saw before: the one thing that makes a network stream.

Every layer here looks only back, and only so far: a convolution over its last few inputs, an attention over its last
`window - 1` keys. So a layer declares a `Tail`, the number of earlier rows that it needs, and asks its `History` to put
them in front of its new rows. At the `Beginning` of a sound those are zeros; in the middle of one they were `Carried`
over from the last call. The layer cannot tell the difference, so one `forward` serves whole sounds, pieces, and
batches of streams of different ages.

All the tails of a network are columns of one matrix with a row for each slot:

    slot 0 | conv tail | keys | values | conv tail | ... |
    slot 1 | conv tail | keys | values | conv tail | ... |

so a batched call gathers its streams' rows once and puts them back once, wherever in the network they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


class Tail:
    """A layer's need to see the last `rows` rows, of `width` values each, of something again."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows = rows
        self.width = width


class History(ABC):
    """What came before the rows of this call."""

    @abstractmethod
    def extend(self, tail: Tail, x: torch.Tensor) -> torch.Tensor:
        """[B, T, width] -> [B, tail.rows + T, width]: x behind the rows before it; its last rows are remembered."""

    @property
    @abstractmethod
    def frames(self) -> torch.Tensor | None:
        """Frames before this call, int64 [B]; None if there were none in any row."""


class Beginning(History):
    """Nothing came before. Remembers nothing; gradients pass."""

    def extend(self, tail: Tail, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, tail.rows, 0))

    @property
    def frames(self) -> torch.Tensor | None:
        return None


class Carried(History):
    """The rows of some streams, [B, columns]; extending overwrites them."""

    def __init__(self, plan: Plan, rows: torch.Tensor, frames: torch.Tensor) -> None:
        self._plan = plan
        self.rows = rows
        self._frames = frames

    @staticmethod
    def start(plan: Plan, streams: int, device: torch.device, dtype: torch.dtype) -> Carried:
        """The beginning of `streams` sounds that will come in pieces."""
        rows = torch.zeros(streams, plan.width, device=device, dtype=dtype)
        return Carried(plan, rows, torch.zeros(streams, dtype=torch.int64, device=device))

    def advance(self, frames: int) -> Carried:
        """The same rows as the next call finds them, `frames` frames on."""
        return Carried(self._plan, self.rows, self._frames + frames)

    def extend(self, tail: Tail, x: torch.Tensor) -> torch.Tensor:
        if tail.rows == 0:
            return x
        kept = self.rows[:, self._plan.columns[tail]].view(len(x), tail.rows, tail.width)
        extended = torch.cat((kept, x), 1)
        kept.copy_(extended[:, -tail.rows :])
        return extended

    @property
    def frames(self) -> torch.Tensor:
        return self._frames


@dataclass(frozen=True)
class Plan:
    """Where in a slot's row each tail of a network lies."""

    columns: dict[Tail, slice]
    width: int

    @staticmethod
    def of(*networks: nn.Module) -> Plan:
        """The tails that the networks' layers hold as attributes."""
        columns: dict[Tail, slice] = {}
        width = 0
        for network in networks:
            for layer in network.modules():
                for tail in vars(layer).values():
                    if isinstance(tail, Tail):
                        columns[tail] = slice(width, width + tail.rows * tail.width)
                        width += tail.rows * tail.width
        return Plan(columns, width)
