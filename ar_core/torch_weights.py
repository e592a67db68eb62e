"""Weights from a `model.pth`: a pickle of tensors, read without running any code that it may hold."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch

from ar_core.parallel import Parallel
from ar_core.weights import WeightError, Weights


class TorchWeights(Weights):
    """The tensors of one file: a dictionary by name, or one that has such a dictionary as its `state_dict`.

    Raises WeightError for a file that holds anything else.
    """

    def __init__(self, file: Path, device: torch.device, dtype: torch.dtype, parallel: Parallel) -> None:
        super().__init__(device, dtype, parallel)
        try:
            found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise WeightError(f"{file} is not a plain file of tensors: {str(error).splitlines()[0]}") from error
        found = found.get("state_dict", found) if isinstance(found, dict) else found
        if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
            raise WeightError(f"{file} does not hold tensors by name")
        self._tensors: dict[str, torch.Tensor] = found

    def names(self) -> set[str]:
        return set(self._tensors)

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return self._tensors[name]
