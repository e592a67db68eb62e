"""Tensor parallelism:

each rank holds a share of every layer's heads and hidden units, and sums are reduced over torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Parallel:
    """This process's place among `size` that share one model. A size of 1 costs nothing."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def share(self, n: int, what: str) -> int:
        """This rank's part of n. Raises ValueError if n cannot be divided evenly."""
        if n % self.size:
            raise ValueError(f"{what} is {n}, which {self.size} tensor-parallel ranks cannot share evenly")
        return n // self.size

    def slice(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of a tensor along one dimension."""
        if self.size == 1:
            return tensor
        n = self.share(tensor.shape[dim], f"a dimension of {list(tensor.shape)}")
        return tensor.narrow(dim, self.rank * n, n)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors, side by side along the last dimension."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)
